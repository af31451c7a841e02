"""The contract of ``shifted_attention`` as a grid of calls, each with its exact result and its budget."""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.testing.budgets import (
    GATE_ROUNDINGS,
    assert_all_within_budget,
    eager_shifted_attention,
    gradients,
)
from mmicl_kernels.testing.inputs import ints, normal, output_gradients, shifted_attention_inputs
from tests.ops.triton_process import FLOATS, INTERPRETED

# Triton has no fp64 here.
WIDE = (torch.float32,) if INTERPRETED else (torch.float64, torch.float32)
NAMES = ("out", "lse", "dq", "dk", "dv", "dweight", "dbias", "dshift")


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
    dtypes: tuple = FLOATS

    def inputs(self, dtype, device):
        return shifted_attention_inputs(dtype=dtype, device=device, **self.sizes)

    def arguments(self, dtype, device):
        """Options as the op takes them; a mask may depend on q's dtype."""
        values = {k: v(dtype) if callable(v) else v for k, v in self.options.items()}
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def case(why, options=None, dtypes=FLOATS, **sizes):
    return Case(why, sizes, options or {}, dtypes)


def ids_of(B, T):
    """Of three adapters and none, one for each query."""
    return ints(*range(B * T)).view(B, T) * 7 % 4 - 1


QUERY_IDS = ids_of(2, 9)
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
    "decode_7": case("groups of seven, one speculated token", {"causal": True}, H=7, G=1, T=2, S=63),
    "decode_16": case("sixteen tokens at once", {"causal": True}, H=3, G=1, T=16, S=41),
    "decode_short": case("most of the cache is unused", {"causal": True, "kv_end": ints(3, 40)},
                         T=1, S=130),
    "tiles": case("inner tiles of every kernel", {"causal": True}, B=1, H=2, G=1, T=130, S=130),
    "long": case("several blocks", {"causal": True}, B=1, H=2, G=1, T=500, S=500),
    "longer": case("odd blocks, all keys", {}, B=1, H=1, G=1, T=257, S=1000),
    "more_queries": case("more queries than keys", {}, T=41, S=20),
    "more_queries_causal": case("the first 21 see no key", {"causal": True}, T=41, S=20),
    # Several such rows: test_large_shifts.py.
    "one": case("softmax is 1, its gradient 0", {"causal": True}, T=1, S=1),
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
    "scale_large": case("saturated softmax and gates", {"scale": 30.0, "causal": True}),
    # Adapters.
    "ids": case("one per row", {"adapter_ids": ints(1, -1, 0)}, B=3, adapters=2),
    "ids_shared": case("rows share one, one is unused", {"adapter_ids": ints(2, 2, 0),
                                                         "causal": True}, B=3, adapters=4),
    "ids_none": case("all off", {"adapter_ids": ints(-1, -1)}, adapters=2),
    "ids_int64": case("int64 is allowed", {"adapter_ids": ints(1, -1).long()}, adapters=2),
    # Virtual keys, P heads of N: beside the attention, or a prefix of it.
    **{
        f"{'prefix' if prefix else 'keys'}_{N}": case(
            "N virtual keys", {"prefix": prefix, **options}, virtual=(P, N), **sizes
        )
        for prefix in (False, True)
        for N, P, options, sizes in (
            (1, 2, {}, {}), (2, 4, {"causal": True}, {"T": 9}), (5, 1, {"causal": True}, {"D": 40}),
            (8, 4, {"causal": True}, {}), (16, 2, {"window": 8}, {"T": 20}), (64, 4, {}, {"T": 5, "S": 9}),
            (128, 2, {}, {"T": 3, "S": 20, "D": 72}),
        )
    },
    **{
        f"prefix_{name}": case(why, {"prefix": True, **options}, **{"virtual": (2, 3), **sizes})
        for name, why, options, sizes in (
            ("one", "one key of each head", {"causal": True}, {"virtual": None}),
            ("decode", "one query, the whole cache", {"causal": True}, {"T": 1, "S": 63}),
            ("split", "a decode in parts", {"kv_end": ints(600, 3)}, {"T": 1, "S": 600}),
            ("blind", "queries that see no key", {"causal": True, "kv_start": ints(0, 9)}, {}),
            ("window", "all conditions at once",
             {"window": 6, "causal": True, "q_start": ints(4, 20), "kv_start": ints(2, 19),
              "kv_end": ints(11, 30)}, {"T": 9}),
            ("mask", "any pattern", {"mask": keep(2, 4, 37, 37)}, {}),
            ("bias", "a learned bias", {"mask": added(1, 4, 37, 37)}, {}),
            ("hide_inf", "-inf hides", {"mask": hiding(minus_inf, 37, 37), "causal": True}, {}),
            ("hide_finite", "finfo.min does not", {"mask": hiding(lowest, 2, 1, 37, 37)}, {}),
            ("softcap", "Gemma 2's, here strong", {"softcap": 2.0, "causal": True}, {}),
            ("all_keys", "the official HiFICL", {"normalizer": "all_keys", "causal": True}, {}),
            ("all_keys_hide_finite", "a row of finfo.min beside a gate of other keys",
             {"normalizer": "all_keys", "mask": hiding(lowest, 2, 1, 37, 37)}, {}),
            ("no_keys", "an empty cache", {}, {"S": 0}),
            ("sliced", "odd offsets", {"causal": True}, {"layout": "sliced"}),
            ("half", "parameters in bf16", {}, {"parameter_dtype": torch.bfloat16}),
            ("packed", "packed sequences", {**PACKED, "causal": True}, PACKED_SIZES),
        )
    },
    "keys_ids": case("a prefix beside shifts", {"adapter_ids": ints(1, -1, 0), "causal": True,
                                                "prefix": torch.tensor([True, False, True])},
                     B=3, adapters=3, virtual=(2, 3)),
    "keys_all_keys": case("the gate ignores it", {"normalizer": "all_keys", "causal": True}, virtual=(4, 3)),
    "keys_packed_ids": case("one adapter per sequence", {**PACKED, "adapter_ids": ints(1, 0, 0, -1, 0),
                                                         "prefix": torch.tensor([True, False])},
                            adapters=2, virtual=(4, 3), **PACKED_SIZES),
    "ids_of_queries": case("an adapter of each query", {"adapter_ids": QUERY_IDS, "causal": True},
                           adapters=3, T=9),
    "ids_of_packed_queries": case("the same, packed", {**PACKED, "causal": True, "adapter_ids": ids_of(1, 30),
                                                       "prefix": torch.tensor([False, True, False])},
                                  adapters=3, virtual=(2, 2), **PACKED_SIZES),
    "keys_of_queries": case("with several keys", {"adapter_ids": QUERY_IDS.long(), "window": 4,
                                                  "prefix": torch.tensor([True, False, True])},
                            adapters=3, virtual=(2, 5), T=9),
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

# One of each kind. In other dtypes than its main one, a GPU compiles Triton's kernels for these alone.
TYPICAL = (
    "causal", "chunk", "more_queries_causal", "gqa_3", "head_dim_40", "sliced_softcap", "window_rows",
    "kv_start", "mask_bounds", "hide_inf_causal", "all_keys_window", "packed_window", "packed_ids",
    "ids_blind", "tiles", "keys_8", "prefix_5", "keys_of_queries",
)  # fmt: skip
# Whose kernels' way others take, too, in the interpreter.
NOT_INTERPRETED = {
    *(f"keys_{N}" for N in (1, 2, 5, 16, 64, 128)), *(f"prefix_{N}" for N in (1, 2, 8, 16, 64)),
    "prefix_hide_inf", "prefix_hide_finite", "prefix_no_keys", "prefix_sliced", "prefix_half", "prefix_bias",
    "prefix_blind", "prefix_window",
}  # fmt: skip
# In the interpreter these take the kernels' way of another case, or take long.
SLOW = {
    "long", "longer", "head_dim_72", "head_dim_80", "head_dim_128", "all_keys", "all_keys_causal",
    "all_keys_bias_fp32", "ids_int64", "mask_0d", "hide_inf_fp32", "hide_finite_causal", "bias_fp64",
    "prefix_128", "prefix_mask", "prefix_softcap", "prefix_packed", "keys_all_keys", "keys_packed_ids",
    "ids_of_queries", "prefix_split", "prefix_all_keys", "bias_transposed", "bias_queries", "bias_keys",
}  # fmt: skip


class Budget(NamedTuple):
    """Per ``through_lse`` the eager form's results, in several orders of its channels, and the exact ones."""

    inputs: tuple
    arguments: dict
    douts: tuple
    low: dict
    exact: dict


@functools.cache
def budget(name, dtype, device):
    return budget_of(GRID[name], dtype, device)


def budget_of(case, dtype, device, ways=(False, True)):
    arguments = case.arguments(dtype, device)
    inputs = case.inputs(dtype, device)
    dout, dlse = output_gradients(*inputs[0].shape, dtype=dtype, device=device)
    wide = [x.double() for x in inputs]
    low, exact = {}, {}
    for through_lse in ways:
        low[through_lse] = [
            eager_with_channels(order, inputs, arguments, (dout, dlse if through_lse else None))
            for order in channel_orders(inputs[0].shape[-1])
        ]
        exact[through_lse] = run(wide, arguments, (dout.double(), dlse if through_lse else None), "reference")
    return Budget(inputs, arguments, (dout, dlse), low, exact)


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


def assert_forward(given, impl="triton"):
    """``out`` and ``lse`` of a call within their budgets."""
    inputs, arguments, _, low, exact = given
    outputs = shifted_attention(*inputs, **arguments, return_lse=True, impl=impl)
    lows = [results[0] for results in low[False]]
    roundings = GATE_ROUNDINGS + largest_resolved(outputs[1])
    assert_all_within_budget(NAMES[:2], outputs, lows, exact[False][0], roundings)


def assert_same_bits(first, second, *context):
    """Of two pairs of outputs and gradients."""
    for label, x, y in zip(NAMES, sum(first, ()), sum(second, ()), strict=True):
        assert torch.equal(x, y), (label, *context)


def assert_values(name, dtype, impl, device, through_lse):
    """A call of the grid by ``impl``, forward and backward, within its budgets."""
    assert_within(budget(name, dtype, device), impl, through_lse)


def assert_within(given, impl, through_lse):
    inputs, arguments, (dout, dlse), low, exact = given
    outputs, grads = run(inputs, arguments, (dout, dlse if through_lse else None), impl)
    lows = [sum(results, ()) for results in low[through_lse]]
    labels = [f"{name}, through_lse={through_lse}" for name in NAMES]
    roundings = GATE_ROUNDINGS + largest_resolved(outputs[1])
    assert_all_within_budget(labels, outputs + grads, lows, sum(exact[through_lse], ()), roundings)
    assert outputs[0].dtype == inputs[0].dtype
    assert outputs[1].dtype == torch.promote_types(inputs[0].dtype, torch.float32)
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    assert outputs[0].transpose(1, 2).is_contiguous()
