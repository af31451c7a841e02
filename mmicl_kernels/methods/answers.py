"""The logits of answers without any others, and their cross-entropy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmicl_kernels.data.batch import IGNORE


def answer_loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Next-token cross-entropy of ``model(**inputs)`` at the labelled tokens of ``[B, T]``, their mean.

    Written out because Idefics v1 fails when given ``labels`` (its loss forgets the added vocabulary).
    Raises as :func:`labelled_tokens` and :func:`rows_before`.
    """
    rows = rows_before("labels", labelled_tokens(labels), inputs)
    return answer_cross_entropy(answer_logits(model, inputs, rows), labels)


def answer_logits(model: nn.Module, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
    """``model(**inputs).logits`` at ``rows`` (bool ``[B, T]``) alone, ``[N, V]``; others are not computed.

    The hidden states are cut before the language head, and not by ``logits_to_keep``, which keeps the same
    positions of all batch rows. What the model does to logits after its head, it still does.

    Raises:
        RuntimeError: the model was compiled before, so that it does not see the cut.
    """
    places = rows.nonzero(as_tuple=True)
    with _head_sees(model, places):
        logits = model(**inputs).logits
    if logits.shape[:2] != (1, len(places[0])):
        raise RuntimeError(
            f"logits have shape {list(logits.shape)}, expected [1, {len(places[0])}, V]: train with a model "
            "that is not compiled as a whole"
        )
    return logits[0]


@contextmanager
def _head_sees(model: nn.Module, places: tuple[Tensor, ...]) -> Iterator[None]:
    def cut(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0][tuple(x.to(args[0].device) for x in places)][None], *args[1:]

    hook = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


def labelled_tokens(labels: Tensor) -> Tensor:
    """Bool ``[B, T]``: the tokens to predict; position 0 is predicted by nothing.

    Raises:
        ValueError: there is none.
    """
    labelled = labels != IGNORE
    labelled[:, 0] = False
    if not labelled.any():
        raise ValueError("labels marks no token to predict, expected at least one")
    return labelled


def rows_before(what: str, tokens: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The positions that predict ``tokens``, which ``what`` marks: before each the last that is not padding.

    Padding between a prompt's tokens, as of MimIC's official prompts, predicts nothing. Raises ValueError: a
    token has only padding before it.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != tokens.shape:
        return F.pad(tokens[:, 1:], (0, 1), value=False)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    last = torch.where(mask.to(tokens.device) != 0, places, -1).cummax(-1).values
    previous = F.pad(last[:, :-1], (1, 0), value=-1)
    # Position 0 of a longer row stands for none.
    marked = torch.where(tokens, previous + 1, 0)
    before = torch.zeros_like(F.pad(tokens, (1, 0))).scatter(1, marked, True)[:, 1:]
    missing = tokens.sum(-1) - before.sum(-1)
    if missing.any():
        raise ValueError(
            f"{what} marks {missing.tolist()} answer tokens per row right after padding, "
            "expected tokens before them"
        )
    return before


def answer_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of :func:`answer_logits` ``[N, V]`` to the N labels of ``[B, T]``, their mean."""
    labels = labels[:, 1:].to(logits.device)
    return F.cross_entropy(upcast(logits), labels[labels != IGNORE])


def upcast(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
