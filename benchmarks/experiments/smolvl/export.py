"""Model and tasks as files, for the commands: ``python -m benchmarks.experiments.smolvl.export FOLDER``.

    mmicl eval --import benchmarks.experiments.smolvl.vision --model FOLDER/model \\
        --template $'{image}{text}\\nAnswer: {answer}\\n\\n' --instruction '<|endoftext|>' \\
        --data FOLDER/kind/test.jsonl --demonstrations FOLDER/kind/train.jsonl --shots 0 4 16
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .model import load_model, load_processor
from .tasks import SPLITS, TASKS, records


def export_model(folder: Path) -> None:
    """As ``save_pretrained`` writes it, 560 MB."""
    load_model().save_pretrained(folder)
    load_processor().save_pretrained(folder)


def export_task(task: str, folder: Path) -> None:
    """JSON lines of each split, and the pictures beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = []
        for i, row in enumerate(records(task, split)):
            row = dict(row)
            if "image" in row:
                name = f"{split}-{i:03}.png"
                (folder / name).write_bytes(row["image"])
                row["image"] = name
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    export_model(folder / "model")
    for task in TASKS:
        export_task(task, folder / task)


if __name__ == "__main__":
    main()
