"""What a file's bytes show: every kind of sample scaled exactly, laid on white, or refused."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmicl_kernels.data.decoding import decode_image

RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
EXPECTED = (RAMP.astype(float) / 65535 * 255).round()


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data):
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(data):
    found = pixels(data)
    assert (found == found[..., :1]).all()
    return found[..., 0].astype(int)


def big(*values):
    return struct.pack(f">{len(values)}H", *values)


def png(size, bits, colour, row, **chunks):
    """A file of equal rows, written by hand: Pillow does not write them all."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    body = zlib.compress((b"\0" + row) * size[1])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(order, width, bits, data, *, photometric=1, samples=1, form=1):
    """One row, uncompressed, with ``form`` 1 unsigned, 2 signed, 3 float."""
    where = 8 + 2 + 9 * 12 + 4
    wide, data = (b"", data) if samples == 1 else (struct.pack(f"{order}{samples}H", *[bits] * samples), data)
    bits_field = struct.pack(f"{order}HH", bits, 0) if samples == 1 else struct.pack(f"{order}I", where)
    entries = [(256, width), (257, 1), (258, None), (259, 1), (262, photometric), (273, where + len(wide))]
    entries += [(277, samples), (279, len(data)), (339, form)]
    made = b"".join(
        struct.pack(f"{order}HHI", 258, 3, samples) + bits_field
        if value is None
        else struct.pack(f"{order}HHII", tag, 4, 1, value)
        for tag, value in entries
    )
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    return head + made + bytes(4) + wide + data


def fits(row):
    """One row of 16-bit samples, which are signed by the standard."""
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", f"NAXIS1  = {len(row) // 2}", "NAXIS2  = 1", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    return header + row.ljust(2880, b"\0")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled(kind):
    assert np.array_equal(grey(saved(Image.fromarray(RAMP), kind)), EXPECTED)


@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order(order):
    values = struct.pack(f"{order}4H", 0, 200, 30000, 65535)
    assert grey(tiff(order, 4, 16, values)).tolist() == [[0, 1, 117, 255]]


def test_black_may_be_the_largest_value():
    values = struct.pack("<4H", 0, 200, 30000, 65535)
    assert grey(tiff("<", 4, 16, values, photometric=0)).tolist() == [[255, 254, 138, 0]]
    assert grey(tiff("<", 2, 8, b"\0\xff", photometric=0)).tolist() == [[255, 0]]


def test_12_bits_are_scaled():
    assert grey(tiff("<", 2, 12, b"\xff\xf8\x00")).tolist() == [[255, 128]]  # 4095 and 2048


def test_other_largest_values():
    assert grey(b"P5 3 1 1000\n" + big(0, 500, 1000)).tolist() == [[0, 128, 255]]
    assert grey(b"P5 3 1 15\n" + bytes([0, 7, 15])).tolist() == [[0, 119, 255]]
    assert grey(png((4, 1), 2, 0, bytes([0b00011011]))).tolist() == [[0, 85, 170, 255]]


def test_colours_of_16_bits():
    row = big(0, 30000, 65535)
    assert pixels(png((1, 1), 16, 2, row)).tolist() == [[[0, 117, 255]]]
    assert pixels(
        tiff("<", 1, 16, struct.pack("<3H", 0, 30000, 65535), photometric=2, samples=3)
    ).tolist() == [[[0, 117, 255]]]
    half = big(30000, 0, 65535, 0x8080)  # 128 of 255 opaque
    assert pixels(png((1, 1), 16, 6, half)).tolist() == [[[186, 127, 255]]]


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_what_is_transparent_is_white(mode):
    image = Image.new(mode, (3, 1))
    if mode == "PA":
        image.putpalette([10, 10, 10])
    for x, alpha in enumerate((0, 255, 51)):
        value = {"LA": (10, alpha), "RGBA": (10, 10, 10, alpha), "PA": (0, alpha)}[mode]
        image.putpixel((x, 0), value)
    assert grey(saved(image, "TIFF")).tolist() == [[255, 10, 206]]  # 10 * 0.2 + 255 * 0.8


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_colours_of_a_file_are_white(kind):
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    image.putpixel((1, 1), (200, 0, 0, 255))
    found = pixels(saved(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert found.tolist() == [[[255] * 3] * 2, [[255] * 3, [200, 0, 0]]]


def test_a_transparent_value_is_white():
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255])
    made = png((3, 1), 8, 3, bytes([0, 1, 2]), PLTE=palette, tRNS=bytes([255, 128, 0]))
    assert pixels(made).tolist() == [[[255, 0, 0], [127, 255, 127], [255, 255, 255]]]
    assert grey(png((3, 1), 8, 0, bytes([0, 100, 200]), tRNS=big(100))).tolist() == [[0, 255, 200]]
    assert grey(png((8, 1), 1, 0, bytes([0b00010000]), tRNS=big(0))).tolist() == [[255] * 8]
    row = bytes([1, 2, 3, 4, 5, 6])
    assert pixels(png((2, 1), 8, 2, row, tRNS=big(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]
    assert grey(png((3, 1), 16, 0, big(0, 30000, 40000), tRNS=big(30000))).tolist() == [[0, 255, 156]]


@pytest.mark.parametrize(
    "made",
    [
        png((4, 1), 2, 0, bytes([0b00011011]), tRNS=big(1)),
        png((2, 1), 4, 0, bytes([0x1F]), tRNS=big(1)),
        png((2, 1), 16, 2, big(1, 2, 3, 4, 5, 6), tRNS=big(1, 2, 3)),
    ],
    ids=["2 bits", "4 bits", "colours of 16 bits"],
)
def test_a_transparent_value_that_pillow_misses_is_refused(made):
    with pytest.raises(ValueError, match="x cannot be decoded: .* with a transparent colour"):
        decode_image(made, "x")


@pytest.mark.parametrize(
    "made, message",
    [
        (saved(Image.new("F", (2, 2), 0.5), "TIFF"), "samples are 'F'"),
        (saved(Image.new("I", (2, 2), 70), "TIFF"), "samples are signed"),
        (tiff("<", 1, 32, struct.pack("<f", 0.5), form=3), "samples are 'F'"),
        (tiff("<", 1, 32, bytes(4)), "samples are 'I'"),
        (tiff("<", 2, 16, struct.pack("<hh", -1, 1), form=2), "samples are signed"),
        (tiff("<", 2, 8, b"\xff\1", form=2), "samples are signed"),
        (fits(struct.pack(">hh", -1, 25500)), "samples are signed"),
        (
            tiff("<", 1, 32, struct.pack("<fff", 0, 1, 2), samples=3, photometric=2, form=3),
            "it is no image that Pillow knows",
        ),
        (b"<svg/>", "it is no image that Pillow knows"),
        (b"", "it is no image that Pillow knows"),
        (b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5), "samples are 'F'"),
        (saved(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "PNG"), "transparent everywhere"),
        (saved(Image.new("RGB", (2, 2)), "EPS"), "PostScript"),
    ],
    ids=itertools.count(),
)
def test_what_is_refused(made, message):
    with pytest.raises(ValueError, match=f"x cannot be decoded: .*{message}"):
        decode_image(made, "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    whole = saved(Image.fromarray(noise), kind)
    assert pixels(whole).std() > 30
    for part in (whole[: len(whole) // 2], whole[:30], whole[: -len(whole) // 8]):
        with pytest.raises(ValueError, match="x cannot be decoded"):
            decode_image(part, "x")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_taken(kind):
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    options = {"lossless": True} if kind == "WEBP" else {}
    made = saved(red, kind, save_all=True, append_images=[blue], **options)
    assert (pixels(made) == [255, 0, 0]).all()


def test_other_modes():
    assert (pixels(saved(Image.new("1", (8, 1), 1), "PNG")) == 255).all()
    assert (pixels(saved(Image.new("1", (8, 1), 0), "PNG")) == 0).all()
    for kind in ("TIFF", "JPEG"):
        cmyk = pixels(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))
        assert np.abs(cmyk.astype(int) - [255, 0, 0]).max() <= 2  # no cyan, no black
    blue = pixels(saved(Image.new("RGB", (4, 4), (0, 128, 255)).convert("YCbCr"), "TIFF"))
    assert np.abs(blue.astype(int) - [0, 128, 255]).max() <= 3


@pytest.mark.parametrize("orientation, first", [(3, 65535), (6, 0), (8, 65535)])
def test_16_bits_stand_upright(orientation, first):
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide = np.array([[0, 65535]], np.uint16)
    found = grey(saved(Image.fromarray(wide), "PNG", exif=exif))
    assert found.shape == ((1, 2) if orientation == 3 else (2, 1))
    assert found.ravel().tolist() == [first // 257, 255 - first // 257]


def test_bombs_are_refused(monkeypatch):
    made = saved(Image.new("RGB", (20, 10)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # Pillow warns
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="x cannot be decoded: it has 20 x 10 pixels, expected at most 150"),
    ):
        decode_image(made, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)  # Pillow refuses
    with pytest.raises(ValueError, match="x cannot be decoded: .*200 pixels.* exceeds limit"):
        decode_image(made, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert decode_image(made, "x").size == (20, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(made, "x").size == (20, 10)
