"""Value and gradients of ``shifted_attention`` over its contract, and the identities it rests on."""

import functools
import os
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F

from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.ops.attention_shift._composed import stacked_parameters
from mmicl_kernels.ops.shifted_attention._stock import attention_kernel
from mmicl_kernels.ops.shifted_attention.visibility import Visibility
from mmicl_kernels.testing.budgets import (
    GATE_ROUNDINGS,
    assert_within_budget,
    eager_shifted_attention,
    gradients,
)
from mmicl_kernels.testing.inputs import normal, output_gradients, shifted_attention_inputs

# Triton has no fp64 here, and its interpreter rounds bf16 towards zero.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDE = (torch.float32,) if INTERPRETED else (torch.float64, torch.float32)
DTYPES = (*WIDE, torch.float16) if INTERPRETED else (*WIDE, torch.bfloat16, torch.float16)
NAMES = ("out", "lse", "dq", "dk", "dv", "dweight", "dbias", "dshift")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def keep(*shape, seed=0):
    """About two thirds True."""
    return normal(*shape, dtype=torch.float32, seed=seed) > -0.4


def hiding(value, *shape, dtype=None):
    """An additive mask like HuggingFace's: 0, or ``value(dtype)``; query 3 sees nothing else."""

    def build(q_dtype):
        mask_dtype = dtype or q_dtype
        visible = keep(*shape)
        visible[..., 3, :] = False
        return torch.zeros(shape, dtype=mask_dtype).masked_fill(~visible, value(mask_dtype))

    return build


def added(*shape):
    """A learned bias such as ALiBi's or T5's."""
    return lambda q_dtype: normal(*shape, dtype=q_dtype)


def lowest(dtype):
    return torch.finfo(dtype).min


def minus_inf(dtype):
    return -torch.inf


@dataclass(frozen=True)
class Case:
    """Sizes and arguments of one call, and why it is in the grid."""

    why: str
    sizes: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    dtypes: tuple = DTYPES

    def inputs(self, dtype, device):
        return shifted_attention_inputs(dtype=dtype, device=device, **self.sizes)

    def arguments(self, dtype, device):
        """Options as the op takes them; a mask may depend on q's dtype."""
        values = {k: v(dtype) if callable(v) else v for k, v in self.options.items()}
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def case(why, options=None, dtypes=DTYPES, **sizes):
    return Case(why, sizes, options or {}, dtypes)


PACKED = {
    "cu_seqlens_q": ints(0, 5, 5, 12, 21, 30),
    "cu_seqlens_k": ints(0, 9, 12, 12, 25, 37),
    "max_seqlen_q": 9,
    "max_seqlen_k": 13,
}
PACKED_SIZES = {"B": 1, "T": 30, "S": 37}

GRID = {
    # Sizes. Lengths are odd so that every block has a tail; 130 and more pass one block of 128 rows.
    "plain": case("no argument at all"),
    "causal": case("the prompt of a decoder", {"causal": True}),
    "decode": case("one query, the whole cache", {"causal": True}, T=1, S=63),
    "chunk": case("chunked prefill: aligned to the last key", {"causal": True}, T=5),
    "chunk_all": case("cross attention", {}, T=5),
    "long": case("several blocks", {"causal": True}, B=1, H=2, G=1, T=500, S=500),
    "longer": case("odd blocks, all keys", {}, B=1, H=1, G=1, T=257, S=1000),
    "more_queries": case("more queries than keys", {}, T=41, S=20),
    "more_queries_causal": case("the first 21 see no key", {"causal": True}, T=41, S=20),
    # Several such rows, and half precision: test_one_visible_key.
    "one": case("softmax is 1, its gradient 0", {"causal": True}, WIDE, T=1, S=1),
    "no_keys": case("an empty cache", {}, S=0),
    "no_keys_causal": case("an empty cache", {"causal": True, "window": 3}, S=0),
    "no_queries": case("an empty chunk", {}, T=0),
    "no_queries_causal": case("an empty chunk", {"causal": True, "window": 3}, T=0),
    "nothing": case("neither queries nor keys", {"causal": True}, T=0, S=0),
    "no_batch": case("an empty batch", {}, B=0),
    "no_batch_bounds": case(
        "an empty batch with bounds per row", {"causal": True, "kv_end": ints()}, B=0
    ),
    "mha": case("as many key heads as query heads", {"causal": True}, H=3, G=3),
    "mqa": case("one key head", {"causal": True}, H=5, G=1),
    "gqa_3": case("groups of three", {"causal": True}, H=6, G=2),
    **{
        f"head_dim_{D}": case("head dims of real models, most no powers of two", {}, D=D)
        for D in (40, 72, 80, 96, 128)
    },
    "head_dim_1": case("any stride is contiguous", {"causal": True}, D=1),
    # Layouts.
    "heads_last": case("as q_proj leaves it", {"causal": True}, layout="heads_last"),
    "sliced": case("window of a cache: odd offsets", {"causal": True}, layout="sliced"),
    "sliced_softcap": case("the same, in blocks", {"softcap": 2.0}, layout="sliced"),
    "expanded": case("one row for all beams: stride 0", {"causal": True}, layout="expanded"),
    "half_parameters": case("parameters in bf16", {}, parameter_dtype=torch.bfloat16),
    # Position of the first query.
    "q_start_0": case("static cache: keys after T are unused", {"causal": True, "q_start": 0}, T=9),
    "q_start_0_long": case("top-left with more queries", {"causal": True, "q_start": 0}, S=20),
    "q_start_7": case("a chunk within the cache", {"causal": True, "q_start": 7}, T=9),
    "q_start_negative": case("five queries see no key", {"causal": True, "q_start": -5}),
    "q_start_far_left": case("no query sees a key", {"causal": True, "q_start": -50}),
    "q_start_far_right": case("causal hides nothing", {"causal": True, "q_start": 100}),
    "q_start_rows": case("one position per row", {"causal": True, "q_start": ints(-4, 21)}, T=9),
    "q_start_int64": case("int64 is allowed", {"causal": True, "q_start": ints(3, 5).long()}, T=9),
    "q_start_ignored": case("means nothing without causal or window", {"q_start": 3}),
    # Window.
    "window": case("left side only: the keys after a query stay", {"window": 8}),
    "window_1": case("the narrowest", {"window": 1}),
    "window_causal": case("Mistral's", {"window": 8, "causal": True}),
    "window_wide": case("hides nothing", {"window": 37, "causal": True}),
    "window_off_by_one": case("hides one key of one query", {"window": 36, "causal": True}),
    "window_beyond": case("queries far behind the keys see none", {"window": 4, "q_start": 30}),
    "window_rows": case(
        "all conditions at once",
        {"window": 6, "causal": True, "q_start": ints(4, 20), "kv_start": ints(2, 19),
         "kv_end": ints(11, 30)},
        T=9,
    ),  # fmt: skip
    # Bounds of the cache.
    "kv_start": case("left padding: blind queries", {"causal": True, "kv_start": ints(0, 9)}),
    "kv_end": case("right padding", {"kv_end": ints(37, 20)}),
    "kv_end_causal": case(
        "static cache, decode: q_start is kv_end - T", {"causal": True, "kv_end": ints(37, 21)}, T=3
    ),
    "kv_end_0": case("an unused row", {"causal": True, "kv_end": ints(0, 37)}),
    "kv_end_q_start": case(
        "prefill of a static cache", {"causal": True, "kv_end": ints(9, 5), "q_start": 0}, T=9
    ),
    "kv_crossed": case("start after end: nothing", {"kv_start": ints(9, 0), "kv_end": ints(5, 30)}),
    "kv_int64": case("int64 is allowed", {"kv_end": ints(30, 20).long()}),
    # Masks. Query 3 of the additive ones sees no unmasked key.
    "mask": case("any pattern", {"mask": keep(2, 4, 37, 37)}),
    "mask_causal": case("both apply", {"mask": keep(2, 1, 37, 37), "causal": True}),
    "mask_all": case("hides everything", {"mask": torch.zeros(37, 37, dtype=torch.bool)}),
    "mask_keys": case("HuggingFace's padding mask", {"mask": keep(2, 1, 1, 37)}),
    "mask_queries": case("broadcast over keys", {"mask": keep(1, 4, 37, 1)}),
    "mask_queries_causal": case("the same, fewer keys", {"mask": keep(37, 1), "q_start": 0,
                                                         "causal": True}, S=50),
    "mask_1d": case("fewer dimensions", {"mask": keep(37)}),
    "mask_0d": case("no dimension", {"mask": torch.tensor(True)}),
    "mask_bounds": case(
        "with bounds and window", {"mask": keep(2, 1, 37, 37), "kv_start": ints(3, 0), "window": 9}
    ),
    "bias": case("of q's dtype, per head", {"mask": added(1, 4, 37, 37)}),
    "bias_causal": case("with causal", {"mask": added(1, 4, 37, 37), "causal": True}),
    "bias_cut": case("fewer keys are reachable", {"mask": added(2, 1, 9, 37), "q_start": 2,
                                                  "causal": True}, T=9),
    "bias_keys": case("broadcast over queries", {"mask": added(2, 1, 1, 37)}),
    "bias_queries": case("broadcast over keys: changes lse alone", {"mask": added(37, 1)}),
    "bias_transposed": case("strided", {"mask": lambda dtype: added(4, 37, 37)(dtype).mT}),
    "bias_every_other": case("strided", {"mask": lambda dtype: added(37, 74)(dtype)[:, ::2]}),
    "bias_fp64": case("wider than q", {"mask": added(1, 4, 37, 37)(torch.float64)}),
    "hide_inf": case("-inf, and a query that sees no key", {"mask": hiding(minus_inf, 2, 1, 37, 37)}),
    "hide_inf_causal": case("with causal", {"mask": hiding(minus_inf, 37, 37), "causal": True}),
    "hide_inf_fp32": case(
        "fp32 beside q", {"mask": hiding(minus_inf, 2, 1, 37, 37, dtype=torch.float32)}
    ),
    "hide_finite": case("finfo.min of q's dtype", {"mask": hiding(lowest, 2, 1, 37, 37)}),
    "hide_finite_causal": case("with causal", {"mask": hiding(lowest, 37, 37), "causal": True}),
    "hide_finite_fp32": case(
        "finfo.min of fp32 beside q", {"mask": hiding(lowest, 2, 1, 37, 37, dtype=torch.float32)}
    ),
    "hide_1e9": case("the constant of older code", {"mask": hiding(lambda _: -1e9, 37, 37,
                                                                   dtype=torch.float32)}),
    # Scores.
    "softcap": case("Gemma 2's, here strong", {"softcap": 2.0, "causal": True}),
    "softcap_blocks": case("two blocks of queries, bounds", {"softcap": 2.0, "kv_start": ints(5)},
                           B=1, H=2, G=1, T=150, S=140),
    "softcap_mask": case("with a mask per query", {"softcap": 3.0, "mask": keep(2, 1, 150, 1)},
                         H=2, G=1, T=150, S=9),
    "scale": case("not the default", {"scale": 0.7, "causal": True}),
    # The eager form's lse is exact here in half precision; CPU flash's exp is good to 1e-5 there.
    "scale_0": case("uniform attention; an int", {"scale": 0}, WIDE),
    "scale_negative": case("allowed", {"scale": -0.5}),
    # Gates saturate too: the fp64 oracle itself loses 1 - mu, which the C++ kernels keep.
    "scale_large": case("saturated softmax", {"scale": 30.0, "causal": True}, DTYPES[1:]),
    # Adapters.
    "ids": case("one per row", {"adapter_ids": ints(1, -1, 0)}, B=3, adapters=2),
    "ids_shared": case("rows share one, one is unused", {"adapter_ids": ints(2, 2, 0),
                                                         "causal": True}, B=3, adapters=4),
    "ids_none": case("all off", {"adapter_ids": ints(-1, -1)}, adapters=2),
    "ids_int64": case("int64 is allowed", {"adapter_ids": ints(1, -1).long()}, adapters=2),
    "ids_blind": case("with queries that see no key", {"adapter_ids": ints(1, 0), "causal": True,
                                                       "q_start": -5}, adapters=2),
    # The official gate.
    "all_keys": case("hides nothing: equal to visible", {"normalizer": "all_keys"}),
    **{
        f"all_keys_{name}": case("the gate ignores it", {"normalizer": "all_keys", **options}, **sizes)
        for name, options, sizes in (
            ("causal", {"causal": True}, {}),
            ("window", {"causal": True, "window": 5}, {}),
            ("q_start", {"causal": True, "q_start": ints(-3, 9)}, {"T": 9}),
            ("kv_start", {"causal": True, "kv_start": ints(3, 0)}, {}),
            ("mask", {"mask": keep(2, 1, 37, 37)}, {}),
            ("bias", {"mask": hiding(minus_inf, 2, 1, 37, 37)}, {}),
            ("bias_fp32", {"mask": hiding(lowest, 37, 37, dtype=torch.float32)}, {}),
        )
    },
    "all_keys_kv_end": case("the gate respects it", {"normalizer": "all_keys", "causal": True,
                                                     "kv_end": ints(30, 11)}, T=5),
    "all_keys_softcap": case("the gate respects it", {"normalizer": "all_keys", "causal": True,
                                                      "softcap": 2.0}),
    "all_keys_ids": case("with adapters", {"normalizer": "all_keys", "causal": True,
                                           "adapter_ids": ints(1, -1)}, adapters=2),
    "all_keys_blind": case("a blind query whose hidden scores overflow exp",
                           {"normalizer": "all_keys", "causal": True, "q_start": -5,
                            "scale": 60.0}),
    "all_keys_empty": case("an empty cache", {"normalizer": "all_keys", "causal": True}, S=0),
    # Packed sequences: no queries in the second, no keys in the third, more keys than queries else.
    "packed": case("all keys of the sequence", PACKED, **PACKED_SIZES),
    "packed_causal": case("aligned to the last key", {**PACKED, "causal": True}, **PACKED_SIZES),
    "packed_window": case("with window and softcap", {**PACKED, "causal": True, "window": 3,
                                                      "softcap": 2.0}, **PACKED_SIZES),
    "packed_ids": case("one adapter per sequence", {**PACKED, "adapter_ids": ints(1, 0, 0, -1, 0)},
                       adapters=2, **PACKED_SIZES),
    "packed_all_keys": case("the gate within the sequence", {**PACKED, "causal": True,
                                                             "normalizer": "all_keys"},
                            **PACKED_SIZES),
    "packed_sliced": case("strided", {**PACKED, "causal": True}, layout="sliced", **PACKED_SIZES),
    "packed_empty": case("no sequence", {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0),
                                         "max_seqlen_q": 0, "max_seqlen_k": 0}, B=1, T=0, S=0),
}  # fmt: skip


@functools.cache
def budget(name, dtype, device):
    """Inputs, gradients of the outputs, and per ``through_lse`` the eager results and the exact ones."""
    arguments = GRID[name].arguments(dtype, device)
    inputs = GRID[name].inputs(dtype, device)
    douts = output_gradients(*inputs[0].shape, dtype=dtype, device=device)
    wide = [x.double() for x in inputs]
    low, exact = {}, {}
    for through_lse in (False, True):
        dlse = douts[1] if through_lse else None
        low[through_lse] = [
            eager_with_channels(order, inputs, arguments, (douts[0], dlse))
            for order in channel_orders(inputs[0].shape[-1])
        ]
        exact[through_lse] = gradients(
            lambda *x: shifted_attention(*x, **arguments, return_lse=True, impl="reference"),
            wide,
            (douts[0].double(), dlse if dlse is None else dlse.double()),
        )
    return inputs, arguments, douts, low, exact


def channel_orders(D):
    generator = torch.Generator().manual_seed(0)
    return [torch.arange(D), *(torch.randperm(D, generator=generator) for _ in range(2))]


def eager_with_channels(order, inputs, arguments, douts):
    """The eager form with its channels in another order, which changes its roundings alone."""
    order = order.to(inputs[0].device)

    def permuted(q, k, v, weight, bias, shift):
        q, k, v, weight, shift = (x[..., order] for x in (q, k, v, weight, shift))
        out, lse = eager_shifted_attention(q, k, v, weight, bias, shift, **arguments)
        return out[..., order.argsort()], lse

    return gradients(permuted, inputs, douts)


def run(inputs, arguments, douts, impl):
    return gradients(lambda *x: shifted_attention(*x, **arguments, return_lse=True, impl=impl), inputs, douts)


def largest_resolved(values):
    """The largest finite size that does not swallow a score of 1 in the accumulation dtype."""
    acc = torch.promote_types(values.dtype, torch.float32)
    sizes = values[torch.isfinite(values)].abs().to(acc)
    sizes = sizes[sizes * torch.finfo(acc).eps < 1]
    return float(sizes.max()) if sizes.numel() else 0.0


def widest(impl):
    return torch.float32 if impl == "triton" else torch.float64


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if INTERPRETED and dtype == torch.float16 else [],
        )
        for name, case in GRID.items()
        for dtype in case.dtypes
    ],
)
def test_value_and_gradients(name, dtype, impl, device):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("triton has no fp64")
    inputs, arguments, douts, low, exact = budget(name, dtype, device)
    # Interpreting is slow: each way in one dtype there.
    for through_lse in (dtype == torch.float32,) if INTERPRETED else (False, True):
        dlse = douts[1] if through_lse else None
        outputs, grads = run(inputs, arguments, (douts[0], dlse), impl)
        eager = zip(*(sum(run, ()) for run in low[through_lse]), strict=True)
        compared = zip(NAMES, outputs + grads, eager, sum(exact[through_lse], ()), strict=True)
        roundings = GATE_ROUNDINGS + largest_resolved(outputs[1])
        for label, actual, lows, wide in compared:
            label = f"{label}, through_lse={through_lse}"
            assert_within_budget(label, actual, lows, wide, roundings)
        assert outputs[0].dtype == dtype
        assert outputs[1].dtype == torch.promote_types(dtype, torch.float32)
        assert [g.dtype for g in grads] == [x.dtype for x in inputs]
        assert outputs[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", GRID)
def test_the_reference_agrees_with_independent_code(name):
    """In fp64 they may differ by the rounding of sums over S keys and D channels, times the scores' size."""
    inputs, arguments, douts, _, exact = budget(name, torch.float64, "cpu")
    inputs = [x.double() for x in inputs]
    eager = gradients(lambda *x: eager_shifted_attention(*x, **arguments), inputs, douts)
    q, k = inputs[:2]
    largest = (q.norm(dim=-1).flatten().tolist() or [0.0], k.norm(dim=-1).flatten().tolist() or [0.0])
    largest = abs(arguments.get("scale", 1)) * max(largest[0]) * max(largest[1])
    if isinstance(arguments.get("mask"), torch.Tensor) and arguments["mask"].dtype != torch.bool:
        largest += largest_resolved(arguments["mask"].double())
    bound = (k.shape[2] + q.shape[3]) * torch.finfo(torch.float64).eps * max(1.0, largest)
    for label, other, reference in zip(NAMES, sum(eager, ()), sum(exact[True], ()), strict=True):
        finite = torch.isfinite(reference)
        assert torch.equal(reference[~finite], other[~finite]), label
        error = (reference - other)[finite].norm()
        assert error <= bound * max(1.0, float(reference[finite].norm())), label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_visible_key(dtype, impl):
    """Where softmax is 1 its gradient is 0, and what composed leaves there is its rounding of delta.

    ``delta = dout . base`` with ``out`` and ``base`` rounded to dtype once each: an error of at most
    ``u sum |dout| (|out| + |base|)`` in each dscore, beside the eager form's 0. The exact part, some
    sums in the accumulation dtype and one rounding, gets ``4 u`` of its own size and of 1.
    """
    options = {"causal": True, "window": 1}
    inputs = shifted_attention_inputs(dtype=dtype, H=2, G=2)
    douts = output_gradients(*inputs[0].shape, dtype=dtype)
    outputs, grads = run(inputs, options, douts, impl)
    wide = [x.double() for x in inputs]
    exact, exact_grads = run(wide, options, [x.double() for x in douts], "reference")
    q, k, v, _, _, shift = wide
    u = torch.finfo(dtype).eps / 2
    sizes = exact[0].abs() + v.abs() + shift.abs()[:, None]  # |base| <= |a| + mu^2 |shift|, and a = v
    dscores = u * (douts[0].double().abs() * sizes).sum(-1, keepdim=True)
    for actual, wanted, other in zip(grads[:2], exact_grads[:2], (k, q), strict=True):
        bound = q.shape[-1] ** -0.5 * dscores * other.abs() + 4 * u * (1 + wanted.abs())
        assert ((actual.double() - wanted).abs() <= bound).all()
    for actual, wanted in zip((outputs[0], grads[2]), (exact[0], exact_grads[2]), strict=True):
        assert ((actual.double() - wanted).abs() <= 4 * u * (1 + wanted.abs())).all()


def test_mu_is_the_softmax_mass_of_a_virtual_key(impl, device):
    """Append per head a key with logit g and value ``a + shift``: its softmax output is the shifted one."""
    dtype = widest(impl)
    q, k, v, weight, bias, shift = shifted_attention_inputs(dtype=dtype, device=device, G=4)
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.transpose(-1, -2)
    logit = (q @ weight[:, :, None]) + bias[:, None, None]
    a = torch.softmax(scores, -1) @ v
    weights = torch.softmax(torch.cat((scores, logit), -1), -1)
    virtual = weights[..., :-1] @ v + weights[..., -1:] * (a + shift[:, None])
    out = shifted_attention(q, k, v, weight, bias, shift, impl=impl)
    torch.testing.assert_close(out, virtual)


@pytest.mark.parametrize("normalizer", ("visible", "all_keys"))
def test_queries_that_see_no_key(normalizer, impl, device):
    inputs = shifted_attention_inputs(dtype=torch.float32, device=device, B=1)
    mask = torch.ones(37, 37, dtype=torch.bool, device=device)
    mask[[0, 5, 36]] = False
    douts = output_gradients(*inputs[0].shape, dtype=torch.float32, device=device)
    options = {"mask": mask, "normalizer": normalizer}
    (out, lse), grads = run(inputs, options, douts, impl)
    blind = ~mask.any(-1)
    assert not out[:, :, blind].any() and (lse[:, :, blind] == -torch.inf).all()
    assert not grads[0][:, :, blind].any()
    # Their gradients, whatever they are, reach nothing else.
    others = [dy.clone() for dy in douts]
    others[0][:, :, blind] *= 1e6
    others[1][:, :, blind] *= -1e6
    for first, second in zip(grads, run(inputs, options, others, impl)[1], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mask_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_finite_masks_leave_a_uniform_row(mask_dtype, impl, device):
    """HuggingFace's float masks: in a row of finfo.min scores vanish in rounding, all keys count the same."""
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    q, k, v, *parameters = shifted_attention_inputs(dtype=dtype, device=device, G=4)
    mask = torch.zeros(2, 1, 37, 37, dtype=mask_dtype, device=device)
    mask[:, :, 4] = torch.finfo(mask_dtype).min
    out, lse = shifted_attention(q, k, v, *parameters, mask=mask, return_lse=True, impl=impl)
    mean = v.float().mean(2) + parameters[2]  # the gate is open: lse is about finfo.min
    u = torch.finfo(dtype).eps / 2
    assert ((out[:, :, 4] - mean).abs() <= 2 * u * (mean.abs() + v.float().abs().mean(2))).all()
    assert torch.isfinite(lse).all() and torch.isfinite(out).all()


def test_rows_without_adapter_are_plain_attention(impl, device):
    q, k, v, *parameters = shifted_attention_inputs(device=device, B=3, adapters=2)
    ids = ints(1, -1, 0).to(device)
    out = shifted_attention(q, k, v, *parameters, causal=True, adapter_ids=ids, impl=impl)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[1], plain[1])
    assert (out[[0, 2]] - plain[[0, 2]]).abs().amax() > 0.1


def test_prefill_and_decode_equal_one_forward(impl, device):
    """For "visible"; "all_keys" looks at keys after the query, so there they must differ."""
    q, k, v, *parameters = shifted_attention_inputs(dtype=widest(impl), device=device, T=20, S=20, B=1)
    for normalizer in ("visible", "all_keys"):
        options = {"causal": True, "normalizer": normalizer, "impl": impl}
        whole = shifted_attention(q, k, v, *parameters, **options)
        steps = [
            shifted_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], *parameters, **options)
            for a, b in ((0, 13), (13, 14), (14, 19), (19, 20))
        ]
        # The same in a static cache, whose unused rows hold anything finite.
        k_cache, v_cache = (x.clone() for x in (k, v))
        k_cache[:, :, 14:], v_cache[:, :, 14:] = 1e4, -1e4
        end = ints(14).to(device)
        cached = shifted_attention(q[:, :, 13:14], k_cache, v_cache, *parameters, kv_end=end, **options)
        torch.testing.assert_close(cached, steps[1])
        difference = (torch.cat(steps, 2) - whole).abs().amax()
        if normalizer == "visible":
            torch.testing.assert_close(torch.cat(steps, 2), whole)
        else:
            assert difference > 1e-2


def test_dropping_the_gradient_through_lse_breaks_the_budget(device):
    """Stock backward with the unshifted attention output as ``out``: what FlashAttention 2 and 3 do."""
    dtype = torch.float32
    inputs = shifted_attention_inputs(dtype=dtype, device=device, G=4)
    q, k, v, *parameters = inputs
    dout, _ = output_gradients(*q.shape, dtype=dtype, device=device)
    kernel = attention_kernel(q, k, q.shape[-1] ** -0.5, None, Visibility())
    a, lse = kernel.forward(q, k, v)
    weight, bias, shift = (x[0] for x in stacked_parameters(q, *parameters))
    mu = torch.sigmoid((q * weight[:, None]).sum(-1) + bias[:, None] - lse)
    dg = mu * (1 - mu) * (dout * shift[:, None]).sum(-1)
    base = a + (mu - mu**2)[..., None] * shift[:, None]

    wide = [x.double() for x in inputs]
    exact = run(wide, {}, (dout.double(), None), "reference")[1]
    low = gradients(eager_shifted_attention, inputs, (dout, None))[1]
    for out, dropped in ((base, False), (a, True)):
        dq, dk, dv = kernel.backward(dout, q, k, v, out, lse)
        dq = dq + dg[..., None] * weight[:, None]
        assert_within_budget("dv", dv, low[2], exact[2])
        for name, actual, i in (("dq", dq, 0), ("dk", dk, 1)):
            if not dropped:
                assert_within_budget(name, actual, low[i], exact[i])
                continue
            with pytest.raises(AssertionError, match="exceeds the budget"):
                assert_within_budget(name, actual, low[i], exact[i])
            error = (actual - exact[i]).norm() / exact[i].norm()
            eager_error = (low[i] - exact[i]).norm() / exact[i].norm()
            assert error > 5 * (2 * eager_error + GATE_ROUNDINGS * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "options",
    (
        {"causal": True},
        {"causal": True, "normalizer": "all_keys"},
        {"causal": True, "window": 2, "softcap": 2.0},
        {"mask": keep(2, 1, 4, 5)},
        {"adapter_ids": ints(1, -1)},
    ),
    ids=("causal", "all_keys", "window_softcap", "mask", "ids"),
)
def test_gradcheck(options, impl):
    if impl == "triton":
        pytest.skip("triton has no fp64")
    adapters = 2 if "adapter_ids" in options else None
    inputs = shifted_attention_inputs(2, 2, 1, 4, 5, 3, adapters=adapters, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    finite = options.get("mask", torch.ones(1, dtype=torch.bool)).any(-1)

    def call(*x):
        out, lse = shifted_attention(*x, **options, return_lse=True, impl=impl)
        return out, lse.where(finite, 0.0)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("constant", (True, False), ids=("constant_dout", "dout_with_grad"))
def test_double_backward_is_refused(constant, composed):
    inputs = [x.requires_grad_() for x in shifted_attention_inputs()]
    out = shifted_attention(*inputs, impl=composed)
    dout = torch.ones_like(out).requires_grad_(not constant)
    (dq,) = torch.autograd.grad(out, inputs[:1], dout, create_graph=True)
    with pytest.raises(RuntimeError, match="shifted_attention cannot be differentiated twice"):
        dq.sum().backward()


def test_func_grad(impl):
    """torch.func.grad builds a graph of the backward, which must not be refused before it is used."""
    q, *others = shifted_attention_inputs()
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(shifted_attention(leaf, *others, impl=impl).sum(), leaf)
    dq = torch.func.grad(lambda x: shifted_attention(x, *others, impl=impl).sum())(q)
    torch.testing.assert_close(dq, expected)


def test_vmap_is_refused(composed):
    q, k, v, *parameters = shifted_attention_inputs()
    with pytest.raises(NotImplementedError, match="vmap.*impl='reference'"):
        torch.func.vmap(lambda x: shifted_attention(x, k, v, *parameters, impl=composed))(q[None])


def test_only_the_parameters_may_train(composed):
    """As in MimIC: the model is frozen, and k and v need no gradient."""
    inputs = shifted_attention_inputs()
    douts = output_gradients(*inputs[0].shape, dtype=torch.float32)
    all_grads = run(inputs, {"causal": True}, (douts[0], None), composed)[1]
    for parameter in inputs[3:]:
        parameter.requires_grad_()
    out = shifted_attention(*inputs, causal=True, impl=composed)
    assert all(
        torch.equal(x, y)
        for x, y in zip(torch.autograd.grad(out, inputs[3:], douts[0]), all_grads[3:], strict=True)
    )


def test_gradients_of_any_layout(composed):
    """``out.sum()`` sends an expanded scalar back, a transposed loss a strided tensor."""
    inputs = [x.requires_grad_() for x in shifted_attention_inputs()]
    out = shifted_attention(*inputs, impl=composed)
    dense = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    strided = torch.autograd.grad(out.mT.contiguous().sum(), inputs)
    for first, *others in zip(dense, expanded, strided, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bf16 towards zero")
def test_autocast(impl):
    """fp32 queries under autocast are bf16 queries; the fp32 parameters stay, with fp32 gradients."""
    inputs = shifted_attention_inputs()
    dout, dlse = output_gradients(*inputs[0].shape, dtype=torch.bfloat16)
    half = [x.bfloat16() for x in inputs[:3]] + list(inputs[3:])
    outputs, grads = run(half, {"causal": True}, (dout, dlse), impl)

    def call(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return shifted_attention(*x, causal=True, return_lse=True, impl=impl)

    cast_outputs, cast_grads = gradients(call, inputs, (dout, dlse))
    with torch.autocast("cpu", torch.bfloat16):
        fp64 = shifted_attention(*(x.double() for x in inputs), impl=impl)
    assert fp64.dtype == torch.float64
    for first, second in zip(outputs, cast_outputs, strict=True):
        assert first.dtype == second.dtype and torch.equal(first, second)
    for first, second in zip(grads, cast_grads, strict=True):
        assert second.dtype == torch.float32 and torch.equal(first.float(), second)


@pytest.mark.parametrize("normalizer", ("visible", "all_keys"))
def test_memory_grows_with_the_length_alone(normalizer, composed):
    """All that forward and backward allocate together is less than one [T, S] matrix of scores."""
    T = 2048
    inputs = shifted_attention_inputs(1, 2, 1, T, T, 16)
    for x in inputs:
        x.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        out = shifted_attention(*inputs, causal=True, normalizer=normalizer, impl=composed)
        out.backward(torch.ones_like(out))
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 2 * out.numel() * 4 < allocated < T * T * 4
