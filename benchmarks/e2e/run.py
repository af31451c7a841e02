"""A real-size Idefics2 end to end: ``python -m benchmarks.e2e.run --size real --device cuda --out FOLDER``.

Random weights, made on the device from the sizes of Idefics2-8B: time and memory do not depend on values,
and nothing is downloaded. Batch 1, an answer of 20 tokens, of which the first is timed apart. Compared are
the model without a shift ("plain"), MimIC as its authors publish it, and MimIC as this library runs it.

Prompts are text where rows do not say otherwise: the three differ in the decoder alone, and there a token
of an image costs what any token costs. Rows with images read them too, one for the question and one for
each demonstration: the whole price of demonstrations. Modes:

    eager     a dynamic cache, and every operation launched from Python
    graph     a static cache, and each token a CUDA graph of what PyTorch would launch
    compiled  a static cache, and each token one graph of torch.compile with mode="reduce-overhead"
    beams     generate with three beams, as published times are of it
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from tqdm import tqdm

from benchmarks.e2e.check import Checks, make_checks
from benchmarks.e2e.decoding import MODES, NEW_TOKENS, Beams, Decoder, Stopwatch
from benchmarks.e2e.models import SIZES, Prompt, Size, Subject, build_model, prompt_inputs, random_adapter
from benchmarks.e2e.report import plot, rich_table
from benchmarks.harness.timing import Samples, machine, peak_allocated_bytes
from benchmarks.run import device_folder

SCHEMA = 1
SECONDS = 15.0  # of timing for one block, all its variants together
MIN_ROUNDS, MAX_ROUNDS = 5, 50
DTYPE = torch.bfloat16
OURS = "ours"
LOG_WIDTH = 140


@dataclass(frozen=True)
class Entry:
    """One row: a variant that answers a prompt in a mode."""

    variant: str
    mode: str
    prompt: Prompt


@dataclass(frozen=True)
class Block:
    """Rows that are measured together, round by round. Ratios are to the first."""

    name: str
    entries: tuple[Entry, ...]


def plan(size: Size, ours: Sequence[str]) -> list[Block]:
    """All blocks, the most valuable first."""
    zero, *many = (Prompt(shots, tokens) for shots, tokens in size.lengths.items())
    photo, *album = (replace(prompt, images=prompt.shots + 1) for prompt in (zero, *many))
    everyone, unpublished = ("plain", *ours, "published"), ("plain", *ours)

    def block(mode: str, variants: Sequence[str], prompt: Prompt) -> Block:
        name = f"{mode}, {prompt.tokens} tokens"
        name += f", {prompt.images} images" if prompt.images else ""
        name += f", {variants[0]}" if len(variants) == 1 else ""
        return Block(name, tuple(Entry(variant, mode, prompt) for variant in variants))

    def demonstrations(name: str, without: Prompt, shown: Sequence[Prompt]) -> Block:
        return Block(name, (Entry(ours[0], "eager", without), *(Entry("plain", "eager", p) for p in shown)))

    return [
        block("eager", everyone, zero),
        block("graph", everyone, zero),
        block("compiled", unpublished, zero),
        demonstrations("demonstrations", zero, many),
        block("eager", everyone, photo),
        demonstrations("demonstrations with images", photo, album),
        block("beams", everyone, zero),
        *(block("eager", everyone, prompt) for prompt in many),
        *(block("graph", unpublished, prompt) for prompt in many),
        block("compiled", ("published",), zero),
        *(block("compiled", unpublished, prompt) for prompt in many),
    ]


@dataclass
class Session:
    """What all blocks share. ``right``: what the check said of a variant in a mode."""

    size: Size
    device: str
    subject: Subject
    checks: Checks
    seconds: float
    deadline: float
    result: dict
    path: Path
    right: dict[tuple[str, str], bool] = field(default_factory=dict)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")

    def has_time_for(self, block: Block) -> bool:
        compiled = sum(entry.mode == "compiled" for entry in block.entries)
        return time.monotonic() + compiled * self.size.compile_seconds < self.deadline


@dataclass
class Candidate:
    """An entry while its block is measured: how it decodes, its row, its milliseconds."""

    entry: Entry
    row: dict
    decoder: Decoder | Beams | None = None
    first: list[float] = field(default_factory=list)
    further: list[float] = field(default_factory=list)

    def fail(self, error: Exception) -> None:
        self.row["error"] = f"{type(error).__name__}: {error}"[:2000]
        self.decoder = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure block after block, save JSON after each, print a table, plot. Returns 1 if ours failed."""
    started = time.monotonic()
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    size = SIZES[options.size]
    model = build_model(size, device=options.device, dtype=DTYPE)
    result = _new_result(options, model)
    console.print(f"{result['parameters'] / 1e9:.2f} billion parameters, {time.monotonic() - started:.0f} s")
    path = options.json or options.out / device_folder(result["machine"], options.device) / "e2e.json"

    impls = {OURS if impl == "auto" else f"{OURS} {impl}": impl for impl in options.impl}
    checks = make_checks(model, size, impls, device=options.device)
    result["checks"] = checks.verdicts
    adapter = random_adapter(model, keys=size.lengths[0])
    with Subject(model, adapter, impls) as subject:
        deadline = started + options.budget
        session = Session(size, options.device, subject, checks, options.seconds, deadline, result, path)
        _measure_all(session, plan(size, tuple(impls)))
    result["seconds"] = time.monotonic() - started
    session.save()
    plot(result, path.with_suffix(".png"))
    console.print(rich_table(result))
    console.print(f"saved {path} and {path.with_suffix('.png')}")
    return 1 if _ours_failed(result) else 0


def _measure_all(session: Session, blocks: Sequence[Block]) -> None:
    result = session.result
    with tqdm(blocks, desc="e2e", unit="block") as bar:
        for block in bar:
            bar.set_postfix_str(block.name)
            if session.has_time_for(block):
                result["rows"] += _measure_block(session, block)
            else:
                result["left_out"].append(block.name)
            session.save()


def _measure_block(session: Session, block: Block) -> list[dict]:
    """One row per entry."""
    candidates = [Candidate(entry, _new_row(block, entry)) for entry in block.entries]
    for candidate in candidates:
        _set_up(session, candidate)
    _take_turns(session, [c for c in candidates if c.decoder is not None])
    base = candidates[0]
    for candidate in candidates:
        _summarise(session, candidate, base)
        candidate.decoder = None  # frees its cache and its graph before the next block's
    torch._dynamo.reset()
    _collect(session.device)
    return [candidate.row for candidate in candidates]


def _set_up(session: Session, candidate: Candidate) -> None:
    """Make the decoder, warm it up, note its memory, and check its logits if the prompt is the checks'."""
    entry, row = candidate.entry, candidate.row
    try:
        session.subject.use(entry.variant)
        inputs = prompt_inputs(session.size, entry.prompt, device=session.device, dtype=DTYPE)
        decoder, start = MODES[entry.mode](session.subject.model, inputs), time.monotonic()
        row["peak_bytes"] = _peak_bytes(decoder, session.device)
        row["set_up_s"] = time.monotonic() - start
        checkable = entry.prompt == session.checks.prompt and isinstance(decoder, Decoder)
        if checkable and (entry.variant, entry.mode) not in session.right:
            session.right[entry.variant, entry.mode] = session.checks.judge(entry.variant, decoder)
        candidate.decoder = decoder
    except Exception as error:  # out of memory, or the compiler: recorded, and the others go on
        candidate.fail(error)
    if candidate.decoder is None:
        _collect(session.device)


def _peak_bytes(decoder: Decoder | Beams, device: str) -> int:
    """The most that was allocated above what is held now; on CUDA what the decoder keeps is in it."""
    stopwatch = Stopwatch(device)
    if device != "cuda":
        return peak_allocated_bytes(lambda: decoder.sample(stopwatch))
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder.sample(stopwatch)
    return torch.cuda.max_memory_allocated() - held


def _take_turns(session: Session, candidates: list[Candidate]) -> None:
    """Sample every candidate once a round, each round in another order; the first round warms up."""
    stopwatch = Stopwatch(session.device)
    rounds, number = MIN_ROUNDS, 0
    while number <= rounds and candidates:
        start = time.monotonic()
        if number > 1 and start > session.deadline:
            break
        offset = number % len(candidates)
        for candidate in candidates[offset:] + candidates[:offset]:
            _sample(session, candidate, stopwatch, keep=number > 0)
        if any(candidate.decoder is None for candidate in candidates):
            candidates = [candidate for candidate in candidates if candidate.decoder is not None]
        if number == 1:
            rounds = min(max(round(session.seconds / (time.monotonic() - start)), MIN_ROUNDS), MAX_ROUNDS)
        number += 1


def _sample(session: Session, candidate: Candidate, stopwatch: Stopwatch, *, keep: bool) -> None:
    session.subject.use(candidate.entry.variant)
    try:
        first, further = candidate.decoder.sample(stopwatch)
    except Exception as error:  # as in _set_up
        candidate.fail(error)
        return
    if keep:
        candidate.first.append(first)
        candidate.further.append(further)


def _new_row(block: Block, entry: Entry) -> dict:
    row = {"block": block.name, "variant": entry.variant, "mode": entry.mode, **asdict(entry.prompt)}
    return {**row, "right": False, "ratio": None, "error": None}


def _summarise(session: Session, candidate: Candidate, base: Candidate) -> None:
    """Medians, spread and, where both are right, ratios to ``base``."""
    row = candidate.row
    row["right"] = _is_right(session, candidate.entry)
    if row["error"] or not candidate.first:
        return
    samples = {"first_token": Samples(tuple(candidate.first)), "token": Samples(tuple(candidate.further))}
    row["rounds"] = len(candidate.first)
    for name, sample in samples.items():
        row |= {f"{name}_ms": sample.median, f"{name}_q10_ms": sample.low, f"{name}_q90_ms": sample.high}
    if base.row["error"] or not (row["right"] and _is_right(session, base.entry)):
        return
    row["ratio"] = {
        "variant": base.entry.variant,
        "shots": base.entry.prompt.shots,
        "first_token": samples["first_token"].ratio(Samples(tuple(base.first))),
        "token": samples["token"].ratio(Samples(tuple(base.further))),
    }


def _is_right(session: Session, entry: Entry) -> bool:
    """By the check in this mode; where there was none, in eager."""
    eager = session.right.get((entry.variant, "eager"), False)
    return session.right.get((entry.variant, entry.mode), eager)


def _ours_failed(result: dict) -> bool:
    rows = [row for row in result["rows"] if row["variant"].startswith(OURS)]
    checks = [check for check in result["checks"] if check["variant"].startswith(OURS)]
    return any(row["error"] or not row["right"] for row in rows) or any(not c["right"] for c in checks)


def _new_result(options: argparse.Namespace, model: transformers.PreTrainedModel) -> dict:
    return {
        "schema": SCHEMA,
        "benchmark": "e2e",
        "size": options.size,
        "device": options.device,
        "dtype": str(DTYPE).removeprefix("torch."),
        "new_tokens": NEW_TOKENS,
        "parameters": sum(x.numel() for x in model.parameters()),
        "model_bytes": sum(x.nbytes for x in model.parameters()),
        "machine": {**machine(options.device), "transformers": transformers.__version__},
        "command": options.command,
        "checks": [],
        "rows": [],
        "left_out": [],
    }


def _collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.e2e.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="real", help="tiny: to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--json", type=Path, metavar="FILE", help="write here, and a plot beside it")
    target.add_argument("--out", type=Path, metavar="FOLDER", help="write to FOLDER/<device>/e2e.json")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="start no block after"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing for each block")
    parser.add_argument(
        "--impl", nargs="+", default=["auto"], choices=("auto", "composed", "triton"), help="of ours"
    )
    return parsed(parser, arguments)


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the ``command`` itself among them; an error if the device is not there."""
    options = parser.parse_args(arguments)
    options.command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    return options


if __name__ == "__main__":
    sys.exit(main())
