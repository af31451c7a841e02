"""What HiFICL minimises: the loss of the answer, without a teacher."""

from mmicl_kernels.data.episodes import EpisodeBatch
from mmicl_kernels.methods.answers import answer_loss
from mmicl_kernels.methods.objective import Losses, Objective


class HiFICLObjective(Objective):
    """``-mean log p(y_t | query, y_<t)`` over the labelled tokens (arXiv 2603.12760, section 3.3).

    Of a batch the student's prompts alone are read.
    """

    method = "hificl"

    def __call__(self, batch: EpisodeBatch) -> Losses:
        """Raises ValueError if no token is labelled."""
        return self._losses({"ce": (1.0, answer_loss(self.handle.model, batch.student, batch.labels))})
