"""What LIVE and M2IV minimise: the answer's distribution after demonstrations, without them."""

from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.integration import Handle
from mmicl_kernels.methods import LIVEAdapter, M2IVAdapter
from mmicl_kernels.training.answers import (
    answer_cross_entropy,
    answer_logits,
    labelled_tokens,
    rows_before,
    wide,
)
from mmicl_kernels.training.episodes import EpisodeBatch
from mmicl_kernels.training.measures import layer_shares
from mmicl_kernels.training.objectives import Losses, Objective, refuse_checkpointing, teaching
from mmicl_kernels.training.prefix import after_prefix
from mmicl_kernels.training.record import record_outputs


class LIVEObjective(Objective):
    """``T^2 KL(teacher || student)`` of the answer's tokens plus their cross-entropy.

    LIVE (arXiv 2406.13185). The teacher is the same frozen model with its adapters off, given the
    demonstrations. Both losses are means over the answer's tokens, which must be among the query's. Without
    ``kl_weight`` there is no teacher.
    """

    method = LIVEAdapter
    means_over = MappingProxyType({"ce": "answer", "kl": "answer"})

    def __init__(self, handle: Handle) -> None:
        super().__init__(handle)
        self.learning_rates = {"scale": self.config.scale_learning_rate}

    def __call__(self, batch: EpisodeBatch) -> Losses:
        """Raises ValueError if no token is labelled, or one that is not the query's."""
        config, T, terms = self.config, self.config.temperature, {}
        targets = teach(self.handle, batch, T) if config.kl_weight > 0 else None
        logits = answer_logits(self.handle.model, batch.student, student_rows(batch))
        if targets is not None:
            terms["kl"] = (config.kl_weight, T**2 * divergence(logits, targets, T))
        return self._losses(terms | {"ce": (config.ce_weight, answer_cross_entropy(logits, batch.labels))})


class M2IVObjective(Objective):
    """Mimicry of the teacher's answer, synergy of the two branches, and the answer's cross-entropy.

    M2IV (arXiv 2504.04633). Mimicry is ``KL(teacher || student)`` at the temperature, without LIVE's
    ``T^2``; it and the cross-entropy are means over the answer's tokens. Synergy is that of the branches with
    their vectors, ``a_l + alpha v_a`` and ``m_l + alpha v_m``, where every token of the query is one sample
    [ours]: :func:`synergy` of each layer, the mean over layers or, of tokens, the sum. What has no weight is
    not computed: there is no teacher without ``mimicry_weight``.
    """

    method = M2IVAdapter
    means_over = MappingProxyType({"ce": "answer", "mimicry": "answer"})

    def __init__(self, handle: Handle) -> None:
        super().__init__(handle)
        self.learning_rates = {"scale": self.config.scale_learning_rate}
        self._anchors = handle.anchors if self.config.synergy_weight > 0 else []

    def __call__(self, batch: EpisodeBatch) -> Losses:
        """Raises ValueError as LIVE's, and under gradient checkpointing, which hides the branches."""
        refuse_checkpointing(self.handle.model, self.config, "synergy_weight", 0)
        config, query = self.config, batch.student_query
        targets = teach(self.handle, batch, config.temperature) if config.mimicry_weight > 0 else None
        with (
            record_outputs([anchor.after_attention for anchor in self._anchors], query) as attention,
            record_outputs([anchor.after_mlp for anchor in self._anchors], query) as mlp,
        ):
            logits = answer_logits(self.handle.model, batch.student, student_rows(batch))
        ce, terms = answer_cross_entropy(logits, batch.labels), {}
        if targets is not None:
            terms["mimicry"] = (config.mimicry_weight, divergence(logits, targets, config.temperature))
        terms["ce"] = (config.ce_weight, ce)
        if not self._anchors:
            return self._losses(terms)
        layers = self._synergies(attention, mlp)
        total = sum(x.to(ce.device) for x in layers)
        if config.synergy_of == "channel":
            total = total / len(layers)
        terms["synergy"] = (config.synergy_weight, total)
        indices = [anchor.index for anchor in self._anchors]
        return self._losses(terms, lambda: layer_shares("synergy", layers, indices))

    def _synergies(self, attention: list[Tensor], mlp: list[Tensor]) -> list[Tensor]:
        """Each layer's, one after another: nothing is stacked."""
        losses = []
        for anchor, a, m in zip(self._anchors, attention, mlp, strict=True):
            # The attention's vector is in what was recorded; the MLP's joins at the layer's output.
            shift = self.handle.single.layers[str(anchor.index)].mlp
            shifted = wide(m) + self.handle.scaled(shift.scale) * shift.vector
            losses.append(synergy(a, shifted, self.config.gamma, self.config.synergy_of))
        return losses


@torch.no_grad()
def teach(handle: Handle, batch: EpisodeBatch, temperature: float) -> Tensor:
    """The probabilities ``[N, V]`` to reach at the N answer tokens, in fp32 (fp64 if the model is).

    They are the mean over the teacher's passes, which run one after another.
    """
    passes = [(batch.teacher, batch.teacher_query), *getattr(batch, "further", ())]
    total = None
    with teaching(handle):
        for inputs, query in passes:
            rows = teacher_rows(batch, inputs, query)
            logits = answer_logits(handle.model, after_prefix(handle.model, batch, inputs), rows)
            probabilities = torch.softmax(wide(logits) / temperature, -1)
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
    log_probabilities = F.log_softmax(wide(logits) / temperature, -1)
    return F.kl_div(log_probabilities, targets.to(logits.device), reduction="batchmean")


def synergy(a: Tensor, m: Tensor, gamma: float, of: str) -> Tensor:
    """``sum_i (1 - M_ii)^2 + gamma sum_{i != j} M_ij^2`` of the correlations ``M [C, C]`` of two branches.

    ``a`` and ``m`` are their states ``[N, C]`` at N tokens. ``of`` "channel": ``M = a^T m`` of channels of
    unit length, with 1 where two agree, and the result is the mean over channels; "token": ``M = a^T m / N``
    of tokens of unit length. The smaller of two matrices is made: ``M``, or the tokens' products ``[N, N]``,
    as ``|a^T m|_F^2 = sum((a a^T) * (m m^T))``.
    """
    N, C = a.shape
    dim, unit = (0, C) if of == "channel" else (-1, 1)
    # A channel that is 0 throughout has a length of eps: a smaller one would make its gradient enormous.
    a, m = (F.normalize(wide(x), dim=dim, eps=1e-6) for x in (a, m.to(a.device)))
    if of == "token":
        a = a / N
    diagonal = (a * m).sum(0)
    squares = ((a @ a.mT) * (m @ m.mT)).sum() if N < C else (a.mT @ m).square().sum()
    return ((1 - diagonal).square().sum() + gamma * (squares - diagonal.square().sum())) / unit
