"""Examples on disk whose answers, of several lengths, are in their images' colours."""

import json

from PIL import Image

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "dog or cat": (0, 255, 0)}


def write_records(folder, count=12, name="train.jsonl"):
    lines = []
    for i in range(count):
        answer = list(COLOURS)[i % 3]
        Image.new("RGB", (9 + i, 7), COLOURS[answer]).save(folder / f"{i}.png")
        lines.append({"id": f"r{i}", "image": f"{i}.png", "text": "what?", "answer": answer})
    path = folder / name
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path
