"""What a training is about to do: one episode as the model reads it, its tokens, the cost."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmicl_kernels.data.batch import IGNORE, Batch
from mmicl_kernels.data.prefix import PrefixedBatch
from mmicl_kernels.methods.objective import trainable
from mmicl_kernels.training.module import TrainedModule

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from mmicl_kernels.training.run import Training

ADAMW_STATES = 2  # as large as the parameters


def preview(training: Training, given: Mapping[str, Any] | None = None) -> str:
    """The first query's prompts, the tokens of the first batch, and the cost of all updates.

    The cost is measured: two forward and backward passes of that batch, of which the second counts, on the
    model's device, with the autocast and the checkpointing that ``given`` asks for, which are the Trainer's
    arguments as of :func:`train`; nothing is changed by them. The memory is the device's peak, on a CPU that
    of the process since it began.

    Raises: as :func:`train` before it begins, the batches and the objective.
    """
    arguments = training.arguments(dict(given or {}), kept=True)
    collator, size = training.collator, arguments.per_device_train_batch_size
    rows = [training.examples[i] for i in range(min(size, len(training.examples)))]
    batch = collator(rows)
    prompts = _prompts(batch)
    decode = training.builder.processor.tokenizer.decode
    lines = ["One episode", ""]
    for name, inputs, marked in prompts:
        lines += [f"{name}:", _shown(inputs, marked, decode), ""]
    answer = batch.labels[0][batch.labels[0] != IGNORE].tolist()
    lines += [f"answer: {decode(answer)!r}", "", f"Tokens of a prompt, {len(rows)} queries", ""]
    lines += _token_table(prompts, batch, training.builder.image_tokens)
    return "\n".join([*lines, "", "Cost", "", *_cost(training, arguments, batch)])


def _prompts(batch: Batch) -> list[tuple[str, Mapping[str, Tensor], Tensor | None]]:
    """Names, inputs, and bool ``[B, T]``, the tokens that are aligned or fused."""
    if hasattr(batch, "queries"):
        return [
            ("demonstration", batch.demonstrations, batch.positions),
            ("query", batch.queries, batch.labels != IGNORE),
        ]
    made = [("student", batch.student, batch.student_query), ("teacher", batch.teacher, batch.teacher_query)]
    if isinstance(batch, PrefixedBatch):
        none = torch.zeros_like(batch.prefix["input_ids"], dtype=torch.bool)
        made.insert(1, ("shared by teachers", batch.prefix, none))
    further = getattr(batch, "further", ())
    return made + [(f"teacher {i + 2}", inputs, query) for i, (inputs, query) in enumerate(further)]


def _shown(inputs: Mapping[str, Tensor], marked: Tensor | None, decode: Any) -> str:
    """The first prompt, with a bar before and after the marked tokens, and runs of a token counted."""
    own = inputs["attention_mask"][0].bool() if "attention_mask" in inputs else None
    ids = inputs["input_ids"][0]
    marked = torch.zeros_like(ids, dtype=torch.bool) if marked is None else marked[0]
    if own is not None:
        ids, marked = ids[own], marked[own]
    parts = []
    for inside, run in groupby(zip(ids.tolist(), marked.tolist(), strict=True), key=lambda x: x[1]):
        text = _counted([i for i, _ in run], decode)
        parts.append(f"[[{text}]]" if inside else text)
    return "".join(parts)


def _counted(ids: Sequence[int], decode: Any) -> str:
    texts, plain = [], []
    for token, run in groupby(ids):
        count = len(list(run))
        if count < 3:
            plain += [token] * count
            continue
        texts += [decode(plain), f"{decode([token])} x {count} "]
        plain = []
    return "".join([*texts, decode(plain)])


def _token_table(prompts: Sequence, batch: Batch, image_tokens: Callable[[Tensor], Tensor]) -> list[str]:
    rows = [("prompt", "tokens", "of images", "marked")]
    for name, inputs, marked in prompts:
        ids = inputs["input_ids"]
        own = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
        image = image_tokens(ids) & own
        marks = own if marked is None else marked
        rows.append((name, *(_range(x.sum(-1)) for x in (own, image, marks))))
    rows.append(("answer", _range((batch.labels != IGNORE).sum(-1)), "0", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _range(counts: Tensor) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def _cost(training: Training, arguments: TrainingArguments, batch: Batch) -> list[str]:
    size, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    per_epoch = math.ceil(math.ceil(len(training.examples) / (size * arguments.world_size)) / accumulated)
    epochs = math.ceil(arguments.num_train_epochs * per_epoch)
    updates = arguments.max_steps if arguments.max_steps > 0 else epochs
    with training.module() as module:
        device = module.handle.model.get_input_embeddings().weight.device
        seconds = _seconds(module, batch.to(device), device, arguments)
        parameters = trainable(module.adapter)
        count = sum(x.numel() for x in parameters.values())
        own = sum(x.numel() * x.element_size() for x in parameters.values())
        frozen = sum(x.numel() * x.element_size() for x in _frozen(module))
    peak = _peak(device)
    total = seconds * accumulated * updates
    return [
        f"adapter        {count:,} parameters, {_bytes(own)}; its optimizer {_bytes(ADAMW_STATES * own)}",
        f"frozen model   {_bytes(frozen)}, on {device}",
        f"peak memory    {_bytes(peak)}" + ("" if device.type == "cuda" else " (of the process)"),
        f"updates        {updates:,} of {size} x {accumulated} queries in each process",
        f"time           {seconds:.2f} s a batch, {_duration(total)} in all, evaluations and loading aside",
    ]


def _seconds(
    module: TrainedModule, batch: Batch, device: torch.device, arguments: TrainingArguments
) -> float:
    module.train()
    if arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False):
        module.handle.model.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=arguments.bf16 or arguments.fp16):
            loss = module(**batch.arguments())["loss"]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return seconds


def _frozen(module: TrainedModule) -> list[nn.Parameter]:
    mine = {id(x) for x in module.adapter.parameters()}
    return [x for x in module.handle.model.parameters() if id(x) not in mine]


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
