"""What LIVE minimises: the distance of the answer's distribution to that after demonstrations."""

from types import MappingProxyType

from mmicl_kernels.data.episodes import EpisodeBatch
from mmicl_kernels.methods.answers import answer_cross_entropy, answer_logits
from mmicl_kernels.methods.objective import Attached, Losses, Objective
from mmicl_kernels.methods.teaching import divergence, student_rows, teach


class LIVEObjective(Objective):
    """``T^2 KL(teacher || student)`` of the answer's tokens plus their cross-entropy.

    LIVE (arXiv 2406.13185). The teacher is the same frozen model with its adapters off, given the
    demonstrations. Both losses are means over the answer's tokens, which must be among the query's. Without
    ``kl_weight`` there is no teacher.
    """

    method = "live"
    means_over = MappingProxyType({"ce": "answer", "kl": "answer"})

    def __init__(self, handle: Attached) -> None:
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
