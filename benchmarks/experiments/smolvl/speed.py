"""First token and further ones of the real model on a CPU, against the length of the prompt.

``python -m benchmarks.experiments.smolvl.speed --out FOLDER`` writes ``model.json``: the plain model, and
adapters of each method that were not trained, which cost the same, on prompts of 0 to 16 demonstrations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.harness.timing import machine, peak_allocated_bytes
from benchmarks.layers import drawn
from benchmarks.run import device_folder
from mmicl_kernels.data import as_records
from mmicl_kernels.evaluation.asking import fusing_builder
from mmicl_kernels.methods import AIMAdapter

from . import tasks
from .model import load_model, load_processor

SHOTS = (0, 4, 8, 16)
ROUNDS, FURTHER_TOKENS = 7, 8
TOKENS_FUSED = 2  # of a demonstration of "kind": an answer of one token, and the break after it
CONFIGS = {"MimIC": mk.MimICConfig(), "LIVE": mk.LIVEConfig(), "M2IV": mk.M2IVConfig()}


@dataclass(frozen=True)
class Way:
    """What is attached to the model while it is asked, and the prompt of a query then."""

    attached: Callable[[], AbstractContextManager]
    inputs: Callable[[mk.Handle | None], dict]


def costs(model: nn.Module, ways: Mapping[str, Way], rounds: int) -> dict[str, tuple[float, float, int]]:
    """Medians of time to first token and per further one, and peak bytes; the ways take turns, as machines
    drift."""
    first, further, peaks = ({name: [] for name in ways} for _ in range(3))
    for number in tqdm(range(rounds + 1), desc="timing", unit="round"):
        for name, way in ways.items():
            with way.attached() as handle:
                if number == 0:  # which warms up
                    peaks[name].append(peak_allocated_bytes(partial(_generate, model, way, handle, 1)))
                    continue
                one, many = (_seconds(model, way, handle, n) for n in (1, 1 + FURTHER_TOKENS))
                first[name].append(1e3 * one)
                further[name].append(1e3 * (many - one) / FURTHER_TOKENS)
    medians = (statistics.median(first[x]) for x in ways), (statistics.median(further[x]) for x in ways)
    return dict(zip(ways, zip(*medians, (peaks[x][0] for x in ways), strict=True), strict=True))


def _seconds(model: nn.Module, way: Way, handle: mk.Handle | None, tokens: int) -> float:
    start = time.perf_counter()
    _generate(model, way, handle, tokens)
    return time.perf_counter() - start


def _generate(model: nn.Module, way: Way, handle: mk.Handle | None, tokens: int) -> None:
    model.generate(**way.inputs(handle), min_new_tokens=tokens, max_new_tokens=tokens)


def bank_of(
    model: nn.Module,
    prompts: mk.PromptBuilder,
    adapter: AIMAdapter,
    shown: Sequence[mk.Demonstration],
    folder: Path,
) -> tuple[mk.DemonstrationBank, list[int]]:
    """With ``shown``, and their ids."""
    bank = mk.DemonstrationBank.create(folder, adapter, dtype=torch.float32)
    collate = fusing_builder(prompts, adapter).demonstrations
    with mk.attach(model, adapter, bank=bank) as handle:
        return bank, handle.add_demonstrations(shown, collate, batch_size=len(shown), progress=False)


def measure(rounds: int) -> list[dict]:
    """A row for each way and number of shots; AIM's prompt has the shots as fused tokens."""
    model, prompts = load_model(), tasks.task_prompts(load_processor())
    query, *shown = (x.demonstration() for x in as_records(tasks.records("kind", "train"))[: max(SHOTS) + 1])
    adapters = {name: drawn(mk.create(model, config)) for name, config in CONFIGS.items()}
    rows = []
    with TemporaryDirectory() as folder:
        fuser = mk.create(model, mk.AIMConfig(positions="answer_end"))
        bank, ids = bank_of(model, prompts, fuser, shown, Path(folder) / "bank")
        for shots in SHOTS:
            inputs, alone = prompts.prompt([query], [shown[:shots]]), prompts.prompt([query])
            attached = {
                "plain": nullcontext,
                **{n: partial(mk.attach, model, x) for n, x in adapters.items()},
            }
            ways = {name: Way(attach, lambda _, inputs=inputs: inputs) for name, attach in attached.items()}
            tokens = dict.fromkeys(ways, inputs["input_ids"].shape[1])
            if shots:
                splice = partial(_spliced, alone, ids[:shots])
                ways["AIM, fused"] = Way(partial(mk.attach, model, fuser, bank=bank), splice)
                tokens["AIM, fused"] = alone["input_ids"].shape[1] + shots * TOKENS_FUSED
            for name, (first, further, peak) in costs(model, ways, rounds).items():
                row = {"name": name, "shots": shots, "tokens": tokens[name]}
                rows.append({**row, "first_ms": first, "further_ms": further, "peak_bytes": peak})
    return rows


def _spliced(alone: dict, ids: list[int], handle: mk.Handle) -> dict:
    return handle.splice(alone, [ids])


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| | shots | prompt tokens | first token ms | further token ms | peak MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {x['name']} | {x['shots']} | {x['tokens']} | {x['first_ms']:.0f} | {x['further_ms']:.1f} | "
        f"{x['peak_bytes'] / 2**20:.0f} |"
        for x in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    rows = measure(options.rounds)
    print(table(rows))
    results = {"machine": machine("cpu"), "rows": rows}
    folder = options.out / device_folder(results["machine"], "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
