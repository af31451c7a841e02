"""Value and gradients of ``attention_shift``, the epilogue alone."""

import functools

import pytest
import torch

from mmicl_kernels.ops import attention_shift
from mmicl_kernels.testing.budgets import (
    assert_within_budget,
    eager_attention_shift,
    gradients,
)
from mmicl_kernels.testing.inputs import LAYOUTS, attention_shift_inputs, normal

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "dout", "dlse", "dq", "dweight", "dbias", "dshift")

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
}


@functools.cache
def budget(name, dtype, device):
    sizes = dict(GRID[name])
    ids = sizes.pop("ids", None)
    ids = None if ids is None else torch.tensor(ids, dtype=torch.int32, device=device)
    inputs = attention_shift_inputs(dtype=dtype, device=device, **sizes)
    dout = normal(*inputs[0].shape, dtype=dtype, device=device, seed=9)
    low = [eager_in_order(order, inputs, ids, dout) for order in query_orders(dout.shape[2])]
    exact = gradients(
        lambda *x: attention_shift(*x, adapter_ids=ids, impl="reference"),
        [x.double() for x in inputs],
        (dout.double(),),
    )
    return inputs, ids, dout, low, exact


def query_orders(T):
    generator = torch.Generator().manual_seed(0)
    return [torch.arange(T), *(torch.randperm(T, generator=generator) for _ in range(2))]


def eager_in_order(order, inputs, ids, dout):
    """The eager form with its queries in another order, which changes the roundings of sums alone."""
    order = order.to(dout.device)

    def permuted(out, lse, q, *parameters):
        out, lse, q = (x[:, :, order] for x in (out, lse, q))
        shifted = eager_attention_shift(out, lse, q, *parameters, adapter_ids=ids)
        return shifted[:, :, order.argsort()]

    return gradients(permuted, inputs, (dout,))


def run(inputs, ids, dout, impl):
    return gradients(lambda *x: attention_shift(*x, adapter_ids=ids, impl=impl), inputs, (dout,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRID)
def test_value_and_gradients(name, dtype, impl, device):
    inputs, ids, dout, low, exact = budget(name, dtype, device)
    outputs, grads = run(inputs, ids, dout, impl)
    eager = zip(*(sum(run, ()) for run in low), strict=True)
    compared = zip(NAMES, outputs + grads, eager, sum(exact, ()), strict=True)
    for label, actual, lows, wide in compared:
        assert_within_budget(label, actual, lows, wide)
    assert outputs[0].dtype == dtype
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    if impl == "composed":
        assert outputs[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", GRID)
def test_the_reference_agrees_with_independent_code(name):
    inputs, ids, dout, _, exact = budget(name, torch.float64, "cpu")
    inputs = [x.double() for x in inputs]
    eager = gradients(lambda *x: eager_attention_shift(*x, adapter_ids=ids), inputs, (dout,))
    bound = (inputs[0].shape[2] + inputs[0].shape[3]) * torch.finfo(torch.float64).eps
    for label, other, reference in zip(NAMES, sum(eager, ()), sum(exact, ()), strict=True):
        assert (reference - other).norm() <= bound * max(1.0, float(reference.norm())), label


@pytest.mark.parametrize("infinite", (torch.inf, -torch.inf))
def test_infinite_lse_leaves_the_row_and_every_gradient_alone(infinite, impl, device):
    inputs = attention_shift_inputs(device=device)
    inputs[1][:, :, [0, 11]] = infinite
    dout = normal(*inputs[0].shape, dtype=torch.float32, device=device, seed=9)
    (out,), grads = run(inputs, None, dout, impl)
    assert torch.equal(out[:, :, [0, 11]], inputs[0][:, :, [0, 11]])
    assert not grads[1][:, :, [0, 11]].any() and not grads[2][:, :, [0, 11]].any()
    dout[:, :, [0, 11]] *= 1e6
    others = run(inputs, None, dout, impl)[1]
    assert all(torch.equal(x, y) for x, y in zip(grads[1:], others[1:], strict=True))


def test_nan_is_not_hidden(impl, device):
    inputs = attention_shift_inputs(device=device)
    inputs[1][0, 0, 0] = torch.nan
    out = attention_shift(*inputs, impl=impl)
    assert out[0, 0, 0].isnan().all() and out.isnan().sum() == out.shape[-1]


@pytest.mark.parametrize("logit", (-200.0, 200.0))
def test_saturated_gates(logit, impl, device):
    """Closed: ``out`` bit for bit. Open: ``out + shift``. Gradients stay finite."""
    out, lse, q, weight, bias, shift = attention_shift_inputs(device=device)
    inputs = (out, lse, q, weight, torch.full_like(bias, logit), shift)
    (shifted,), grads = run(inputs, None, torch.ones_like(out), impl)
    expected = out if logit < 0 else out + shift[:, None]
    torch.testing.assert_close(shifted, expected, rtol=0, atol=0)
    assert all(torch.isfinite(x).all() for x in grads)


def test_the_input_is_not_written_to(impl):
    inputs = attention_shift_inputs()
    before = [x.clone() for x in inputs]
    run(inputs, None, torch.ones_like(inputs[0]), impl)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_autocast_changes_nothing(impl):
    inputs = attention_shift_inputs()
    dout = torch.ones_like(inputs[0])
    plain = sum(run(inputs, None, dout, impl), ())
    with torch.autocast("cpu", torch.bfloat16):
        cast = sum(run(inputs, None, dout, impl), ())
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


def test_gradcheck(impl):
    inputs = attention_shift_inputs(2, 2, 3, 4, adapters=2, dtype=torch.float64)
    ids = torch.tensor([1, -1], dtype=torch.int32)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: attention_shift(*x, adapter_ids=ids, impl=impl), leaves)


@pytest.mark.parametrize("constant", (True, False))
def test_double_backward_is_refused(constant, composed):
    inputs = [x.requires_grad_() for x in attention_shift_inputs()]
    out = attention_shift(*inputs, impl=composed)
    dout = torch.ones_like(out).requires_grad_(not constant)
    (dq,) = torch.autograd.grad(out, inputs[2:3], dout, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_shift cannot be differentiated twice"):
        dq.sum().backward()


def test_vmap_is_refused(composed):
    out, lse, q, *parameters = attention_shift_inputs()
    with pytest.raises(NotImplementedError, match="vmap.*impl='reference'"):
        torch.func.vmap(lambda x: attention_shift(out, lse, x, *parameters, impl=composed))(q[None])
