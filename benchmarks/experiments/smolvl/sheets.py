"""Makes the sheets of pictures from the packages they come from: ``python -m ...smolvl.sheets FOLDER``.

``FOLDER`` has ``emoji-datasource-google-16.0.0.tgz`` and ``emoji-datasource-twitter-16.0.0.tgz``, as
``npm pack`` brings them. Nobody who uses the pictures needs them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import tarfile
from pathlib import Path

from PIL import Image

from benchmarks.experiments.smolvl.pictures import COLUMNS, DRAWINGS, LIST, SIDE, sheet

SHA256 = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
# Kinds, and the subcategories of Unicode that they are made of.
KINDS = {
    "animal": (
        "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug",
    ),
    "food": ("food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet"),
    "clothes": ("clothing",),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "plant": ("plant-flower", "plant-other"),
    "drink": ("drink",),
    "building": ("place-building", "place-religious"),
    "music": ("musical-instrument", "music"),
    "sport": ("sport",),
    "tool": ("tool", "writing"),
    "weather": ("sky & weather",),
    "furniture": ("household",),
    "phone": ("phone", "computer"),
    "game": ("game",),
    "face": (
        "face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy",
        "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative",
    ),
    "other": (
        "other-object", "light & video", "lock", "mail", "office", "science", "medical", "book-paper", "time",
        "award-medal", "event", "arts & crafts", "sound", "place-other", "place-geographic", "place-map",
        "hotel", "money",
    ),
}  # fmt: skip
# What a picture shows a part of, or what is of its subcategory and not of the kind.
_LEFT_OUT = """
pig nose, feet, feather, wing, spider web, microbe, shell, coral, hatched chick, baby chick, guide dog,
service dog, rosette, wilted flower, empty nest, nest with eggs, salt, cooking, shallow pan of food, bowl
with spoon, canned food, ice cube, pouring liquid, fuelpump, rotating light, traffic light, vertical traffic
light, octagonal sign, construction, busstop, motorway, railway track, oil drum, wheel, seat, luggage,
anchor, ring buoy, parachute, station, airplane departure, airplane arriving, building construction, bricks,
rock, wood, love hotel, kaaba, gem, lipstick, prayer beads, hair pick, folding hand fan, shopping bags,
manual wheelchair, mountain cableway, aerial tramway, suspension railway, wedding, statue of liberty,
satellite, compression, link, chains, broken chain, scales, probing cane, birthday, takeout box, chestnut,
unicorn face, phoenix, dragon, dragon face, sauropod, t-rex, mammoth, snail, womans clothes, running shirt
with sash, boomerang, crossed swords
"""
LEFT_OUT = {name.strip() for name in " ".join(_LEFT_OUT.split()).split(",")}
SEED = 0


def concepts(rows: list[dict]) -> list[dict]:
    """Which of the package's emoji are taken, with their names and kinds, in Unicode's order."""
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    taken: dict[str, dict] = {}
    for row in sorted(rows, key=lambda x: x["sort_order"]):
        short = row["short_name"].replace("_", " ")
        kind = kind_of.get(row["subcategory"])
        if kind is None or not (row["has_img_google"] and row["has_img_twitter"]):
            continue
        if short in LEFT_OUT or re.search(r"\d|^oncoming", short):
            continue
        name = re.sub(r"^(mans|womans) ", "", short)
        name = name.removesuffix(" face") if kind == "animal" else name
        taken.setdefault(name, {"name": name, "kind": kind, "file": row["image"]})
    return list(taken.values())


def split(kept: list[dict]) -> None:
    """Say of each what it is for: of a kind a third is for tests and a sixth for validation."""
    generator = random.Random(SEED)
    for kind in KINDS:
        own = [x for x in kept if x["kind"] == kind]
        generator.shuffle(own)
        third, half = len(own) // 3, len(own) // 2
        for i, x in enumerate(own):
            x["split"] = "test" if i < third else "validation" if i < half else "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    kept: list[dict] = []
    for drawing in DRAWINGS:
        archive = folder / f"emoji-datasource-{drawing}-16.0.0.tgz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256[drawing]:
            raise ValueError(f"{archive} has SHA-256 {found}, expected {SHA256[drawing]}")
        with tarfile.open(archive) as packed:
            if not kept:
                kept = concepts(json.load(packed.extractfile("package/emoji.json")))
                split(kept)
            drawn = Image.new("RGBA", (COLUMNS * SIDE, -(-len(kept) // COLUMNS) * SIDE))
            for i, x in enumerate(kept):
                file = packed.extractfile(f"package/img/{drawing}/{SIDE}/{x['file']}")
                picture = Image.open(io.BytesIO(file.read())).convert("RGBA")
                drawn.paste(picture, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
        drawn.save(sheet(drawing), quality=85, method=6)
    lines = [json.dumps({name: x[name] for name in ("name", "kind", "split")}) for x in kept]
    LIST.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
