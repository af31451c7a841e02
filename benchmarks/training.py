"""What a training step of MimIC costs a decoder, and how much memory it takes.

``python -m benchmarks.training --out FOLDER`` writes ``FOLDER/<device>/training.json``. Beside it, in turns
and with the same weights: "passes", a plain forward pass of the teacher's prompt and a forward and a backward
pass of the student's, by stock attention; and the official formulation, with every token's logits.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.harness.decoders import (
    decoder,
    machine_line,
    made_by,
    new_result,
    path_of,
    quantiles,
    save,
    shown,
)
from benchmarks.harness.tables_cuda import MIB
from benchmarks.harness.timing import peak_allocated_bytes, time_interleaved
from benchmarks.layers import created, shared_copy
from benchmarks.peers import published
from mmicl_kernels.data.batch import IGNORE
from mmicl_kernels.data.episodes import EpisodeBatch
from mmicl_kernels.methods.answers import answer_loss
from mmicl_kernels.methods.record import record_outputs
from mmicl_kernels.training import TrainingConfig

ANSWER = 8  # tokens
FLOOR, OFFICIAL = "passes", "official MimIC"
AS_PUBLISHED = mk.MimICConfig(normalizer="all_keys", alignment="mean_square")
OURS = {"MimIC": mk.MimICConfig(), "MimIC, all_keys": AS_PUBLISHED}
Step = Callable[[], float]


@dataclass(frozen=True)
class Cell:
    """A decoder, and the lengths of its teacher's and its student's prompts, which end in the same query."""

    hidden: int
    layers: int
    teacher: int
    student: int
    dtype: str = "float32"
    heads: int = 8
    vocabulary: int = 32_000
    batch: int = 2

    def model(self) -> nn.Module:
        sizes = (self.hidden, self.heads, self.heads // 2, self.layers)
        return decoder(*sizes, vocabulary=self.vocabulary, dtype=self.dtype)

    def episodes(self) -> EpisodeBatch:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.vocabulary, (self.batch, self.teacher), generator=generator)
        query = torch.zeros(ids.shape, dtype=torch.bool)
        query[:, -self.student + 1 :] = True  # all of the student's but the first, as of a text
        student = ids[:, -self.student :]
        labels = torch.full(student.shape, IGNORE)
        labels[:, -ANSWER:] = student[:, -ANSWER:]
        inputs = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in (student, ids)]
        return EpisodeBatch(*inputs, query[:, -self.student :], query, labels)


CELLS = (Cell(512, 8, 512, 32), Cell(512, 8, 512, 512))
QUICK = (Cell(32, 2, 16, 12, heads=4, vocabulary=64),)


def passes(model: nn.Module, batch: EpisodeBatch) -> Step:
    """Two forward passes and a backward one through every layer, of the model alone."""
    embeddings = model.get_input_embeddings()(batch.student["input_ids"])

    def step() -> float:
        given = {
            "inputs_embeds": embeddings.requires_grad_(),
            "attention_mask": batch.student["attention_mask"],
        }
        with torch.no_grad():
            model(**batch.teacher, logits_to_keep=1)
        embeddings.grad = None
        loss = answer_loss(model, given, batch.labels)
        loss.backward()
        return loss.item()

    return step


def updating(adapter: nn.Module, losses: Callable[[], Tensor]) -> Step:
    """A step of AdamW, clipped, as :func:`mmicl_kernels.training.train` makes it."""
    config, parameters = TrainingConfig(), [*adapter.parameters()]
    # At a rate of 0: all steps are the same step.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=config.weight_decay)

    def step() -> float:
        loss = losses()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        return loss.item()

    return step


def official_loss(
    teacher: nn.Module, student: nn.Module, batch: EpisodeBatch, config: mk.MimICConfig
) -> Callable[[], Tensor]:
    """As published: full logits of both passes, cross-entropy of every token, a mean square of copies."""

    def losses() -> Tensor:
        with torch.no_grad(), record_outputs(_mlps(teacher), batch.teacher_query) as targets:
            teacher(**batch.teacher)
        labels = batch.student["input_ids"]
        with record_outputs(_mlps(student), batch.student_query) as states:
            logits = student(**batch.student).logits
        align = F.mse_loss(torch.stack(states), torch.stack(targets))
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return config.align_weight * align + config.ce_weight * ce

    return losses


def _mlps(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


@contextmanager
def steps(cell: Cell) -> Iterator[dict[str, Step]]:
    """Of all variants, by name, on models that share their weights."""
    model, batch = cell.model(), cell.episodes()
    variants = {FLOOR: passes(shared_copy(model), batch)}
    with ExitStack() as patched:
        for name, config in OURS.items():
            own, adapter = shared_copy(model), created(model, config).requires_grad_(True)
            objective = adapter.objective_class()(patched.enter_context(mk.attach(own, adapter)))
            variants[name] = updating(adapter, lambda objective=objective: objective(batch).total)
        theirs, adapter = shared_copy(model), created(model, AS_PUBLISHED).requires_grad_(True)
        patched.enter_context(published(theirs, adapter))
        variants[OFFICIAL] = updating(adapter, official_loss(model, theirs, batch, AS_PUBLISHED))
        yield variants


def measure(cell: Cell, seconds: float) -> list[dict]:
    """A row for each variant: its time, its ratio to the passes' in the same round, its peak of memory."""
    with steps(cell) as variants:
        peaks = {name: peak_allocated_bytes(step) for name, step in variants.items()}
        samples = time_interleaved(variants, device="cpu", seconds=seconds, label="steps")
    rows = []
    for name, own in samples.items():
        rows.append(
            {
                "variant": name, **asdict(cell), "ms": own.median, "rounds": len(own.ms),
                "ratio": quantiles(own.over(samples[FLOOR])), "peak_bytes": peaks[name],
            }
        )  # fmt: skip
    return rows


def tables(result: dict) -> dict[str, str]:
    """A line for each cell and variant."""
    lines = ["| decoder | prompts | step | ms | to the passes | peak MiB |", "|---|---|---|--:|--:|--:|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['hidden']} x {row['layers']}, {row['dtype']} | {row['batch']} x {row['teacher']} and "
            f"{row['student']} tokens | {row['variant']} | {row['ms']:.0f} | {shown(row['ratio'])} | "
            f"{row['peak_bytes'] / MIB:.0f} |"
        )
    threads = f"{result['machine']['threads']} threads"
    line = machine_line(result, threads, made_by(result["machine"]))
    lines.append(
        f"\n{line}; prompts are the teacher's and the student's, "
        '"passes" a plain forward pass of each and a backward one; medians in turns, ratios within a round '
        "with the range of the middle four fifths"
    )
    return {"training": "\n".join(lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    parser.add_argument("--seconds", type=float, default=60.0, help="of steps, of each decoder")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = new_result()
    for cell in tqdm(QUICK if options.quick else CELLS, desc="decoders"):
        result["rows"] += measure(cell, options.seconds)
        save(result, path_of(result, options.out, "training"))
    print(*tables(result).values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
