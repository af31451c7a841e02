"""What STAVE minimises: the answer's cross-entropy, without demonstrations and after some."""

import torch
from torch import Tensor

from mmicl_kernels.data.episodes import ManyShotBatch
from mmicl_kernels.data.prefix import PrefixedBatch
from mmicl_kernels.methods.answers import answer_cross_entropy, answer_logits
from mmicl_kernels.methods.objective import Losses, Objective
from mmicl_kernels.methods.teaching import student_rows, teacher_rows


class STAVEObjective(Objective):
    """``CE(answer | query) + CE(answer | demonstrations, query)``, both with the vectors.

    They act on what stands before the answer, in a prompt with demonstrations on the query's own tokens. The
    second is the mean over a batch's passes.
    """

    method = "stave"

    def __call__(self, batch: ManyShotBatch) -> Losses:
        """Raises ValueError if no token is labelled, or one that is not the query's; or if all queries of the
        batch share their demonstrations (``shared_shots``), which are read without gradients."""
        if isinstance(batch, PrefixedBatch):
            raise ValueError("shared_shots is True, expected False: gradients pass the demonstrations")
        config, terms = self.config, {}
        rows = student_rows(batch)
        if config.ce_weight > 0:
            own = batch.student.get("attention_mask", torch.ones_like(batch.labels)).bool()
            terms["ce"] = (config.ce_weight, self._loss(batch, batch.student, rows, own))
        if config.demonstrations_weight > 0:
            passes = [(batch.teacher, batch.teacher_query), *getattr(batch, "further", ())]
            losses = [
                self._loss(batch, inputs, teacher_rows(batch, inputs, query), query)
                for inputs, query in passes
            ]
            terms["ce_demonstrations"] = (config.demonstrations_weight, sum(losses) / len(losses))
        return self._losses(terms)

    def _loss(
        self, batch: ManyShotBatch, inputs: dict[str, Tensor], rows: Tensor, own: Tensor
    ) -> Tensor:  # fmt: skip
        """``rows`` predict the answer; of the tokens that are ``own`` those up to the first of them count."""
        before = (rows.cumsum(-1) - rows.int()) == 0
        with self.handle.tokens(own & before):
            logits = answer_logits(self.handle.model, inputs, rows)
        return answer_cross_entropy(logits, batch.labels)
