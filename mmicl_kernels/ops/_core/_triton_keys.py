"""N virtual keys of the rows of a tile in Triton: their logits, their mass, their values.

Rows that share their keys take them BK at a time, as products of tiles; rows with keys of their own (other
heads, other adapters) one at a time, BK = 1. ``o_first``, ``[1]`` or ``[BM]``, is the rows' first key among
all ``[A * P * N]``, and ``m_a`` says where there is an adapter. Rows ``x`` are a tile ``[BM, BD]`` where BK
is 1, else pointers to rows of 16-bit numbers, which are read a few columns at a time: a whole tile of them in
fp32 would fill the registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from mmicl_kernels.ops._core.virtual_keys import is_one_key

BLOCK = 16  # keys in a tile: the fewest that tensor cores take
COLUMNS = tl.constexpr(32)
PRECISION = tl.constexpr("tf32x3")  # three products of tensor cores: nearly that of fp32


@triton.jit
def adapters(adapter_ids, s_ids, s_ids_t, i_b, o_t, m_t, PER_QUERY: tl.constexpr):
    """The rows' adapters: ``[BM]`` where each query has its own, else ``[1]``; -1 for none."""
    if PER_QUERY:
        i_a = tl.load(adapter_ids + i_b * s_ids + o_t.to(tl.int64) * s_ids_t, mask=m_t, other=-1).to(tl.int64)
    elif adapter_ids is not None:
        i_a = tl.load(adapter_ids + i_b * s_ids + tl.arange(0, 1)).to(tl.int64)
    else:
        i_a = tl.zeros([1], tl.int64)
    return i_a


@triton.jit
def first_key(i_a, o_h, H, SHARE: tl.constexpr, KEYS: tl.constexpr):
    """Of heads ``o_h``, of which SHARE neighbouring ones have the same keys."""
    return (tl.maximum(i_a, 0) * (H // SHARE) + o_h // SHARE) * KEYS


@triton.jit
def is_prefix(prefix, s_prefix, i_a):
    """Whether the rows' adapters are prefixes, like ``i_a``."""
    if prefix is None:
        m_prefix = i_a < -1
    else:
        m_prefix = (tl.load(prefix + tl.maximum(i_a, 0) * s_prefix) != 0) & (i_a >= 0)
    return m_prefix


@triton.jit
def products(
    x, m_x, rows, o_first, m_a, i_n,
    KEYS: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of rows with what keys ``i_n..i_n + BK`` have in ``rows``: ``[BM, BK]``."""
    if BK == 1:
        o_d = tl.arange(0, BD)
        o_w = (o_first + i_n)[:, None] * D + o_d[None, :]
        b_w = tl.load(rows + o_w, mask=m_a[:, None] & (o_d < D)[None, :], other=0.0)
        b_y = tl.sum(x * b_w, 1)[:, None]
    else:
        o_k = i_n + tl.arange(0, BK)
        m_k = (o_k < KEYS) & m_a
        b_y = tl.zeros([x.shape[0], BK], tl.float32)
        for i_d in range(0, D, COLUMNS):
            o_d = i_d + tl.arange(0, COLUMNS)
            m_d = o_d < D
            b_x = tl.load(x[:, None] + o_d[None, :], mask=m_x[:, None] & m_d[None, :], other=0.0)
            o_w = (o_first + o_k)[:, None] * D + o_d[None, :]
            b_w = tl.load(rows + o_w, mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_y = tl.dot(b_x.to(tl.float32), tl.trans(b_w), b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def logits(
    x, m_x, weight, bias, o_first, m_a, i_n,
    KEYS: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``q.weight + bias`` of keys ``i_n..i_n + BK``: ``[BM, BK]``, -inf where there is none."""
    b_g = products(x, m_x, weight, o_first, m_a, i_n, KEYS, BK, D, BD)
    if BK == 1:
        b_g += tl.load(bias + (o_first + i_n)[:, None], mask=m_a[:, None], other=float("-inf"))
    else:
        o_k = i_n + tl.arange(0, BK)
        b_g += tl.load(bias + o_first + o_k, mask=(o_k < KEYS) & m_a, other=float("-inf"))[None, :]
    return b_g


@triton.jit
def normaliser(
    x, m_x, b_lse, weight, bias, o_first, m_a,
    KEYS: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The largest logit of each row's keys, and the sum of exp below it; -inf and 0 where none counts."""
    b_m = tl.full([b_lse.shape[0]], float("-inf"), dtype=b_lse.dtype)
    b_l = tl.zeros([b_lse.shape[0]], dtype=b_lse.dtype)
    for i_n in range(0, KEYS, BK):
        b_g = logits(x, m_x, weight, bias, o_first, m_a, i_n, KEYS, BK, D, BD)
        b_max = tl.maximum(b_m, tl.max(b_g, 1))
        b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_l = b_l * tl.exp(b_m - b_base) + tl.sum(tl.exp(b_g - b_base[:, None]), 1)
        b_m = b_max
    return b_m, b_l


@triton.jit
def masses(b_m, b_l, b_lse, m_a):
    """``mu``, ``1 - mu``, and what exp of a logit below the largest is multiplied by for its mass.

    exp(-|x|) cannot overflow, and from it 1 - mu comes without cancellation.
    """
    m_shifted = (tl.abs(b_lse) != float("inf")) & m_a & ((b_l != 0) | (b_m != float("-inf")))
    b_x = tl.where(m_shifted, b_m + tl.log(b_l) - b_lse, 0.0)
    b_z = tl.exp(-tl.abs(b_x))
    b_r = 1.0 / (1.0 + b_z)
    b_mu = tl.where(m_shifted, tl.where(b_x >= 0, b_r, b_z * b_r), 0.0)
    b_rest = tl.where(b_x >= 0, b_z * b_r, b_r)
    return b_mu, b_rest, tl.where(m_shifted, b_mu / b_l, 0.0), m_shifted


@triton.jit
def mass(b_g, b_m, b_unit):
    """``p [BM, BK]`` of logits."""
    return tl.exp(b_g - tl.where(b_m == float("-inf"), 0.0, b_m)[:, None]) * b_unit[:, None]


@triton.jit
def add_values(
    b_out, b_c, values, o_first, m_a, i_n,
    KEYS: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``out + sum_n c_n values_n`` over keys ``i_n..i_n + BK``; ``b_c [BM, BK]``."""
    o_k, o_d = i_n + tl.arange(0, BK), tl.arange(0, BD)
    if BK == 1:
        o_v = (o_first + i_n)[:, None] * D + o_d[None, :]
        b_v = tl.load(values + o_v, mask=m_a[:, None] & (o_d < D)[None, :], other=0.0)
        b_out += b_c * b_v
    else:
        o_v = (o_first + o_k)[:, None] * D + o_d[None, :]
        b_v = tl.load(values + o_v, mask=((o_k < KEYS) & m_a)[:, None] & (o_d < D)[None, :], other=0.0)
        b_out = tl.dot(b_c, b_v, b_out, input_precision=PRECISION)
    return b_out


@triton.jit
def attend(
    b_out, x, m_x, b_lse, weight, bias, shift, o_first, m_a, m_prefix,
    KEYS: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows ``out [BM, BD]`` of queries ``x`` with their virtual keys, and which of them have any."""
    b_m, b_l = normaliser(x, m_x, b_lse, weight, bias, o_first, m_a, KEYS, BK, D, BD)
    _, b_rest, b_unit, m_shifted = masses(b_m, b_l, b_lse, m_a)
    b_out *= tl.where(m_shifted & m_prefix, b_rest, 1.0)[:, None]
    for i_n in range(0, KEYS, BK):
        b_g = logits(x, m_x, weight, bias, o_first, m_a, i_n, KEYS, BK, D, BD)
        b_p = tl.where(m_shifted[:, None], mass(b_g, b_m, b_unit), 0.0)  # q of a row without keys may be NaN
        b_out = add_values(b_out, b_p, shift, o_first, m_a, i_n, KEYS, BK, D, BD)
    return b_out, m_shifted


def key_constants(
    H: int, weight: Tensor, adapter_ids: Tensor | None, prefix: Tensor | None
) -> tuple[int, int, bool]:
    """SHARE, KEYS and PER_QUERY; KEYS is 0 for one key of each head, which kernels have by themselves."""
    per_query = adapter_ids is not None and adapter_ids.dim() == 2
    one = is_one_key(H, weight, adapter_ids, prefix)
    return H // weight.shape[1], 0 if one else weight.shape[2], per_query


def id_strides(adapter_ids: Tensor | None) -> tuple[int, int]:
    """Of batch rows and of queries."""
    if adapter_ids is None:
        return 0, 0
    return adapter_ids.stride(0), adapter_ids.stride(1) if adapter_ids.dim() == 2 else 0
