"""The public op: contract, checks, dispatch."""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.checks import (
    FLOAT_DTYPES,
    Sizes,
    check_fits,
    check_float,
    check_last_stride,
    check_same_device,
    is_number,
    is_readable,
    is_whole,
)
from mmicl_kernels.ops._core.dispatch import require_triton, resolve
from mmicl_kernels.ops._core.rows import check_rows, index_of
from mmicl_kernels.ops.row_projection._op import row_projection_op
from mmicl_kernels.ops.row_projection.reference import row_projection_reference


def row_projection(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    num_rows: int | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Chosen rows of hidden states through ``Linear(C, D)`` and an optional LayerNorm, packed.

    ``out_n = LayerNorm(weight hidden_{rows_n} + bias)``: how AIM (arXiv 2406.07588, section 3) turns the
    states at a demonstration's text positions into fused tokens for its bank.

    Args:
        hidden: hidden states ``[B, T, C]``, fp16, bf16, fp32 or fp64, contiguous last dimension.
        rows: a bool mask ``[B, T]``, whose rows are taken in order of batch, then token; or int32 or int64
            ``[N]``, rows ``b * T + t`` in any order and any number of times, -1 for none.
        weight: ``[D, C]``. bias: ``[D]``. Any floating dtype: the product is taken in that of ``hidden``.
        norm_weight, norm_bias: ``[D]``, any floating dtype; the LayerNorm's, None without. eps: its epsilon.
        num_rows: N beside a mask, so that the host need not wait for the device to count it. Where the mask
            has fewer, the last rows are none; where it has more, the first ``num_rows`` are taken (an error
            on CPU outside of a compiled graph). None: the mask is counted, which synchronises on CUDA.
        dtype: of the result, the bank's; that of ``hidden`` if None.
        impl: "reference", "composed" (rows copied by Triton on CUDA), "triton" or "auto".

    Returns:
        ``[N, D]`` in ``dtype``. Rows that are none are 0 and have no part in any gradient; so is, on CUDA,
        where they are not checked, each index outside of ``[-1, B * T)``.

    Raises:
        TypeError: a dtype. ValueError: a shape, stride, device, index or number, or an unknown ``impl``.
        NotImplementedError: an ``impl`` this op does not have. RuntimeError: "triton" on CPU tensors
        without ``TRITON_INTERPRET=1``.
    """
    sizes = Sizes()
    sizes.bind("hidden", hidden, "B T C")
    check_float("hidden", hidden)
    check_last_stride("hidden", hidden)
    _check_parameters(sizes, weight, bias, norm_weight, norm_bias)
    _check_options(eps, dtype)
    check_rows(sizes, rows)
    _check_num_rows(rows, num_rows)
    check_same_device(
        hidden=hidden, rows=rows, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias
    )
    impl = resolve(impl, ("reference", "composed", "triton"), "composed", "row_projection")
    index = index_of(rows, num_rows)
    inputs = (hidden, index, weight, bias, norm_weight, norm_bias, float(eps), dtype or hidden.dtype)
    if impl == "reference":
        return row_projection_reference(*inputs)
    if impl == "triton":
        require_triton(hidden.device)
    return row_projection_op(*inputs, impl)


def _check_parameters(
    sizes: Sizes, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    sizes.bind("weight", weight, "D C")
    check_float("weight", weight)
    for name, x in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if x is not None:
            sizes.bind(name, x, "D")
            check_float(name, x)
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias was given without norm_weight, expected both or norm_weight alone")


def _check_options(eps: float, dtype: torch.dtype | None) -> None:
    if not is_number(eps):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    check_fits("eps", eps)
    # A row that is none has no variance: with eps 0 its norm would be NaN.
    if not eps > 0:
        raise ValueError(f"eps is {eps}, expected a number above 0")
    if dtype not in (None, *FLOAT_DTYPES):
        raise TypeError(f"dtype is {dtype}, expected None or {' or '.join(map(str, FLOAT_DTYPES))}")


def _check_num_rows(rows: Tensor, num_rows: int | None) -> None:
    if num_rows is None:
        return
    if rows.dtype != torch.bool:
        raise ValueError(f"num_rows is {num_rows} beside indices {list(rows.shape)}, expected None")
    if not is_whole(num_rows):
        raise TypeError(f"num_rows must be an int, got {type(num_rows).__name__}")
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}, expected 0 or more")
    if is_readable(rows) and (count := int(rows.count_nonzero())) > num_rows:
        raise ValueError(f"num_rows is {num_rows}, expected at least the {count} that rows has")
