"""A model and its processor from a folder, for commands."""

from pathlib import Path
from typing import Any


def load_pretrained(folder: str) -> tuple[Any, Any]:
    """Model, in eval mode on the GPU if there is one, and processor. Raises FileNotFoundError."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--model: {folder} does not exist, expected a folder")
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor
