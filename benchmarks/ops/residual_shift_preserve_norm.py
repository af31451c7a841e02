"""``residual_shift`` with ``preserve_norm``, as LIVE has it: beside peers as those without."""

from functools import partial

from torch import Tensor

from benchmarks.ops.residual_shift import residual_spec
from mmicl_kernels.ops import residual_shift
from mmicl_kernels.testing.budgets import eager_residual_shift


def added_with_norm(x: Tensor, vector: Tensor, scale: Tensor) -> Tensor:
    """M2IV's shift with the length of x, as one would write it."""
    wide = x.float()
    y = wide + scale * vector
    return (y * (wide.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))).to(x.dtype)


SPEC = residual_spec(
    "residual_shift_preserve_norm",
    partial(residual_shift, preserve_norm=True),
    added_with_norm,
    partial(eager_residual_shift, preserve_norm=True),
    passes=(2, 3),
)
