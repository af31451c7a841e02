"""What adapters cost a decoder at real layer sizes: to the first token, and for each further one.

``python -m benchmarks.layers --out FOLDER`` writes ``FOLDER/<device>/layers.json``. The plain decoder, ours
and the official formulation share their weights and take turns, token by token. With ``--compare FILE`` the
table has the ratios of that earlier run, too; ``--profile VARIANT`` prints where a token's time goes instead.
"""

import argparse
import copy
import cProfile
import json
import pstats
import statistics
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, StaticCache

import mmicl_kernels as mk
from benchmarks.harness.decoders import decoder, machine_line, new_result, path_of, quantiles, save, shown
from benchmarks.harness.tables_cuda import MIB
from benchmarks.harness.timing import (
    MAX_ROUNDS,
    WARM_UPS,
    Samples,
    machine,
    peak_allocated_bytes,
    time_interleaved,
)
from benchmarks.peers import published

VOCABULARY = 512  # small, so that the layers are what is measured
PADDING = 8


@dataclass(frozen=True)
class Cell:
    """One decoder and its prompts. ``padded``: on the left, so that there is a mask."""

    hidden: int
    heads: int
    kv_heads: int
    layers: int
    dtype: str
    batch: int
    padded: bool
    compiled: bool = False
    prompt: int = 128

    def model(self) -> nn.Module:
        sizes = (self.hidden, self.heads, self.kv_heads, self.layers)
        return decoder(*sizes, vocabulary=VOCABULARY, dtype=self.dtype)

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, VOCABULARY, (self.batch, self.prompt), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : PADDING if self.padded else 0] = 0
        return {"input_ids": ids, "attention_mask": mask}


SMALL, MEDIUM, LARGE = (576, 9, 3, 8), (2048, 32, 8, 4), (4096, 32, 8, 4)
CELLS = (
    Cell(*SMALL, "float32", 1, False), Cell(*SMALL, "float32", 1, True), Cell(*SMALL, "float32", 8, True),
    Cell(*SMALL, "bfloat16", 1, False), Cell(*MEDIUM, "float32", 1, False),
    Cell(*MEDIUM, "bfloat16", 1, True), Cell(*LARGE, "float32", 1, False),
    Cell(*SMALL, "float32", 1, False, compiled=True), Cell(*MEDIUM, "float32", 1, False, compiled=True),
)  # fmt: skip
QUICK = (Cell(32, 4, 2, 2, "float32", 2, True, prompt=16),)
OURS = {
    "MimIC": mk.MimICConfig(), "MimIC, all_keys": mk.MimICConfig(normalizer="all_keys"),
    "HiFICL": mk.HiFICLConfig(), "M2IV": mk.M2IVConfig(), "LIVE": mk.LIVEConfig(),
}  # fmt: skip
OFFICIAL = "official MimIC"


def shared_copy(model: nn.Module) -> nn.Module:
    """Another model with the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in tensors})


def drawn(adapter: nn.Module) -> nn.Module:
    """With no parameter that is zero, of which something could be left out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in adapter.parameters():
            x.add_(torch.empty(x.shape).uniform_(0.001, 0.01, generator=generator))
    return adapter


def created(model: nn.Module, config: object) -> nn.Module:
    """The same adapter whenever it is asked for."""
    torch.manual_seed(0)
    return drawn(mk.create(model, config)).requires_grad_(False)


def variants(model: nn.Module, cell: Cell, patched: ExitStack) -> dict[str, nn.Module]:
    """The plain model and its patched copies, until ``patched`` is closed."""
    models = {"plain": model}
    for name, config in OURS.items():
        models[name] = shared_copy(model)
        patched.enter_context(mk.attach(models[name], created(model, config)))
    if not cell.compiled:  # it counts a static cache's empty rows
        models[OFFICIAL] = shared_copy(model)
        adapter = created(model, OURS["MimIC"]).to(model.dtype)
        patched.enter_context(published(models[OFFICIAL], adapter))
    return models


class Answer:
    """One model's answer to the cell's prompts, token by token."""

    def __init__(self, model: nn.Module, cell: Cell, tokens: int) -> None:
        self._model, self._cell, self._room = model, cell, cell.prompt + tokens + 1
        self._step = _compiled(model.model) if cell.compiled else model.model.forward
        self.begin()

    def begin(self) -> None:
        """Read the prompt anew."""
        config, inputs = self._model.config, self._cell.inputs()
        static = self._cell.compiled
        self._cache = StaticCache(config, max_cache_len=self._room) if static else DynamicCache(config=config)
        self._mask = inputs["attention_mask"]
        ids, keep = inputs["input_ids"], {"logits_to_keep": 1, "use_cache": True}
        logits = self._model(ids, attention_mask=self._mask, past_key_values=self._cache, **keep).logits
        self._token = logits.argmax(-1)
        self._mask = None if static else self._mask

    def __call__(self) -> None:
        """One token more."""
        if not self._cell.compiled:  # where nothing is padded, and a mask that grows is another graph
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        given = {"attention_mask": self._mask, "past_key_values": self._cache, "use_cache": True}
        hidden = self._step(input_ids=self._token, **given).last_hidden_state
        self._token = self._model.lm_head(hidden[:, -1:]).argmax(-1)


def _compiled(decoder: nn.Module) -> Callable:
    """Its forward, compiled as code of its own: else each call looks through the graphs of all decoders."""
    forward = decoder.forward.__func__
    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, None, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return torch.compile(types.MethodType(own, decoder), fullgraph=True)


@torch.no_grad()
def measure(cell: Cell, seconds: float) -> list[dict]:
    """A row for each variant: its times, their ratios to plain in the same round, and a peak."""
    with ExitStack() as patched:
        models = variants(cell.model(), cell, patched)
        answers = {name: Answer(model, cell, WARM_UPS + MAX_ROUNDS) for name, model in models.items()}
        prompts = {name: x.begin for name, x in answers.items()}
        peaks = {name: peak_allocated_bytes(begin) for name, begin in prompts.items()}
        times = {
            "first": time_interleaved(prompts, device="cpu", seconds=seconds, label="prompts"),
            "further": time_interleaved(answers, device="cpu", seconds=seconds, label="tokens"),
        }
    now = machine("cpu")
    made = {"commit": now["commit"], "date": now["date"]}
    return [
        {"variant": name, **asdict(cell), **made, "peak_bytes": peaks[name], **_times(times, name)}
        for name in models
    ]


def _times(times: dict[str, dict[str, Samples]], name: str) -> dict[str, object]:
    row = {}
    for what, samples in times.items():
        ratio = samples[name].over(samples["plain"])
        row[f"{what}_ms"] = samples[name].median
        row[f"{what}_ratio"] = quantiles(ratio)
        row[f"{what}_rounds"] = len(ratio.ms)
    return row


@torch.no_grad()
def profile(cell: Cell, variant: str, tokens: int = 50) -> str:
    """The functions in which ``tokens`` of a variant spend their own time, in microseconds of a layer."""
    with ExitStack() as patched:
        answer = Answer(variants(cell.model(), cell, patched)[variant], cell, WARM_UPS + tokens)
        for _ in range(WARM_UPS):
            answer()
        profiler = cProfile.Profile()
        with profiler:
            for _ in range(tokens):
                answer()
    share = tokens * cell.layers
    found = sorted(pstats.Stats(profiler).stats.items(), key=lambda item: -item[1][2])[:25]
    lines = [f"{_described(asdict(cell))}, {variant}: of a layer and a token", "    us   calls  function"]
    for (file, line, name), (_, calls, own, _, _) in found:
        where = name if file == "~" else f"{Path(file).name}:{line} {name}"
        lines.append(f"{own / share * 1e6:6.1f}  {calls / share:6.1f}  {where}")
    return "\n".join(lines)


def markdown(result: dict, earlier: dict | None = None) -> str:
    """A line for each cell and variant; with those of an ``earlier`` result beside them."""
    columns = ["first token ms", "to plain", "further token ms", "to plain", "peak MiB of the prompt"]
    columns += ["earlier: first, further"] if earlier else []
    lines = [f"| decoder | variant | {' | '.join(columns)} |", "|---|---|" + "--:|" * len(columns)]
    for row in result["rows"]:
        cells = [f"{row['first_ms']:.1f}", shown(row["first_ratio"])]
        cells += [f"{row['further_ms']:.2f}", shown(row["further_ratio"])]
        cells.append(f"{row['peak_bytes'] / MIB:.0f}")
        cells += [_earlier(row, earlier)] if earlier else []
        lines.append(f"| {_described(row)} | {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{_machine_line(result)}"


def mean_table(result: dict) -> str:
    """For each variant the geometric means of its ratios over the decoders, and their range."""
    kinds = {
        "first token": ("first", lambda row: not row["compiled"]),
        "further token": ("further", lambda row: not row["padded"] and not row["compiled"]),
        "further token, padded": ("further", lambda row: row["padded"]),
        "further token, compiled": ("further", lambda row: row["compiled"]),
    }
    lines = [f"| to plain | {' | '.join(kinds)} |", "|---|" + "--:|" * len(kinds)]
    for name in dict.fromkeys(row["variant"] for row in result["rows"] if row["variant"] != "plain"):
        own, cells = [row for row in result["rows"] if row["variant"] == name], []
        for what, chosen in kinds.values():
            ratios = [row[f"{what}_ratio"][0] for row in own if chosen(row)]
            cells.append(
                shown([statistics.geometric_mean(ratios), min(ratios), max(ratios)]) if ratios else ""
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{_machine_line(result)}"


def tables(result: dict) -> dict[str, str]:
    return {"layers": markdown(result), "layers-mean": mean_table(result)}


def _machine_line(result: dict) -> str:
    rows = result["rows"]
    made = ", ".join(dict.fromkeys(f"commit {row['commit']} of {row['date'][:10]}" for row in rows))
    threads = f"{result['machine']['threads']} threads"
    prompts = ", ".join(dict.fromkeys(str(row["prompt"]) for row in rows))
    return (
        f"{machine_line(result, threads, made)}; medians of "
        f"{_range(result, 'further')} tokens after prompts of {prompts}, which were read "
        f"{_range(result, 'first')} times, in turns; ratios within a round"
    )


def _earlier(row: dict, earlier: dict) -> str:
    keys = ("variant", *Cell.__dataclass_fields__)
    same = [x for x in earlier["rows"] if all(x[key] == row[key] for key in keys)]
    return f"{same[0]['first_ratio'][0]:.2f}, {same[0]['further_ratio'][0]:.2f}" if same else ""


def _range(result: dict, what: str) -> str:
    rounds = [row[f"{what}_rounds"] for row in result["rows"]]
    return f"{min(rounds)} to {max(rounds)}"


def _described(row: dict) -> str:
    parts = [f"{row['hidden']} x {row['layers']}", row["dtype"].replace("float", "fp").replace("bfp", "bf")]
    parts.append(f"batch {row['batch']}")
    parts += [name for name in ("padded", "compiled") if row[name]]
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of prompts, and of tokens, of each decoder"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--resume", action="store_true", help="measure the decoders that the file lacks, and keep the others"
    )
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier layers.json")
    parser.add_argument("--profile", choices=("plain", *OURS, OFFICIAL), metavar="VARIANT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cells: Iterable[Cell] = QUICK if options.quick else CELLS
    if options.profile:
        print(profile(next(iter(cells)), options.profile))
        return 0
    earlier = json.loads(options.compare.read_text()) if options.compare else None
    result = new_result()
    path = path_of(result, options.out, "layers")
    if options.resume and path.exists():
        result = json.loads(path.read_text())
    for cell in tqdm(cells, desc="decoders"):
        if any(asdict(cell).items() <= row.items() for row in result["rows"]):
            continue
        result["rows"] += measure(cell, options.seconds)
        save(result, path)
    print(markdown(result, earlier))
    return 0


if __name__ == "__main__":
    sys.exit(main())
