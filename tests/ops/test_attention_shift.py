"""Value and gradients of ``attention_shift``; test_attention_shift_triton.py runs this file interpreted."""

import functools
from itertools import product

import pytest
import torch

from mmicl_kernels.ops import attention_shift
from mmicl_kernels.testing.budgets import (
    assert_all_within_budget,
    assert_within_budget,
    eager_attention_shift,
    gradients,
)
from mmicl_kernels.testing.inputs import LAYOUTS, attention_shift_inputs, normal
from tests.ops.triton_process import FLOATS, INTERPRETED

NAMES = ("out", "dout", "dlse", "dq", "dweight", "dbias", "dshift")

QUERY_IDS = ((0, 0, 1, -1, 2, 2, 1, -1, 0), (-1,) * 8 + (1,))
# Sizes and why. Lengths are odd; 128 queries are one tile of the C++ kernel, 8 one block of gates.
GRID = {
    "plain": {},
    "decode": {"T": 1, "D": 128},
    "block": {"T": 8},
    "block_and_one": {"T": 9},
    "tiles": {"T": 257, "H": 3},
    "long": {"B": 1, "H": 2, "T": 1000, "D": 64},
    **{f"head_dim_{D}": {"D": D} for D in (1, 7, 40, 72, 80, 96, 128)},
    **{layout: {"layout": layout} for layout in LAYOUTS[1:]},
    "half_parameters": {"parameter_dtype": torch.bfloat16},
    "ids": {"B": 3, "adapters": 2, "ids": (1, -1, 0)},
    "ids_shared": {"B": 3, "adapters": 4, "ids": (2, 2, 0)},
    "ids_none": {"adapters": 2, "ids": (-1, -1)},
    "no_queries": {"T": 0},
    "no_batch": {"B": 0},
    "no_batch_ids": {"B": 0, "adapters": 2, "ids": ()},
    # What tells Triton's kernels apart: few rows, columns that fill no warp, partial sums of a head.
    "speculated": {"B": 3, "H": 2, "T": 2, "D": 64, "adapters": 4, "ids": (2, 2, 0), "wide_ids": True},
    "less_than_a_warp": {"B": 1, "H": 3, "T": 63, "D": 8},
    "masked_heads_last": {"H": 2, "T": 63, "D": 40, "layout": "heads_last"},
    "odd_offsets": {"B": 3, "H": 2, "T": 20, "D": 72, "layout": "sliced", "adapters": 4, "ids": (1, -1, 2)},
    "seen_twice": {"H": 2, "T": 33, "D": 80, "layout": "expanded"},
    "two_sums": {"B": 1, "H": 2, "T": 131, "D": 96},
    "two_sums_ids": {"B": 3, "H": 1, "T": 130, "D": 128, "adapters": 4, "ids": (1, -1, 2)},
    # Virtual keys: of each head or shared by heads, beside the attention or as a prefix of it.
    **{
        f"{'prefix' if prefix else 'keys'}_{N}": {"virtual": (P, N), "prefix": prefix, "D": D, "T": T}
        for prefix in (False, True)
        for N, P, D, T in ((1, 2, 16, 37), (2, 4, 40, 9), (5, 1, 7, 37), (8, 4, 64, 33), (16, 2, 16, 20),
                           (64, 4, 24, 5), (128, 2, 128, 3))
    },
    "one_prefix": {"prefix": True},
    "keys_decode": {"virtual": (2, 8), "prefix": True, "B": 3, "T": 1, "D": 72},
    "keys_sliced": {"virtual": (4, 3), "layout": "sliced", "D": 72},
    "keys_seen_twice": {"virtual": (2, 3), "prefix": True, "layout": "expanded", "T": 20},
    "keys_half": {"virtual": (4, 2), "parameter_dtype": torch.bfloat16},
    "keys_ids": {"virtual": (2, 3), "B": 3, "adapters": 3, "ids": (1, -1, 0), "prefix": (True, False, True)},
    "ids_of_queries": {"B": 2, "T": 9, "adapters": 3, "ids": QUERY_IDS},
    "keys_of_queries": {"virtual": (2, 5), "B": 2, "T": 9, "adapters": 3, "ids": QUERY_IDS,
                        "prefix": (False, True, False), "wide_ids": True},
    "keys_no_queries": {"virtual": (2, 3), "T": 0, "prefix": True},
}  # fmt: skip
REAL = {
    "prefill": {"H": 32, "T": 1000, "D": 128, "layout": "heads_last"},
    "prefill_ids": {"B": 3, "H": 32, "T": 500, "D": 128, "layout": "heads_last", "adapters": 4,
                    "ids": (1, -1, 2)},
    "decode_batch": {"B": 64, "H": 32, "T": 1, "D": 128},
    "many_sums": {"B": 8, "T": 4096, "D": 64},
}  # fmt: skip
if torch.cuda.is_available() and not INTERPRETED:
    GRID |= REAL
TYPICAL = ("plain", "half_parameters", "ids", "odd_offsets", "prefix_16", "keys_of_queries")


def make_inputs(dtype=torch.float32, device="cpu", ids=None, wide_ids=False, prefix=False, **sizes):
    """The op's tensors and options. lse has strides of another order than its shape's, a -inf and a +inf."""
    out, lse, *others = attention_shift_inputs(dtype=dtype, device=device, **sizes)
    lse = lse.mT.contiguous().mT
    lse[:1, :1, :1], lse[-1:, -1:, -1:] = -torch.inf, torch.inf
    if ids is not None:
        ids = torch.tensor(ids, dtype=torch.int64 if wide_ids else torch.int32, device=device)
    if isinstance(prefix, tuple):
        prefix = torch.tensor(prefix, device=device)
    return (out, lse, *others), {"adapter_ids": ids, "prefix": prefix}


@functools.cache
def budget(name, dtype, device):
    inputs, options = make_inputs(dtype, device, **GRID[name])
    dout = normal(*inputs[0].shape, dtype=dtype, device=device, seed=9)
    low = [eager_in_order(order, inputs, options, dout) for order in query_orders(dout.shape[2])]
    exact = gradients(
        lambda *x: attention_shift(*x, **options, impl="reference"),
        [x.double() for x in inputs],
        (dout.double(),),
    )
    return inputs, options, dout, low, exact


def query_orders(T):
    generator = torch.Generator().manual_seed(0)
    return [torch.arange(T), *(torch.randperm(T, generator=generator) for _ in range(2))]


def eager_in_order(order, inputs, options, dout):
    """The eager form with its queries in another order, which changes the roundings of sums alone."""
    order = order.to(dout.device)
    ids = options["adapter_ids"]
    if ids is not None and ids.dim() == 2:
        options = {**options, "adapter_ids": ids[:, order]}

    def permuted(out, lse, q, *parameters):
        out, lse, q = (x[:, :, order] for x in (out, lse, q))
        shifted = eager_attention_shift(out, lse, q, *parameters, **options)
        return shifted[:, :, order.argsort()]

    return gradients(permuted, inputs, (dout,))


def run(inputs, options, dout, impl):
    return gradients(lambda *x: attention_shift(*x, **options, impl=impl), inputs, (dout,))


def value_cases():
    """Interpreting takes long: fp16 of few cases stands for the others', and so do few keys."""
    for name, dtype in product(GRID, FLOATS):
        _, N = GRID[name].get("virtual", (0, 0))
        if not INTERPRETED or (N <= 5 and dtype == torch.float32) or name in TYPICAL:
            yield name, dtype


@pytest.mark.parametrize(("name", "dtype"), list(value_cases()), ids=str)
def test_value_and_gradients(name, dtype, impl, device):
    if name in REAL and device == "cpu":
        pytest.skip("sizes for a GPU")
    inputs, options, dout, low, exact = budget(name, dtype, device)
    outputs, grads = run(inputs, options, dout, impl)
    assert_all_within_budget(NAMES, outputs + grads, [sum(x, ()) for x in low], sum(exact, ()))
    assert outputs[0].dtype == dtype
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    if impl == "composed":
        assert outputs[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", [name for name in GRID if name not in REAL])
def test_the_reference_agrees_with_independent_code(name):
    inputs, options, dout, _, exact = budget(name, torch.float64, "cpu")
    inputs = [x.double() for x in inputs]
    eager = gradients(lambda *x: eager_attention_shift(*x, **options), inputs, (dout,))
    bound = (inputs[0].shape[2] + inputs[0].shape[3]) * torch.finfo(torch.float64).eps
    for label, other, reference in zip(NAMES, sum(eager, ()), sum(exact, ()), strict=True):
        assert (reference - other).norm() <= bound * max(1.0, float(reference.norm())), label


@pytest.mark.parametrize("infinite", (torch.inf, -torch.inf))
def test_infinite_lse_leaves_the_row_and_every_gradient_alone(infinite, impl, device):
    inputs = attention_shift_inputs(device=device)
    inputs[1][:, :, [0, 11]] = infinite
    dout = normal(*inputs[0].shape, dtype=torch.float32, device=device, seed=9)
    (out,), grads = run(inputs, {}, dout, impl)
    assert torch.equal(out[:, :, [0, 11]], inputs[0][:, :, [0, 11]])
    assert torch.equal(grads[0], dout)
    assert not grads[1][:, :, [0, 11]].any() and not grads[2][:, :, [0, 11]].any()
    dout[:, :, [0, 11]] *= 1e6
    others = run(inputs, {}, dout, impl)[1]
    assert all(torch.equal(x, y) for x, y in zip(grads[1:], others[1:], strict=True))


def test_nan_is_not_hidden(impl, device):
    inputs = attention_shift_inputs(device=device)
    inputs[1][0, 0, 0] = torch.nan
    out = attention_shift(*inputs, impl=impl)
    assert out[0, 0, 0].isnan().all() and out.isnan().sum() == out.shape[-1]


@pytest.mark.parametrize("logit", (-3e38, -200.0, 200.0, 3e38))
@pytest.mark.parametrize("by", ("bias", "lse"))
def test_saturated_gates(by, logit, impl, device):
    """Closed: ``out`` bit for bit. Open: ``out + shift``. Nothing overflows."""
    out, lse, q, weight, bias, shift = attention_shift_inputs(B=2, H=2, T=5, D=16, device=device)
    if by == "bias":
        bias.fill_(logit)
    else:
        lse.fill_(-logit)
    dout = normal(*out.shape, dtype=torch.float32, device=device, seed=9)
    (shifted,), grads = run((out, lse, q, weight, bias, shift), {}, dout, impl)
    mu = float(logit > 0)
    assert torch.equal(shifted, out + mu * shift[:, None])
    assert_within_budget("dshift", grads[5], mu * dout.sum((0, 2)), mu * dout.double().sum((0, 2)))
    for name, grad in zip(NAMES[2:6], grads[1:5], strict=True):
        assert torch.isfinite(grad).all() and grad.abs().max() < 1e-30, name


@pytest.mark.parametrize("ids", (None, (1, -1)), ids=("shared", "ids"))
@pytest.mark.parametrize("layout", ("heads_last", "sliced"))
def test_opcheck(layout, ids, operator, device):
    inputs, options = make_inputs(torch.float16, device, layout=layout, ids=ids, adapters=ids and 2)
    keys = *inputs[3:], options["adapter_ids"], False, None, operator
    forward, backward = torch.ops.mmicl.attention_shift_fwd, torch.ops.mmicl.attention_shift_bwd
    torch.library.opcheck(forward, (*inputs[:3], *keys))
    # Tracing the backward under autograd is left to test_compiled_ops.py: it is the slow part.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backward, (inputs[0], None, *inputs[1:3], *keys), test_utils=tests)
