"""A row rounded so that its product with another stays."""

import triton
import triton.language as tl

from mmicl_kernels.ops.attention_shift._torch import CARRYING_COLUMNS

CARRYING = tl.constexpr(CARRYING_COLUMNS)


@triton.jit
def rounded_for(b_dout, b_exact, o_d, D: tl.constexpr, dtype: tl.constexpr):
    """``b_exact [BT, BD]`` in ``dtype`` with the product of every row with ``b_dout`` kept.

    The columns in which ``b_dout`` is largest take up what rounding took from it.
    """
    b_base = b_exact.to(dtype)
    if b_exact.dtype != dtype:
        b_wide = b_base.to(b_exact.dtype)
        # [BT]
        b_left = tl.sum(b_dout * (b_exact - b_wide), 1)
        # [BT, BD]
        b_size = tl.where((o_d < D)[None, :], tl.abs(b_dout), -1.0)
        b_rest = b_size
        for _ in range(min(CARRYING, D)):
            m_column = o_d[None, :] == tl.argmax(b_rest, 1)[:, None]
            b_rest = tl.where(m_column, -1.0, b_rest)
            b_left += tl.sum(tl.where(m_column, b_dout * b_wide, 0.0), 1)
        for _ in range(min(CARRYING, D)):
            m_column = o_d[None, :] == tl.argmax(b_size, 1)[:, None]
            b_size = tl.where(m_column, -1.0, b_size)
            b_weight = tl.sum(tl.where(m_column, b_dout, 0.0), 1)
            b_own = (b_left / tl.where(b_weight == 0, 1.0, b_weight)).to(dtype)
            b_left -= b_weight * b_own.to(b_exact.dtype)
            b_base = tl.where(m_column & (b_weight != 0)[:, None], b_own[:, None], b_base)
    return b_base
