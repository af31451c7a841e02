"""What M2IV minimises: LIVE's loss, and that both branches of a layer agree."""

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as F

from mmicl_kernels.data.episodes import EpisodeBatch
from mmicl_kernels.methods.answers import answer_cross_entropy, answer_logits, upcast
from mmicl_kernels.methods.checkpointing import refuse_checkpointing
from mmicl_kernels.methods.measures import layer_shares
from mmicl_kernels.methods.objective import Attached, Losses, Objective
from mmicl_kernels.methods.record import record_outputs
from mmicl_kernels.methods.teaching import divergence, student_rows, teach


class M2IVObjective(Objective):
    """Mimicry of the teacher's answer, synergy of the two branches, and the answer's cross-entropy.

    M2IV (arXiv 2504.04633). Mimicry is ``KL(teacher || student)`` at the temperature, without LIVE's
    ``T^2``; it and the cross-entropy are means over the answer's tokens. Synergy is that of the branches with
    their vectors, ``a_l + alpha v_a`` and ``m_l + alpha v_m``, where every token of the query is one sample
    [ours]: :func:`synergy` of each layer, the mean over layers or, of tokens, the sum. What has no weight is
    not computed: there is no teacher without ``mimicry_weight``.
    """

    method = "m2iv"
    means_over = MappingProxyType({"ce": "answer", "mimicry": "answer"})

    def __init__(self, handle: Attached) -> None:
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
            shifted = upcast(m) + self.handle.scaled(shift.scale) * shift.vector
            losses.append(synergy(a, shifted, self.config.gamma, self.config.synergy_of))
        return losses


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
    a, m = (F.normalize(upcast(x), dim=dim, eps=1e-6) for x in (a, m.to(a.device)))
    if of == "token":
        a = a / N
    diagonal = (a * m).sum(0)
    squares = ((a @ a.mT) * (m @ m.mT)).sum() if N < C else (a.mT @ m).square().sum()
    return ((1 - diagonal).square().sum() + gamma * (squares - diagonal.square().sum())) / unit
