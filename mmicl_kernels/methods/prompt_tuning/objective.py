"""What prompt tuning minimises: the loss of a query's answer after the learned tokens."""

from mmicl_kernels.data.episodes import EpisodeBatch
from mmicl_kernels.methods.answers import answer_loss
from mmicl_kernels.methods.objective import Losses, Objective


class PromptTuningObjective(Objective):
    """``-mean log p(y_t | P, query, y_<t)`` over the labelled tokens (arXiv 2104.08691).

    Of a batch the student's prompts alone are read: there is no teacher.
    """

    method = "prompt_tuning"

    def __call__(self, batch: EpisodeBatch) -> Losses:
        """Raises ValueError as ``Handle.splice``, or if no token is labelled."""
        inputs = self.handle.splice({**batch.student, "labels": batch.labels})
        labels = inputs.pop("labels")
        try:
            ce = answer_loss(self.handle.model, inputs, labels)
        finally:
            self.handle.unsplice()
        return self._losses({"ce": (1.0, ce)})
