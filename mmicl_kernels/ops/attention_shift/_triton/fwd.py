"""The shift's forward, into a new tensor or in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core._triton import adapter, gate, is_shifted
from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops._core.virtual_keys import is_one_key
from mmicl_kernels.ops.attention_shift._triton import keys
from mmicl_kernels.ops.attention_shift._triton.tiles import (
    ids_stride,
    launch_config,
    position,
    row_pointers,
    strides,
)


@triton.jit(do_not_specialize=["H", "T", "s_lse_b", "s_lse_h", "s_ids"])
def attention_shift_fwd_kernel(
    out, lse, q, weight, bias, shift, adapter_ids, shifted,
    s_out_b, s_out_h, s_out_t, s_lse_b, s_lse_h, s_lse_t, s_q_b, s_q_h, s_q_t, s_ids, s_shifted_b,
    s_shifted_h, s_shifted_t,
    H, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_t = position(H, T, BT)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    m_td = m_t[:, None] & m_d[None, :]
    p_q = row_pointers(q, s_q_b, s_q_h, s_q_t, i_b, i_h, o_t)[:, None] + o_d[None, :]
    p_out = row_pointers(out, s_out_b, s_out_h, s_out_t, i_b, i_h, o_t)[:, None] + o_d[None, :]
    p_shifted = row_pointers(shifted, s_shifted_b, s_shifted_h, s_shifted_t, i_b, i_h, o_t)
    # [BT]
    b_lse = tl.load(row_pointers(lse, s_lse_b, s_lse_h, s_lse_t, i_b, i_h, o_t), mask=m_t, other=0.0)
    # [BT, BD]
    b_q = tl.load(p_q, mask=m_td, other=0.0).to(b_lse.dtype)
    b_out = tl.load(p_out, mask=m_td, other=0.0)

    i_a = adapter(adapter_ids, s_ids, i_b)
    i_ah = tl.maximum(i_a, 0) * H + i_h
    # [BD]
    b_weight = tl.load(weight + i_ah * D + o_d, mask=m_d & (i_a >= 0), other=0.0)
    b_shift = tl.load(shift + i_ah * D + o_d, mask=m_d & (i_a >= 0), other=0.0)
    b_bias = tl.load(bias + i_ah, mask=i_a >= 0, other=0.0)
    # [BT]
    b_mu, _ = gate(tl.sum(b_q * b_weight[None, :], 1) + b_bias, b_lse, i_a)
    # [BT, BD]
    b_shifted = (b_out.to(b_lse.dtype) + b_mu[:, None] * b_shift[None, :]).to(shifted.dtype.element_ty)
    b_shifted = tl.where(is_shifted(b_lse, i_a)[:, None], b_shifted, b_out)
    tl.store(p_shifted[:, None] + o_d[None, :], b_shifted, mask=m_td)


def attention_shift_fwd(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    prefix: Tensor | None,
) -> Tensor:
    shifted = new_heads(out)
    _launch_fwd(out, lse, q, weight, bias, shift, adapter_ids, prefix, shifted)
    return shifted


def attention_shift_fwd_(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    adapter_ids: Tensor | None,
    prefix: Tensor | None,
) -> None:
    _launch_fwd(out, lse, q, weight, bias, shift, adapter_ids, prefix, out)


def _launch_fwd(out, lse, q, weight, bias, shift, adapter_ids, prefix, shifted) -> None:
    if q.numel() == 0:
        return
    B, H, T, D = q.shape
    if not is_one_key(H, weight, adapter_ids, prefix):
        return keys.launch_fwd(out, lse, q, weight, bias, shift, adapter_ids, prefix, shifted)
    BD, config = triton.next_power_of_2(D), launch_config("fwd", T)
    BT, _ = config.tiling(T, BD)
    with torch.cuda.device_of(q):
        attention_shift_fwd_kernel[(B * H * triton.cdiv(T, BT),)](
            out, lse, q, weight, bias, shift, adapter_ids, shifted,
            *strides(out), *lse.stride(), *strides(q), ids_stride(adapter_ids), *strides(shifted),
            H, T, D, BT, BD, num_warps=config.num_warps,
        )  # fmt: skip
