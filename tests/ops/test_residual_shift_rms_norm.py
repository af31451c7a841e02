"""Value and gradients of ``residual_shift_rms_norm``; test_residual_shift_triton.py runs them interpreted."""

import functools

import pytest
import torch

from mmicl_kernels.ops import residual_shift_rms_norm
from mmicl_kernels.testing.budgets import (
    assert_within_budget,
    eager_residual_shift_rms_norm,
    gradients,
    product_error,
)
from mmicl_kernels.testing.inputs import hidden_states, ints, normal, residual_shift_inputs, token_ids
from tests.ops.test_compiled_ops import same_when_compiled
from tests.ops.triton_process import FLOATS, INTERPRETED

NAMES = ("normed", "new_residual", "dx", "dresidual", "dvector", "dscale", "dnorm_weight", "dstrengths")
EPS = 1e-5
CONVENTIONS = {"llama": 0.0, "gemma": 1.0}

GRID = {
    "plain": {},
    "decode": {"T": 1, "C": 4096},
    "tiles": {"T": 67, "B": 3},
    **{f"columns_{C}": {"C": C} for C in (7, 8, 72, 1000)},
    **{layout: {"layout": layout} for layout in ("tokens_first", "sliced", "expanded")},
    "half_parameters": {"parameter_dtype": torch.float16},
    "ids": {"B": 3, "ids": (1, -1, 0)},
    "ids_shared": {"B": 3, "ids": (2, 2, 0)},
    "strengths": {"B": 3, "ids": ((1, 0), (2, -1), (-1, -1)), "strengths": True},
    "tokens": {"ids": token_ids(2, 13, 1, adapters=3)},
    "tokens_flat": {"B": 1, "T": 67, "C": 72, "ids": token_ids(1, 67, 3, adapters=3), "strengths": True},
    "tokens_decode": {"B": 3, "T": 1, "C": 1000, "ids": token_ids(3, 1, 2, adapters=3), "strengths": True},
    "tokens_sliced": {"layout": "sliced", "ids": token_ids(2, 13, 3, adapters=3), "strengths": True},
    "tokens_half_parameters": {
        "parameter_dtype": torch.float16, "ids": token_ids(2, 13, 3, adapters=3), "strengths": True,
    },
    "tokens_none": {"ids": token_ids(2, 13, 2, adapters=0), "strengths": True},
    "own": {"B": 3, "own": True},
}  # fmt: skip


def make_inputs(B=2, T=13, C=40, *, dtype=torch.float32, layout="dense", device="cpu", **options):
    """``x, residual, vector, scale, norm_weight``."""
    x, vector, scale = residual_shift_inputs(B, T, C, dtype=dtype, layout=layout, device=device, **options)
    residual = hidden_states(B, T, C, dtype=dtype, layout=layout, device=device, seed=50)
    weight = normal(C, dtype=vector.dtype, device=device, seed=51)
    return x, residual, vector, scale, weight


def output_gradients(x):
    return tuple(hidden_states(*x.shape, dtype=x.dtype, device=str(x.device), seed=s) for s in (60, 61))


def inputs_of(name, dtype, device):
    """Those, and where the case has them strengths; and the keyword arguments. Own vectors are the rows'."""
    sizes = dict(GRID[name])
    ids, strengths, own = (sizes.pop(x, None) for x in ("ids", "strengths", "own"))
    adapters = 3 if ids is not None or own else None
    inputs = make_inputs(dtype=dtype, device=device, adapters=adapters, **sizes)
    ids = None if ids is None else torch.as_tensor(ids, dtype=torch.int32, device=device)
    if strengths:
        inputs = (*inputs, normal(*ids.shape, dtype=inputs[2].dtype, device=device, seed=5))
    return inputs, {"adapter_ids": ids, "eps": EPS}


def with_strengths(x, residual, vector, scale, weight, strengths=None, **options):
    return residual_shift_rms_norm(x, residual, vector, scale, weight, strengths=strengths, **options)


@functools.cache
def budget(name, convention, dtype, device):
    inputs, options = inputs_of(name, dtype, device)
    options["weight_offset"] = CONVENTIONS[convention]
    douts = output_gradients(inputs[0])
    low = [eager_in_order(seed, inputs, options, douts) for seed in range(3)]
    exact = gradients(
        functools.partial(with_strengths, **options, impl="reference"),
        [x.double() for x in inputs],
        [x.double() for x in douts],
    )
    return inputs, options, douts, low, exact


def eager_in_order(seed, inputs, options, douts):
    """The eager form with tokens and columns in another order: other roundings of the same sums."""
    generator = torch.Generator().manual_seed(seed)
    tokens, columns = (torch.randperm(n, generator=generator) for n in douts[0].shape[1:])
    tokens, columns = tokens.to(douts[0].device), columns.to(douts[0].device)

    def of_tokens(entries):
        return entries if entries is None or entries.dim() < 3 else entries[:, tokens]

    ordered = {**options, "adapter_ids": of_tokens(options["adapter_ids"])}

    def permuted(x, residual, vector, scale, weight, strengths=None):
        x, residual = (y[:, tokens][..., columns] for y in (x, residual))
        outputs = eager_residual_shift_rms_norm(
            x, residual, vector[..., columns], scale, weight[columns], of_tokens(strengths), **ordered
        )
        return tuple(y[:, tokens.argsort()][..., columns.argsort()] for y in outputs)

    return gradients(permuted, inputs, douts)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", GRID)
def test_value_and_gradients(name, convention, dtype, impl, device):
    inputs, options, douts, low, exact = budget(name, convention, dtype, device)
    fn = functools.partial(with_strengths, **options, impl=impl)
    outputs, grads = gradients(fn, inputs, douts)
    lows, wide = [sum(x, ()) for x in low], sum(exact, ())
    relative = max(float((x[4].double() - wide[4]).norm() / wide[4].norm().clamp(min=1e-300)) for x in lows)
    for i, (label, actual) in enumerate(zip(NAMES, outputs + grads, strict=False)):
        others = [x[i] for x in lows]
        if label in ("dscale", "dstrengths") and wide[i].dim() < 3 and wide[i].any():
            entry = wide[4] / inputs[3][..., None]
            others.append(wide[i] + product_error(relative, entry, inputs[2]))
        assert_within_budget(label, actual, others, wide[i])
    assert [y.dtype for y in outputs] == [dtype] * 2
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    if impl != "reference":
        x = inputs[0]
        dense = x.is_contiguous() or x.transpose(0, 1).is_contiguous()
        stride = x.stride() if dense else x.contiguous().stride()
        assert all(y.stride() == stride for y in outputs)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", [name for name in GRID if "half_parameters" not in name])
def test_the_reference_agrees_with_independent_code(name, convention):
    _, _, _, low, exact = budget(name, convention, torch.float64, "cpu")
    for label, other, reference in zip(NAMES, sum(low[0], ()), sum(exact, ()), strict=False):
        bound = 100 * exact[0][0].numel() * torch.finfo(torch.float64).eps
        assert (reference - other).norm() <= bound * max(1.0, float(reference.norm())), label


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bf16 towards zero")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rounds_where_the_models_round(convention, dtype, impl):
    """With a shift of zero, the add and the norm of transformers; in 16 bits bit for bit.

    All of it is computed in fp32 and rounded at the same places, so that only a number within an fp32
    rounding of the middle between two others may differ.
    """
    transformers = pytest.importorskip("transformers")
    module = {"llama": transformers.models.llama.modeling_llama.LlamaRMSNorm,
              "gemma": transformers.models.gemma.modeling_gemma.GemmaRMSNorm}[convention]  # fmt: skip
    x, residual, vector, _, weight = make_inputs(2, 50, 256, dtype=dtype)
    norm = module(256, eps=EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
    expected = residual + x
    normed, new_residual = residual_shift_rms_norm(
        x,
        residual,
        vector,
        0.0,
        norm.weight.detach(),
        eps=EPS,
        weight_offset=CONVENTIONS[convention],
        impl=impl,
    )
    assert torch.equal(new_residual, expected)
    theirs = norm(expected).detach()
    if dtype == torch.float32:
        torch.testing.assert_close(normed, theirs, rtol=4 * torch.finfo(dtype).eps, atol=0)
    else:
        different = normed != theirs
        assert different.float().mean() < 1e-3
        steps = (normed.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
        assert steps.max() <= (2 if convention == "llama" else 1)


def test_the_norm_reads_the_stored_residual(impl):
    """In fp16 a shift of 4e-4 is too small to be stored beside 1, and does not reach the norm of the rest."""
    half = torch.full((1, 1, 8), 0.5, dtype=torch.float16)
    vector = torch.tensor([0.0, *[4e-4] * 7])
    normed, h = residual_shift_rms_norm(half, half, vector, 1.0, torch.ones(8), eps=0.0, impl=impl)
    assert torch.equal(h, 2 * half) and torch.equal(normed, 2 * half)


@pytest.mark.parametrize("name", ("plain", "strengths", "tokens_flat"))
@pytest.mark.parametrize("used", (0, 1))
def test_either_output_alone(used, name, impl):
    inputs, options = inputs_of(name, torch.float64, "cpu")
    fn = functools.partial(with_strengths, **options)
    douts = [dy if i == used else None for i, dy in enumerate(output_gradients(inputs[0]))]
    _, grads = gradients(functools.partial(fn, impl=impl), inputs, douts)
    _, exact = gradients(functools.partial(fn, impl="reference"), inputs, douts)
    for grad, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(grads[0], grads[1]) and grads[0].any()
    assert bool(grads[4].any()) == (used == 0)


TOKENS = torch.tensor([1, -1])[:, None, None].expand(2, 13, 1)


@pytest.mark.parametrize("ids", (None, torch.tensor([1, -1]), TOKENS), ids=("shared", "ids", "tokens"))
def test_an_unused_norm_has_no_part_in_a_gradient(ids, impl):
    """Where it is not finite, for rows of zeros without eps and of inf, the sum's gradient still is."""
    x, residual, vector, scale, weight = make_inputs(adapters=None if ids is None else 2)
    x, residual, scale = torch.zeros_like(x), torch.zeros_like(residual), torch.zeros_like(scale)
    x[0, 3] = torch.inf
    dout = output_gradients(x)[1]
    inputs = [y.requires_grad_() for y in (x, residual, vector, scale, weight)]
    _, h = residual_shift_rms_norm(*inputs, eps=0.0, adapter_ids=ids, impl=impl)
    dx, dresidual, dvector, dscale, dweight = torch.autograd.grad(h, inputs, dout, allow_unused=True)
    assert torch.equal(dx, dout) and torch.equal(dresidual, dout)
    assert dweight is None or not dweight.any()
    total = dout.sum((0, 1)) if ids is None else torch.stack([torch.zeros(x.shape[2]), dout[0].sum(0)])
    assert not dvector.any()
    torch.testing.assert_close(dscale, (total * vector).sum(-1), rtol=1e-4, atol=1e-4)


def test_a_row_that_is_not_finite_leaves_other_adapters_alone(impl):
    x, residual, vector, scale, weight = make_inputs(adapters=3)
    douts = output_gradients(x)
    scale[2], vector[2] = torch.nan, torch.nan  # which no row uses
    fn = functools.partial(residual_shift_rms_norm, eps=EPS, adapter_ids=torch.tensor([0, 1]), impl=impl)
    _, clean = gradients(fn, (x, residual, vector, scale, weight), douts)
    x[1] = torch.nan
    _, grads = gradients(fn, (x, residual, vector, scale, weight), douts)
    for i in (0, 1, 2, 3):
        torch.testing.assert_close(grads[i][0], clean[i][0])
    for i in (2, 3):
        assert grads[i][1].isnan().all() and not grads[i][2].any()


@pytest.mark.parametrize("scale", (torch.tensor(2.0), torch.ones(0)), ids=("one", "stacked"))
def test_no_adapters(scale, impl):
    """Without a slot every id is -1: the sum and its norm alone."""
    x, residual, vector, _, weight = make_inputs()
    fn = functools.partial(residual_shift_rms_norm, eps=EPS, impl=impl)
    stacked = functools.partial(fn, adapter_ids=torch.tensor([-1, -1]))
    none = vector.new_zeros(0, x.shape[2])
    outputs, grads = gradients(stacked, (x, residual, none, scale, weight), output_gradients(x))
    off = (x, residual, vector, torch.zeros(()), weight)
    expected, others = gradients(fn, off, output_gradients(x))
    assert all(map(torch.equal, outputs, expected)) and torch.equal(grads[0], others[0])
    assert grads[2].shape == none.shape and not grads[3].any()
    torch.testing.assert_close(grads[4], others[4])


def test_off_is_the_plain_norm_bit_for_bit(impl):
    x, residual, vector, scale, weight = make_inputs(adapters=2, dtype=torch.float16)
    fn = functools.partial(residual_shift_rms_norm, eps=EPS, impl=impl)
    plain = fn(x, residual, torch.zeros_like(vector[0]), 1.0, weight)
    assert torch.equal(plain[1], x + residual)
    nan = torch.full_like(vector, torch.nan)
    none = torch.tensor([-1, -1])
    for outputs in (
        fn(x, residual, nan[0], 0.0, weight),
        fn(x, residual, nan, scale, weight, adapter_ids=none),
        fn(x, residual, nan, torch.zeros(2), weight, adapter_ids=none + 2),
    ):
        assert all(map(torch.equal, outputs, plain))


def test_large_halves(impl, device):
    """Their squares overflow fp16."""
    inputs = make_inputs(1, 3, 4096, dtype=torch.float16, device=device)
    x = inputs[0].sign() * 3e4
    fn = functools.partial(residual_shift_rms_norm, eps=EPS, impl=impl)
    (normed, h), grads = gradients(fn, (x, x / 2, *inputs[2:4], torch.ones_like(inputs[4])), (x.sign(), None))
    torch.testing.assert_close(normed.float(), x.sign().float(), rtol=0, atol=0.01)
    assert all(torch.isfinite(y).all() for y in (h, *grads))


def test_nan_is_not_hidden(impl, device):
    inputs = make_inputs(device=device)
    inputs[0][0, 3, 1] = torch.nan
    normed, h = residual_shift_rms_norm(*inputs, eps=EPS, impl=impl)
    expected = torch.zeros_like(h, dtype=torch.bool)
    expected[0, 3, 1] = True
    assert torch.equal(h.isnan(), expected)
    expected[0, 3] = True
    assert torch.equal(normed.isnan(), expected)


def test_a_row_of_zeros(impl):
    """Finite with eps: what transformers gives."""
    x, residual, vector, _, weight = make_inputs()
    zero = torch.zeros_like(x)
    fn = functools.partial(residual_shift_rms_norm, eps=EPS, impl=impl)
    scale = torch.zeros(())
    (normed, h), grads = gradients(fn, (zero, zero, vector, scale, weight), (torch.ones_like(x), None))
    assert not normed.any() and not h.any()
    torch.testing.assert_close(grads[0], (weight * EPS**-0.5).expand_as(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8)))
def test_empty(shape, impl):
    inputs = make_inputs(*shape)
    fn = functools.partial(residual_shift_rms_norm, eps=EPS, impl=impl)
    outputs, grads = gradients(fn, inputs, (inputs[0], inputs[0]))
    assert all(y.shape == shape for y in (*outputs, *grads[:2]))
    assert not any(g.any() for g in grads[2:])


# Of x [2, T, C].
ENTRIES = {
    "plain": lambda x: {},
    "ids": lambda x: {"adapter_ids": ints(1, -1).view(2, 1)},
    "strengths": lambda x: {"adapter_ids": ints(1, 0, -1, 1).view(2, 2), "strengths": torch.ones(2, 2)},
    "tokens": lambda x: {
        "adapter_ids": (torch.arange(4 * x.shape[1]).int() % 3 - 1).view(2, -1, 2),
        "strengths": torch.ones(2, x.shape[1], 2),
    },
    "own": lambda x: {},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_opcheck(name, operator):
    adapters = None if name == "plain" else 2
    inputs = make_inputs(dtype=torch.float16, adapters=adapters, layout="tokens_first")
    *_, vector, scale, weight = inputs
    entries = [ENTRIES[name](inputs[0]).get(key) for key in ("adapter_ids", "strengths")]
    ops, tests = torch.ops.mmicl, ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*inputs, *entries, EPS, 1.0, operator)
    torch.library.opcheck(ops.residual_shift_rms_norm_fwd, arguments, test_utils=tests)
    normed, h, rstd = ops.residual_shift_rms_norm_fwd(*arguments)
    trained = entries[1] is not None
    for dh, needs in (
        (h, (True, True, trained)), (None, (False, True, trained)), (h, (True, False, False)),
        (h, (False, False, False)),
    ):  # fmt: skip
        saved = (normed, dh, h, rstd, vector, scale, weight, *entries, 1.0, operator, *needs)
        torch.library.opcheck(ops.residual_shift_rms_norm_bwd, saved, test_utils=tests)


@pytest.mark.parametrize("name", ENTRIES)
def test_compile(name, composed):
    def fn(x, *inputs):
        return residual_shift_rms_norm(x, *inputs, eps=EPS, impl=composed, **ENTRIES[name](x))

    calls = [make_inputs(T=T, adapters=None if name == "plain" else 2) for T in (27, 27, 35)]
    calls = [(inputs, output_gradients(inputs[0])) for inputs in calls]
    same_when_compiled(fn, calls, backend="aot_eager", dynamic=True)


BAD = {
    "residual_shape": ({"residual": torch.zeros(2, 3, 7)}, ValueError, r"residual has shape.*C = 8"),
    "residual_dtype": ({"residual": torch.zeros(2, 3, 8).half()}, TypeError, "residual has dtype torch.flo"),
    "residual_stride": ({"residual": torch.zeros(2, 8, 3).mT}, ValueError, "residual has strides"),
    "weight_shape": ({"norm_weight": torch.zeros(7)}, ValueError, "norm_weight has shape"),
    "weight_dtype": ({"norm_weight": torch.zeros(8).int()}, TypeError, "norm_weight has dtype torch.int32"),
    "weight_device": ({"norm_weight": torch.zeros(8, device="meta")}, ValueError, "norm_weight is on meta"),
    "vector": ({"vector": torch.zeros(3, 8)}, ValueError, r"vector has shape \[3, 8\].*B = 2"),
    "ids": ({"adapter_ids": torch.zeros(2, 1).int()}, ValueError, "ids were given beside a 1-D vector"),
    "strengths": ({"strengths": torch.ones(2)}, ValueError, "strengths were given without adapter_ids"),
    "ids_tokens": (
        {"vector": torch.zeros(2, 8), "adapter_ids": torch.zeros(2, 4, 1).int()}, ValueError,
        r"adapter_ids has shape \[2, 4, 1\].*T = 3",
    ),
    "strengths_device": (
        {"vector": torch.zeros(2, 8), "adapter_ids": torch.zeros(2).int(),
         "strengths": torch.ones(2, device="meta")}, ValueError, "strengths is on meta",
    ),
    "eps": ({"eps": -1e-5}, ValueError, "eps is -1e-05, expected at least 0"),
    "eps_large": ({"eps": 1e39}, ValueError, "eps is 1e.39, expected a number of fp32"),
    "eps_bool": ({"eps": True}, TypeError, "eps must be a number, got bool"),
    "offset_huge": ({"weight_offset": 10**400}, ValueError, "weight_offset is 1000.*expected a number"),
    "eps_type": ({"eps": "1"}, TypeError, "eps must be a number, got str"),
    "offset": ({"weight_offset": None}, TypeError, "weight_offset must be a number, got NoneType"),
    "impl": ({"impl": "cuda"}, NotImplementedError, "residual_shift_rms_norm has no impl='cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, error, message = BAD[name]
    names = ("x", "residual", "vector", "scale", "norm_weight")
    arguments = {**dict(zip(names, make_inputs(2, 3, 8), strict=True)), "eps": EPS, **changes}
    with pytest.raises(error, match=message):
        residual_shift_rms_norm(**arguments)


@pytest.mark.skipif(INTERPRETED, reason="allocations of the compiled kernels")
def test_bytes():
    """Two results and a number per token; a backward dx and two sums per 32 tokens: one pass each."""
    from benchmarks.harness.timing import peak_allocated_bytes
    from mmicl_kernels import _extension

    if not _extension.load():
        pytest.skip("the C++ extension is not built")
    B, T, C = 2, 256, 128
    x, residual, vector, scale, weight = make_inputs(B, T, C, dtype=torch.bfloat16)
    fn = functools.partial(residual_shift_rms_norm, eps=EPS, impl="composed")
    forward = peak_allocated_bytes(lambda: fn(x, residual, vector, scale, weight))
    assert forward == 2 * x.nbytes + 4 * B * T
    rstd = torch.ones(B, T)

    def backward():
        return torch.ops.mmicl_cpu.residual_shift_rms_norm_bwd(x, x, x, rstd, weight, 0.0, True, True)

    assert peak_allocated_bytes(backward) == x.nbytes + 2 * 4 * B * T // 32 * C
