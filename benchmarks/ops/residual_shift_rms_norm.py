"""``residual_shift_rms_norm``: beside a copy, its formula in PyTorch, and Liger's fused add and RMSNorm."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.case import Case
from benchmarks.harness.spec import Inputs, bound
from benchmarks.ops.residual_shift import hidden_states, residual_spec
from mmicl_kernels.ops import residual_shift_rms_norm
from mmicl_kernels.testing.budgets import eager_residual_shift_rms_norm

EPS = 1e-5
NUM_INPUTS, NUM_OUTPUTS = 5, 2


def make_inputs(case: Case, device: str) -> Inputs:
    """``x, residual, vector, scale, weight`` and the gradients of the two results."""
    torch.manual_seed(0)
    C = case.H * case.D
    x, residual, *douts = hidden_states(4, case, device)
    vector, scale = torch.randn(C, device=device), torch.full((), 0.1, device=device)
    weight = torch.randn(C, dtype=case.torch_dtype, device=device)
    inputs = (x, residual, vector, scale, weight)
    return *(x.requires_grad_(case.backward) for x in inputs), *douts


def added_and_normed(
    x: Tensor, residual: Tensor, vector: Tensor, scale: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Add, shift and Llama's RMSNorm; see :func:`mmicl_kernels.ops.residual_shift_rms_norm`."""
    new_residual = (residual.float() + x.float() + scale * vector).to(x.dtype)
    h = new_residual.float()
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return norm_weight * n.to(x.dtype), new_residual


def liger(
    x: Tensor, residual: Tensor, vector: Tensor, scale: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Liger's fused add and RMSNorm: as many bytes, without a shift. Raises ImportError without Liger."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, norm_weight, EPS, 0.0, "llama", False)


_BOTH = residual_spec(
    "residual_shift_rms_norm",
    partial(residual_shift_rms_norm, eps=EPS),
    added_and_normed,
    partial(eager_residual_shift_rms_norm, eps=EPS),
    passes=(4, 4),
    tests="tests/ops/test_residual_shift_rms_norm.py",
    make_inputs=make_inputs,
    num_inputs=NUM_INPUTS,
    num_outputs=NUM_OUTPUTS,
    row_bytes=torch.float32.itemsize,
)
_CUDA = _BOTH.lineups["cuda"]
_WITH_LIGER = replace(_CUDA, others={**_CUDA.others, "liger": bound(liger, NUM_INPUTS, NUM_OUTPUTS)})
SPEC = replace(_BOTH, lineups={**_BOTH.lineups, "cuda": _WITH_LIGER})
