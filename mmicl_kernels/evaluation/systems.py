"""What is compared: the model alone, after demonstrations, with each adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.base import DESCRIPTION_FILE

PROMPT = ("template", "instruction", "image_marker")  # what training.json keeps of a PromptBuilder
NAME = re.compile(r"\w[\w.-]*")
# What the folder of an evaluation has beside a folder for each row.
RESULTS, TABLE, PLOT, FEATURES, BANKS = "results.json", "table.md", "scores.png", "features", "banks"


@dataclass(frozen=True)
class System:
    """A row of the table: how the model is asked.

    Attributes:
        adapter: its name, or None for the model alone. shots: demonstrations before each query.
        fused: whether the adapter fuses them into tokens.
    """

    adapter: str | None
    shots: int
    fused: bool = False

    @property
    def name(self) -> str:
        shown = f"{self.shots} fused" if self.fused else f"{self.shots}-shot"
        if self.adapter is None:
            return shown if self.shots else "zero-shot"
        return f"{self.adapter}, {shown}" if self.shots else self.adapter

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")


def systems_of(
    adapters: Mapping[str, Adapter], shots: Sequence[int], adapter_shots: Sequence[int]
) -> list[System]:
    """The model alone with each of ``shots``, each adapter with each of ``adapter_shots``, or, if it fuses
    demonstrations, with each of ``shots`` as fused tokens.

    Raises:
        TypeError: shots are no sequence. ValueError: they are negative or repeated, an adapter has no
        demonstrations to fuse, a name has other characters than a file's may, two rows would have one name,
        or one that of a file.
    """
    for name, counts in (("shots", shots), ("adapter_shots", adapter_shots)):
        if not isinstance(counts, Sequence):
            raise TypeError(f"{name} is {counts!r}, expected a list of numbers, such as (0, 4)")
        whole = all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in counts)
        if not whole or len(set(counts)) < len(counts):
            raise ValueError(f"{name} is {list(counts)}, expected different numbers of at least 0")
    made = [System(None, k) for k in shots]
    for name, adapter in adapters.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"adapter {name!r}, expected a name of letters, digits, '_', '-' and '.'")
        if adapter.fuses:
            fused = [System(name, k, fused=True) for k in shots if k]
            if not fused:
                raise ValueError(f"shots is {list(shots)}, expected one above 0 for {name!r} to fuse")
            made += fused
        else:
            made += [System(name, k) for k in adapter_shots]
    if not made:
        raise ValueError("shots and adapters are empty, expected something to evaluate")
    folders = [x.folder.casefold() for x in made]
    twice = [x.name for x in made if folders.count(x.folder.casefold()) > 1]
    taken = {RESULTS, TABLE, PLOT, FEATURES, BANKS}.intersection(folders)
    if taken:
        raise ValueError(f"an adapter's name is {', '.join(sorted(taken))}, which is a file of the results")
    if twice:
        raise ValueError(f"adapters make the rows {', '.join(twice)}, expected names that differ")
    return made


def trained_prompt(folders: Mapping[str, Path]) -> dict[str, str | None] | None:
    """How the prompts were written that adapters were trained on, as their ``training.json`` has it.

    Adapters without one do not count; None if there is none at all.

    Raises ValueError: two of them disagree, or such a file is damaged.
    """
    found: dict[str, dict[str, str | None]] = {}
    for name, folder in folders.items():
        file = folder / DESCRIPTION_FILE
        if file.is_file():
            prompt = _prompt(file)
            if prompt is not None:
                found[name] = prompt
    others = [name for name, prompt in found.items() if prompt != next(iter(found.values()))]
    if others:
        first = next(iter(found))
        raise ValueError(
            f"adapters {first!r} and {others[0]!r} were trained on prompts {found[first]} and "
            f"{found[others[0]]}, expected the same ones: give a template, or evaluate them one by one"
        )
    return next(iter(found.values()), None)


def _prompt(file: Path) -> dict[str, str | None] | None:
    try:
        stored: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}, expected JSON") from error
    prompt = stored.get("prompt") if isinstance(stored, dict) else stored
    if prompt is None:
        return None
    texts = isinstance(prompt, dict) and all(x is None or isinstance(x, str) for x in prompt.values())
    if not texts or not set(prompt) <= set(PROMPT) or not isinstance(prompt.get("template"), str):
        raise ValueError(f"{file}: prompt is {prompt!r:.200}, expected texts for {', '.join(PROMPT)}")
    return {name: prompt.get(name) for name in PROMPT}
