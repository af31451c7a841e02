"""Value and gradients of ``residual_shift``; test_residual_shift_triton.py runs this file interpreted."""

import functools

import pytest
import torch

from mmicl_kernels.ops import residual_shift
from mmicl_kernels.testing.budgets import (
    assert_within_budget,
    eager_residual_shift,
    gradients,
    product_error,
)
from mmicl_kernels.testing.inputs import hidden_states, ints, normal, residual_shift_inputs, token_ids
from tests.ops.test_compiled_ops import same_when_compiled
from tests.ops.triton_process import FLOATS, HALVES, INTERPRETED

NAMES = ("out", "dx", "dvector", "dscale", "dstrengths")

# Sizes and why. 32 tokens are one tile of the C++ kernel, 8 columns one of its vectors.
GRID = {
    "plain": {},
    "decode": {"T": 1, "C": 4096},
    "tiles": {"T": 67, "B": 3},
    "long": {"B": 1, "T": 500, "C": 72},
    **{f"columns_{C}": {"C": C} for C in (1, 7, 8, 72, 1000)},
    **{layout: {"layout": layout} for layout in ("tokens_first", "sliced", "expanded")},
    "half_parameters": {"parameter_dtype": torch.float16},
    "ids": {"B": 3, "ids": (1, -1, 0)},
    "ids_shared": {"B": 3, "ids": (2, 2, 0)},
    "ids_none": {"ids": (-1, -1)},
    "several": {"B": 3, "ids": ((1, 0), (2, -1), (1, 1))},
    "strengths": {
        "B": 3, "ids": ((1, 0), (2, -1), (-1, -1)), "strengths": ((0.5, -1.0), (2.0, 1.0), (1.0, 1.0)),
    },
    "one_strength": {"B": 3, "ids": (0, 1, 2), "strengths": (1.5, 0.0, -0.5)},
    "strengths_off": {
        "B": 3, "ids": ((1, 0), (2, 2), (0, 1)), "strengths": ((0.0, 0.0), (1.0, 0.0), (0.0, 2.0)),
    },
    "tokens": {"ids": token_ids(2, 13, 1, adapters=3)},
    "tokens_flat": {"B": 1, "T": 67, "C": 72, "ids": token_ids(1, 67, 3, adapters=3), "strengths": 1.5},
    "tokens_long": {"B": 1, "T": 500, "C": 7, "ids": token_ids(1, 500, 1, adapters=3)},
    "tokens_decode": {"B": 3, "T": 1, "C": 1000, "ids": token_ids(3, 1, 2, adapters=3), "strengths": 1.0},
    "tokens_chosen": {"ids": token_ids(2, 13, 1, adapters=1) * 2 + 1},  # of one adapter, 1, or none
    "tokens_none": {"ids": token_ids(2, 13, 3, adapters=0), "strengths": 1.0},
    **{
        f"tokens_{layout}": {"layout": layout, "ids": token_ids(2, 13, 3, adapters=3), "strengths": 0.5}
        for layout in ("tokens_first", "sliced", "expanded")
    },
    "tokens_half_parameters": {
        "parameter_dtype": torch.float16, "ids": token_ids(2, 13, 3, adapters=3), "strengths": 1.0,
    },
    "own": {"B": 3, "own": True},
    "own_sliced": {"B": 3, "T": 67, "C": 72, "layout": "sliced", "own": True},
    "own_half_parameters": {"B": 3, "parameter_dtype": torch.float16, "own": True},
    "own_one_scale": {"B": 3, "own": "scale"},
}  # fmt: skip
# In the interpreter, which takes long, their fp16 stands for that of the others.
TYPICAL = ("plain", "sliced", "half_parameters", "strengths", "tokens_flat", "own")


def inputs_of(name, dtype, device):
    """``x, vector, scale`` and where the case has them strengths; and the keyword arguments.

    Strengths that are given as a number are normal ones times it; own vectors are those of batch rows.
    """
    sizes = dict(GRID[name])
    ids, strengths, own = (sizes.pop(x, None) for x in ("ids", "strengths", "own"))
    adapters = 3 if ids is not None or own else None
    x, vector, scale = residual_shift_inputs(dtype=dtype, device=device, adapters=adapters, **sizes)
    inputs = (x, vector, scale[1] if own == "scale" else scale)
    ids = None if ids is None else torch.as_tensor(ids, dtype=torch.int32, device=device)
    if isinstance(strengths, float):
        strengths = strengths * normal(*ids.shape, dtype=torch.float32, seed=5)
    if strengths is not None:
        inputs = (*inputs, torch.as_tensor(strengths, device=device, dtype=vector.dtype))
    return inputs, {"adapter_ids": ids}


def call(op, options, *tensors):
    x, vector, scale, *strengths = tensors
    if strengths and op is not eager_residual_shift:
        options = {**options, "strengths": strengths[0]}
        strengths = ()
    return op(x, vector, scale, *strengths, **options)


@functools.cache
def budget(name, preserve_norm, dtype, device):
    inputs, options = inputs_of(name, dtype, device)
    options["preserve_norm"] = preserve_norm
    dout = hidden_states(*inputs[0].shape, dtype=dtype, device=device, seed=9)
    low = [eager_in_order(seed, inputs, options, dout) for seed in range(3)]
    exact = gradients(
        lambda *x: call(residual_shift, {**options, "impl": "reference"}, *x),
        [x.double() for x in inputs],
        (dout.double(),),
    )
    return inputs, options, dout, low, exact


def eager_in_order(seed, inputs, options, dout):
    """The eager form with tokens and columns in another order: other roundings of the same sums."""
    generator = torch.Generator().manual_seed(seed)
    tokens, columns = (torch.randperm(n, generator=generator).to(dout.device) for n in dout.shape[1:])
    if seed == 0:
        tokens, columns = tokens.sort()[0], columns.sort()[0]

    def of_tokens(entries):
        return entries if entries is None or entries.dim() < 3 else entries[:, tokens]

    ordered = {**options, "adapter_ids": of_tokens(options["adapter_ids"])}

    def permuted(x, vector, scale, *strengths):
        strengths = map(of_tokens, strengths)
        x, vector = x[:, tokens][..., columns], vector[..., columns]
        y = call(eager_residual_shift, ordered, x, vector, scale, *strengths)
        return y[:, tokens.argsort()][..., columns.argsort()]

    return gradients(permuted, inputs, (dout,))


def compare(actual, lows, exact, inputs):
    results, wide, lows = sum(actual, ()), sum(exact, ()), [sum(x, ()) for x in lows]
    relative = max(float((x[2].double() - wide[2]).norm() / wide[2].norm().clamp(min=1e-300)) for x in lows)
    entry = wide[2] / inputs[2][..., None]
    for i, (name, result) in enumerate(zip(NAMES, results, strict=False)):
        others = [x[i] for x in lows]
        if name in ("dscale", "dstrengths") and wide[i].dim() < 3 and wide[i].any():
            others.append(wide[i] + product_error(relative, entry, inputs[1]))
        assert_within_budget(name, result, others, wide[i])


@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(x, y) for x in GRID for y in FLOATS if not INTERPRETED or y == torch.float32 or x in TYPICAL],
    ids=str,
)
def test_value_and_gradients(name, preserve_norm, dtype, impl, device):
    if preserve_norm and name == "columns_1":
        pytest.skip("a row of one number is its sign times its length, and has no gradient")
    inputs, options, dout, low, exact = budget(name, preserve_norm, dtype, device)
    actual = gradients(lambda *x: call(residual_shift, {**options, "impl": impl}, *x), inputs, (dout,))
    compare(actual, low, exact, inputs)
    (out,), grads = actual
    assert out.dtype == dtype and [g.dtype for g in grads] == [x.dtype for x in inputs]
    if impl != "reference":
        x = inputs[0]
        dense = x.is_contiguous() or x.transpose(0, 1).is_contiguous()
        assert out.stride() == (x.stride() if dense else out.contiguous().stride())


@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize("name", [x for x in GRID if "half_parameters" not in x and x != "columns_1"])
def test_the_reference_agrees_with_independent_code(name, preserve_norm):
    _, _, _, low, exact = budget(name, preserve_norm, torch.float64, "cpu")
    for label, other, reference in zip(NAMES, sum(low[0], ()), sum(exact, ()), strict=False):
        bound = 100 * other.numel() ** 0.5 * torch.finfo(torch.float64).eps
        if label in ("dscale", "dstrengths"):  # sums over everything
            bound *= exact[0][0].numel()
        assert (reference - other).norm() <= bound * max(1.0, float(reference.norm())), label


def test_the_formula_in_numbers(impl):
    x = torch.tensor([[[3.0, 4.0]]])
    out = residual_shift(x, torch.tensor([-3.0, 6.0]), 0.5, impl=impl)
    assert torch.equal(out, torch.tensor([[[1.5, 7.0]]]))
    out = residual_shift(x, torch.tensor([0.0, -8.0]), 0.5, preserve_norm=True, impl=impl)
    assert torch.equal(out, torch.tensor([[[5.0, 0.0]]]))
    stack, ids = torch.tensor([[1.0, 2.0], [10.0, 20.0]]), torch.tensor([[0, 1]])
    out = residual_shift(x, stack, 1, adapter_ids=ids, strengths=torch.tensor([[2.0, -1.0]]), impl=impl)
    assert torch.equal(out, torch.tensor([[[3.0 - 8.0, 4.0 - 16.0]]]))
    x, ids = x.expand(2, 3, 2), torch.tensor([[[0, 1], [-1, 1], [-1, -1]], [[1, 1], [0, -1], [-1, 0]]])
    out = residual_shift(x, stack, torch.tensor([1.0, 0.5]), adapter_ids=ids, impl=impl)
    added = [[[6.0, 12.0], [5.0, 10.0], [0.0, 0.0]], [[10.0, 20.0], [1.0, 2.0], [1.0, 2.0]]]
    assert torch.equal(out, x + torch.tensor(added))
    out = residual_shift(x, stack, torch.tensor([1.0, 0.5]), impl=impl)
    assert torch.equal(out, x + torch.tensor([[[1.0, 2.0]], [[5.0, 10.0]]]))


def patterns(dtype):
    """``[1, T, C]``: every value of a 16-bit dtype but NaN; of the others random ones and -0."""
    if dtype.itemsize == 2:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        return values.nan_to_num(0.0, torch.inf, -torch.inf).view(1, 512, 128)
    return torch.cat([torch.randn(2**13), -torch.zeros(2**13)]).to(dtype).view(1, 128, 128)


OFF = {
    "scale": {"scale": 0.0},
    "scale_tensor": {"scale": torch.zeros(())},
    "none": {"adapter_ids": torch.tensor([-1])},
    "nones": {"adapter_ids": torch.tensor([[-1, -1]])},
    "strength": {"adapter_ids": torch.tensor([0]), "strengths": torch.tensor([0.0])},
    "strengths": {"adapter_ids": torch.tensor([[0, 1, -1]]), "strengths": torch.tensor([[0.0, 0.0, 5.0]])},
    "scales": {"adapter_ids": torch.tensor([[0, 1]]), "scale": torch.zeros(2)},
    "tokens_none": {"adapter_ids": torch.tensor([[[-1, -1]]])},
    "tokens": {
        "adapter_ids": torch.tensor([[[0, 1, -1]]]), "strengths": torch.tensor([[[0.0, 0.0, 5.0]]]),
    },
    "own": {"scale": torch.zeros(1)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize("name", OFF)
def test_off_is_x_bit_for_bit(name, preserve_norm, dtype, impl):
    """Whatever the vectors hold, NaN included; the gradient of x is that of the output, bit for bit."""
    x = patterns(dtype)
    options = {key: y.expand(-1, x.shape[1], -1) if key != "scale" and y.dim() == 3 else y
               for key, y in OFF[name].items()}  # fmt: skip
    options |= {"preserve_norm": preserve_norm, "impl": impl}
    vector = torch.full((2, x.shape[2]), torch.nan)
    vector = vector if "adapter_ids" in options else vector[:1] if name == "own" else vector[0]
    bits = torch.int64 if dtype.itemsize == 8 else {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(residual_shift(x, vector, **options).view(bits), x.view(bits))
    if impl != "reference":  # whose autograd multiplies with NaN
        finite = x.nan_to_num(0.0, 1.0, 1.0).requires_grad_()
        out = residual_shift(finite, vector, **options)
        assert torch.equal(torch.autograd.grad(out, finite, x)[0].view(bits), x.view(bits))


@pytest.mark.parametrize("tokens", (False, True), ids=("rows", "tokens"))
@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
def test_a_coefficient_of_zero_can_be_trained(preserve_norm, tokens, impl):
    """The gradients of a scale or strength of 0 are those of the formula beside 0."""
    x, vector, _ = residual_shift_inputs(adapters=2, dtype=torch.float64)
    ids, dout = torch.tensor([[0, 1], [1, 0]]), normal(*x.shape, dtype=torch.float64, seed=9)
    ids = ids[:, None].expand(2, x.shape[1], 2) if tokens else ids

    def grads(scale, strength):
        scale = torch.full((2,), scale, dtype=torch.float64, requires_grad=True)
        strengths = torch.full(ids.shape, strength, dtype=torch.float64, requires_grad=True)
        out = residual_shift(
            x, vector, scale, adapter_ids=ids, strengths=strengths, preserve_norm=preserve_norm, impl=impl
        )
        return torch.autograd.grad(out, (scale, strengths), dout)

    for index, (zero, beside) in enumerate((((0.0, 1.0), (1e-7, 1.0)), ((1.0, 0.0), (1.0, 1e-7)))):
        at_zero = grads(*zero)
        for a, b in zip(at_zero, grads(*beside), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert at_zero[index].abs().min() > 0


def test_a_row_without_length_gives_zero_and_no_gradient(impl, device):
    x, vector, _ = residual_shift_inputs(device=device)
    scale = torch.tensor(0.5, device=device)
    x[0, 3] = 0
    x[1, 5] = -scale * vector
    dout = torch.ones_like(x)
    fn = functools.partial(residual_shift, preserve_norm=True, impl=impl)
    (out,), (dx, *grads) = gradients(fn, (x, vector, scale), (dout,))
    for b, t in ((0, 3), (1, 5)):
        assert not out[b, t].any() and not dx[b, t].any()
        dout[b, t] = 1e6
    _, others = gradients(fn, (x, vector, scale), (dout,))
    assert all(torch.equal(a, b) for a, b in zip(grads, others[1:], strict=True))
    assert all(torch.isfinite(g).all() and g.any() for g in (dx, *grads))


def test_large_halves_keep_their_norm(impl, device):
    """Their squares overflow fp16 and sum to 1e13, which fp32 holds."""
    x = torch.full((1, 3, 4096), 6e4, dtype=torch.float16, device=device)
    x[:, :, ::2] *= -1
    vector = normal(4096, dtype=torch.float32, device=device)
    fn = functools.partial(residual_shift, preserve_norm=True, impl=impl)
    (out,), grads = gradients(fn, (x, vector, torch.tensor(100.0, device=device)), (torch.ones_like(x),))
    length = torch.linalg.vector_norm(out.double(), dim=-1) / torch.linalg.vector_norm(x.double(), dim=-1)
    assert (length - 1).abs().max() < 2 * torch.finfo(torch.float16).eps
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
def test_nan_is_not_hidden(preserve_norm, impl, device):
    x, vector, scale = residual_shift_inputs(device=device)
    x[0, 3, 1] = torch.nan
    out = residual_shift(x, vector, scale, preserve_norm=preserve_norm, impl=impl)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[0, 3, slice(None) if preserve_norm else 1] = True
    assert torch.equal(out.isnan(), expected)
    assert residual_shift(x, vector * torch.nan, scale, preserve_norm=preserve_norm, impl=impl).isnan().all()
    assert residual_shift(x, vector, scale * torch.nan, preserve_norm=preserve_norm, impl=impl).isnan().all()


@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8)))
@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
def test_empty(shape, preserve_norm, impl):
    x, vector, scale = residual_shift_inputs(*shape)
    fn = functools.partial(residual_shift, preserve_norm=preserve_norm, impl=impl)
    (out,), grads = gradients(fn, (x, vector, scale), (x,))
    assert out.shape == shape and grads[0].shape == shape
    assert not grads[1].any() and not grads[2].any()
    own = x.new_zeros(shape[0], shape[2])
    assert all(map(torch.equal, gradients(fn, (x, own, scale), (x,))[1], (x, own, scale * 0)))
    for ids in (torch.zeros(shape[0], 2, dtype=torch.int32), torch.zeros(*shape[:2], 2, dtype=torch.int32)):
        of_ids = functools.partial(fn, adapter_ids=ids)
        (out,), grads = gradients(lambda x, v, s, w, fn=of_ids: fn(x, v, s, strengths=w),
                                  (x, vector[None], scale, torch.ones(ids.shape)), (x,))  # fmt: skip
        assert out.shape == shape and not any(grad.any() for grad in grads)


def test_rows_of_a_batch_are_the_rows_alone(impl):
    x, vector, scale = residual_shift_inputs(3, adapters=3)
    ids = torch.tensor([[2, 0], [1, -1], [0, 0]])
    fn = functools.partial(residual_shift, preserve_norm=True, impl=impl)
    out = fn(x, vector, scale, adapter_ids=ids)
    for b in range(3):
        assert torch.equal(out[b : b + 1], fn(x[b : b + 1], vector, scale, adapter_ids=ids[b : b + 1]))
    single = fn(x[1:2], vector[1], scale[1])
    assert torch.equal(out[1:2], single)


@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize("bad", ("x", "dout"))
def test_a_row_that_is_not_finite_leaves_other_adapters_alone(bad, preserve_norm, impl):
    """Adapter 0 is reached neither by a row of adapter 1 nor by one of none, whose strength is NaN."""
    x, vector, scale = residual_shift_inputs(3, adapters=2)
    ids, strengths = torch.tensor([[0], [1], [-1]]), torch.tensor([[2.0], [1.0], [torch.nan]])
    dout = normal(*x.shape, dtype=x.dtype, seed=9)
    broken = {"x": x.clone(), "dout": dout.clone()}
    broken[bad][1], broken[bad][2] = torch.inf, torch.nan

    def grads(x, dout):
        fn = functools.partial(residual_shift, adapter_ids=ids, preserve_norm=preserve_norm, impl=impl)
        leaves = (x, vector, scale, strengths)
        return gradients(lambda x, v, s, w: fn(x, v, s, strengths=w), leaves, (dout,))[1]

    for name, clean, ours in zip(NAMES[1:], grads(x, dout), grads(**broken), strict=True):
        torch.testing.assert_close(ours[0], clean[0], msg=lambda text, name=name: f"{name}: {text}")
    (dvector, dscale, dstrengths) = grads(**broken)[1:]
    seen = bad == "dout" or preserve_norm  # without the norm no gradient of an entry reads x
    assert dvector[1].isfinite().any() != seen and dscale[1].isfinite() != seen
    assert dstrengths[2] == 0


@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize("shared", (False, True), ids=("scales", "one_scale"))
def test_a_slot_no_row_uses_has_gradient_zero(shared, preserve_norm, impl):
    """Whatever it holds: an id of -1 stands for no slot, slot 0 included."""
    x, vector, scale = residual_shift_inputs(1, adapters=2)
    scale = torch.tensor(1.5) if shared else torch.tensor([torch.nan, 2.0])
    fn = functools.partial(residual_shift, preserve_norm=preserve_norm, impl=impl)
    ids = torch.tensor([[1, -1]])
    vector[0] = torch.nan
    _, (_, dvector, dscale, dstrengths) = gradients(
        lambda x, v, s, w: fn(x, v, s, adapter_ids=ids, strengths=w),
        (x, vector, scale, torch.tensor([[1.0, torch.nan]])), (x,),
    )  # fmt: skip
    _, (_, alone, dscale_alone) = gradients(fn, (x, vector[1], scale if shared else scale[1]), (x,))
    assert not dvector[0].any() and dstrengths[0, 1] == 0
    torch.testing.assert_close(dvector[1], alone)
    expected = dscale_alone if shared else torch.stack([torch.zeros(()), dscale_alone])
    torch.testing.assert_close(dscale, expected)


@pytest.mark.parametrize("shape", ((2, 3), (2, 13, 3)), ids=("rows", "tokens"))
@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize("scale", (1.0, torch.tensor(2.0), torch.ones(0)), ids=("none", "one", "stacked"))
def test_no_adapters(scale, preserve_norm, shape, impl):
    """Without a slot every id is -1."""
    x, _, _ = residual_shift_inputs()
    ids, vector = torch.full(shape, -1), torch.ones(0, x.shape[2])
    fn = functools.partial(residual_shift, scale=scale, preserve_norm=preserve_norm, impl=impl)
    (out,), (dx, dvector, dstrengths) = gradients(
        lambda x, v, w: fn(x, v, adapter_ids=ids, strengths=w), (x, vector, torch.ones(shape)), (x,)
    )
    assert torch.equal(out, x)
    torch.testing.assert_close(dx, x)
    assert dvector.shape == vector.shape and dstrengths.shape == shape and not dstrengths.any()


@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strengths_beside_16_bit_vectors(dtype, preserve_norm, impl):
    """Their gradient is computed in fp32, whatever is wide and whatever is not."""
    x, vector, scale = residual_shift_inputs(adapters=2, dtype=dtype)
    fn = functools.partial(
        residual_shift, adapter_ids=torch.tensor([[0], [1]]), preserve_norm=preserve_norm, impl=impl
    )

    def dstrengths(vector, strengths):
        return gradients(lambda w: fn(x, vector, scale, strengths=w), (strengths,), (x,))[1][0]

    narrow, strengths = vector.to(dtype), torch.tensor([[1.0], [-2.0]])
    expected = dstrengths(narrow.float(), strengths)
    torch.testing.assert_close(dstrengths(narrow, strengths), expected)
    assert torch.equal(dstrengths(narrow, strengths.to(dtype)), dstrengths(narrow, strengths).to(dtype))


def test_ids_of_64_bits_and_other_strides(impl):
    x, vector, scale = residual_shift_inputs(3, adapters=2)
    ids = torch.tensor([[1, 0], [-1, 1], [0, 0]])
    strengths = normal(2, 3, dtype=torch.float32).t()
    expected = residual_shift(
        x, vector, scale, adapter_ids=ids.int(), strengths=strengths.contiguous(), impl=impl
    )
    out = residual_shift(
        x, vector.t().contiguous().t(), scale.expand(2, 2)[0], adapter_ids=ids.t().contiguous().t(),
        strengths=strengths, impl=impl,
    )  # fmt: skip
    assert torch.equal(out, expected)


def test_vmap_of_the_reference():
    x, vector, scale = residual_shift_inputs()
    mapped = torch.func.vmap(lambda y: residual_shift(y, vector, scale, impl="reference"))(x[None])
    assert torch.equal(mapped[0], residual_shift(x, vector, scale, impl="reference"))


# Of x [2, T, C].
ENTRIES = {
    "plain": lambda x: {},
    "ids": lambda x: {"adapter_ids": ints(1, 0, -1, 1).view(2, 2), "strengths": torch.ones(2, 2)},
    "tokens": lambda x: {
        "adapter_ids": (torch.arange(4 * x.shape[1]).int() % 3 - 1).view(2, -1, 2),
        "strengths": torch.ones(2, x.shape[1], 2),
    },
    "own": lambda x: {},
}


@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize("name", ENTRIES)
def test_opcheck(name, preserve_norm, operator):
    adapters = None if name == "plain" else 2
    x, vector, scale = residual_shift_inputs(dtype=torch.float16, adapters=adapters, layout="tokens_first")
    ids, strengths = (ENTRIES[name](x).get(key) for key in ("adapter_ids", "strengths"))
    ops = torch.ops.mmicl
    entries = (vector, scale, ids, strengths)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.residual_shift_fwd, (x, *entries, preserve_norm, operator), test_utils=tests)
    for needs in ((True, True, strengths is not None), (True, False, False), (False, True, False)):
        saved = (torch.ones_like(x), x if preserve_norm else None, *entries, operator, *needs)
        torch.library.opcheck(ops.residual_shift_bwd, saved, test_utils=tests)


@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
@pytest.mark.parametrize("name", ENTRIES)
def test_compile(name, preserve_norm, composed):
    """First and second call, then another length, without a graph break, forward and backward."""

    def fn(x, vector, scale):
        options = {**ENTRIES[name](x), "preserve_norm": preserve_norm, "impl": composed}
        return residual_shift(x, vector, scale, **options)

    adapters = None if name == "plain" else 2
    calls = [residual_shift_inputs(T=T, adapters=adapters) for T in (27, 27, 35)]
    calls = [(inputs, [torch.ones_like(inputs[0])]) for inputs in calls]
    same_when_compiled(fn, calls, backend="aot_eager", dynamic=True)


def changed(**changes):
    x, vector, scale = residual_shift_inputs(2, 3, 8)
    return {"x": x, "vector": vector, "scale": scale, **changes}


def stacked(**changes):
    x, vector, scale = residual_shift_inputs(2, 3, 8, adapters=2)
    return {"x": x, "vector": vector, "scale": scale, "adapter_ids": torch.tensor([0, 1]), **changes}


BAD = {
    "x_rank": (changed(x=torch.zeros(3, 8)), ValueError, r"x has shape \[3, 8\], expected \[B, T, C\]"),
    "x_dtype": (changed(x=torch.zeros(2, 3, 8).long()), TypeError, "x has dtype torch.int64"),
    "x_stride": (changed(x=torch.zeros(2, 8, 3).mT), ValueError, "x has strides"),
    "x_type": (changed(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "vector_size": (changed(vector=torch.zeros(7)), ValueError, r"vector has shape \[7\].*C = 8"),
    "vector_rows": (changed(vector=torch.zeros(3, 8)), ValueError, r"vector has shape \[3, 8\].*B = 2"),
    "vector_columns": (changed(vector=torch.zeros(2, 7)), ValueError, r"vector has shape \[2, 7\].*C = 8"),
    "vector_rank": (changed(vector=torch.zeros(2, 1, 8)), ValueError, r"shape \[2, 1, 8\], expected \[C\]"),
    "vector_device": (changed(vector=torch.zeros(8, device="meta")), ValueError, "vector is on meta"),
    "scale_large": (changed(scale=-1e39), ValueError, "scale is -1e.39, expected a number of fp32"),
    "scale_huge": (changed(scale=10**400), ValueError, "scale is 1000.*expected a number of fp32"),
    "scale_type": (changed(scale="1"), TypeError, "scale must be a number or a tensor, got str"),
    "scale_shape": (changed(scale=torch.zeros(1)), ValueError, r"scale has shape \[1\], expected \[\]"),
    "scale_rows": (
        changed(vector=torch.zeros(2, 8), scale=torch.zeros(1)), ValueError, r"scale has shape \[1\].*B = 2",
    ),
    "scale_dtype": (changed(scale=torch.tensor(1)), TypeError, "scale has dtype torch.int64"),
    "strengths_alone": (changed(strengths=torch.ones(2)), ValueError, "strengths were given without adapter"),
    "ids_flat": (changed(adapter_ids=torch.zeros(2).int()), ValueError, "ids were given beside a 1-D"),
    "ids_high": (stacked(adapter_ids=torch.tensor([0, 2])), ValueError, "adapter_ids has values from 0 to 2"),
    "ids_low": (stacked(adapter_ids=torch.tensor([[-2], [1]])), ValueError, "adapter_ids has values from -2"),
    "ids_shape": (stacked(adapter_ids=torch.tensor([0])), ValueError, r"adapter_ids has shape \[1\].*B = 2"),
    "ids_tokens": (
        stacked(adapter_ids=torch.zeros(2, 4, 1).int()), ValueError, r"shape \[2, 4, 1\].*K\] with T = 3",
    ),
    "ids_rank": (
        stacked(adapter_ids=torch.zeros(2, 3, 1, 1).int()), ValueError, r"expected \[B\], \[B, K\] or \[B, T",
    ),
    "ids_high_tokens": (
        stacked(adapter_ids=torch.full((2, 3, 1), 2)), ValueError, "adapter_ids has values from 2 to 2",
    ),
    "ids_dtype": (stacked(adapter_ids=torch.zeros(2)), TypeError, "adapter_ids has dtype torch.float32"),
    "scales": (stacked(scale=torch.zeros(3)), ValueError, r"scale has shape \[3\].*A = 2"),
    "strengths": (stacked(strengths=torch.ones(2, 1)), ValueError, r"strengths has shape.*expected \[B\]"),
    "strengths_rows": (
        stacked(adapter_ids=torch.zeros(2, 3, 1).int(), strengths=torch.ones(2, 3)), ValueError,
        r"strengths has shape \[2, 3\], expected \[B, T, K\]",
    ),
    "strengths_entries": (
        stacked(adapter_ids=torch.zeros(2, 3, 1).int(), strengths=torch.ones(2, 3, 2)), ValueError,
        r"strengths has shape \[2, 3, 2\].*K = 1",
    ),
    "strengths_dtype": (stacked(strengths=torch.ones(2).int()), TypeError, "strengths has dtype torch.int32"),
    "impl": (changed(impl="fast"), ValueError, "impl is 'fast'"),
    "impl_cuda": (changed(impl="cuda"), NotImplementedError, "residual_shift has no impl='cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        residual_shift(**arguments)


@pytest.mark.skipif(INTERPRETED, reason="allocations of the compiled kernels")
@pytest.mark.parametrize("preserve_norm", (False, True), ids=("added", "norm"))
def test_bytes(preserve_norm):
    """The only memory is the result's, and of a backward dx and a sum per 32 tokens: one pass each."""
    from benchmarks.harness.timing import peak_allocated_bytes
    from mmicl_kernels import _extension

    if not _extension.load():
        pytest.skip("the C++ extension is not built")
    B, T, C = 2, 256, 128
    x, vector, scale = residual_shift_inputs(B, T, C, dtype=torch.bfloat16)
    fn = functools.partial(residual_shift, preserve_norm=preserve_norm, impl="composed")
    assert peak_allocated_bytes(lambda: fn(x, vector, scale)) == x.nbytes

    def backward():
        return torch.ops.mmicl_cpu.residual_shift_bwd(
            x, x if preserve_norm else None, vector[None], scale[None], None, None, True, True
        )

    assert peak_allocated_bytes(backward) == x.nbytes * preserve_norm + 4 * B * T // 32 * C
