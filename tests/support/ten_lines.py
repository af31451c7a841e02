"""What the README's ten lines find in their folder: a model, its processor, files of examples."""

from pathlib import Path

from tests.support.records_of_colours import write_records


def prepare(folder: Path, model, processor, count: int = 50) -> None:
    model.save_pretrained(folder / "my-lvlm")
    processor.save_pretrained(folder / "my-lvlm")
    write_records(folder, count)
    write_records(folder, 6, "test.jsonl")


def shortened(text: str) -> str:
    """The lines, or the command, with few updates: seconds instead of minutes."""
    return text.replace("shots=8, out", "shots=8, steps=6, out").replace("--shots 8", "--shots 8 --steps 6")
