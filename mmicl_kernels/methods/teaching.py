"""The teacher: the same model without its adapters, after demonstrations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmicl_kernels.data.episodes import EpisodeBatch
from mmicl_kernels.data.prefix import PrefixedBatch
from mmicl_kernels.methods.answers import answer_logits, labelled_tokens, rows_before, upcast
from mmicl_kernels.methods.objective import Attached

# By `config.model_type`: those whose prompts are causal, whose positions count tokens, and whose processors
# make of an image what they make of it among others. Each is tested.
SHARING = frozenset({"idefics2", "idefics3", "internvl", "llava"})


@contextmanager
def teaching(handle: Attached) -> Iterator[None]:
    """The plain model within a ``with`` block, without dropout: what is taught is no draw."""
    with handle.disabled(), evaluating(handle.model):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of ``model`` in eval mode within a ``with`` block."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def teach(handle: Attached, batch: EpisodeBatch, temperature: float) -> Tensor:
    """The probabilities ``[N, V]`` to reach at the N answer tokens, in fp32 (fp64 if the model is).

    They are the mean over the teacher's passes, which run one after another.
    """
    passes = [(batch.teacher, batch.teacher_query), *getattr(batch, "further", ())]
    total = None
    with teaching(handle):
        for inputs, query in passes:
            rows = teacher_rows(batch, inputs, query)
            logits = answer_logits(handle.model, after_prefix(handle.model, batch, inputs), rows)
            probabilities = torch.softmax(upcast(logits) / temperature, -1)
            total = probabilities if total is None else total.add_(probabilities)
    return total.div_(len(passes))


def student_rows(batch: EpisodeBatch) -> Tensor:
    """Bool ``[B, T]``: the student's positions that predict a labelled token.

    Raises:
        ValueError: there is none, a labelled token is not one of the query's, or padding is before it.
    """
    return rows_before("labels", _labelled(batch), batch.student)


def teacher_rows(batch: EpisodeBatch, inputs: dict[str, Tensor], query: Tensor) -> Tensor:
    """Bool ``[B, T]``: the positions of a teacher's prompt that predict the same tokens, in that order.

    ``inputs`` is this prompt and ``query`` its ``teacher_query``. Raises ValueError as :func:`student_rows`,
    or if the prompt begins with a token of the answer.
    """
    labelled = torch.zeros_like(query)
    labelled[query] = _labelled(batch)[batch.student_query].to(query.device)
    if labelled[:, 0].any():
        raise ValueError("teacher_query marks the answer at position 0, expected tokens before it")
    return rows_before("teacher_query", labelled, inputs)


def _labelled(batch: EpisodeBatch) -> Tensor:
    labelled = labelled_tokens(batch.labels).to(batch.student_query.device)
    outside = (labelled & ~batch.student_query).sum(-1)
    if outside.any():
        raise ValueError(
            f"labels marks {outside.tolist()} tokens per row outside of student_query, expected 0"
        )
    return labelled


def divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``KL(targets || softmax(logits / temperature))`` of ``[N, V]`` each, the mean over N."""
    log_probabilities = F.log_softmax(upcast(logits) / temperature, -1)
    return F.kl_div(log_probabilities, targets.to(logits.device), reduction="batchmean")


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache of the model's keys and values.

    Raises:
        ValueError: the model's family is none of ``SHARING``, or it has layers that do not keep all of them.
    """
    kind = model.config.model_type
    if kind not in SHARING:
        raise ValueError(
            f"shared_shots is True and the model a {kind}, expected one of {', '.join(sorted(SHARING))}"
        )
    cache = DynamicCache(config=model.config)
    others = sorted({type(x).__name__ for x in cache.layers} - {DynamicLayer.__name__})
    if others or not cache.layers:
        raise ValueError(
            f"shared_shots is True and the model's cache has {others or 'no layers'}, expected layers of "
            "full attention alone"
        )
    return cache


@torch.no_grad()
def after_prefix(model: nn.Module, batch: EpisodeBatch, inputs: dict[str, Tensor]) -> dict[str, object]:
    """``inputs`` of a teacher's pass; with the keys and values of the batch's prefix, if it has one.

    Raises as :func:`new_cache`.
    """
    if not isinstance(batch, PrefixedBatch):
        return inputs
    cache, mask = new_cache(model), inputs["attention_mask"]
    last = torch.zeros_like(batch.prefix["input_ids"], dtype=torch.bool)
    last[0, -1] = True  # the language head, whose logits nobody reads, gets one row
    answer_logits(model, {**batch.prefix, "past_key_values": cache, "use_cache": True}, last)
    cache.batch_repeat_interleave(len(mask))
    before = batch.prefix["attention_mask"].expand(len(mask), -1)
    return {
        **inputs,
        "attention_mask": torch.cat([before, mask], 1),
        "past_key_values": cache,
        "use_cache": True,
    }
