"""Images of different sizes: with Qwen's and GLM's patches of 28 x 28 pixels 1, 2 and 4 tokens."""

import io

from PIL import Image


def png(colour, size):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


RED, GREEN, BLUE = png("red", (28, 28)), png("lime", (28, 56)), png("blue", (56, 56))
