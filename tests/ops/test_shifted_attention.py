"""Value and gradients of ``shifted_attention`` over its contract, and the identities it rests on."""

import pytest
import torch
from torch.nn import functional as F

from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.testing.budgets import (
    eager_shifted_attention,
    gradients,
)
from mmicl_kernels.testing.inputs import output_gradients, shifted_attention_inputs
from tests.ops.shifted_attention_grid import (
    GRID,
    NAMES,
    NOT_INTERPRETED,
    SLOW,
    TYPICAL,
    assert_values,
    budget,
    ints,
    keep,
    largest_resolved,
    run,
)
from tests.ops.triton_process import INTERPRETED


def widest(impl):
    return torch.float32 if impl == "triton" else torch.float64


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if INTERPRETED and (dtype == torch.float16 or name in SLOW) else [],
        )
        for name, case in GRID.items()
        for dtype in case.dtypes
        # There fp32 stands for what does not depend on the dtype, and typical cases in fp32 are tried in
        # other tiles (test_shifted_attention_triton.py), every other one in fp16 here; a mask may be of q's
        # dtype.
        if not INTERPRETED
        or (name in TYPICAL[::2] if dtype == torch.float16 else name not in TYPICAL)
        or name.startswith("bias")
        if not (INTERPRETED and name in NOT_INTERPRETED)
    ],
)
def test_value_and_gradients(name, dtype, impl, device):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("triton has no fp64")
    if impl == "triton" and device == "cuda" and dtype != torch.bfloat16 and name not in TYPICAL:
        pytest.skip("compiling takes long: bf16 stands for it")
    # Interpreting is slow: each way in one dtype there.
    for through_lse in (dtype == torch.float32,) if INTERPRETED else (False, True):
        assert_values(name, dtype, impl, device, through_lse)


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


@pytest.mark.parametrize(("keys", "prefix"), (((2, 5), False), ((4, 33), True)), ids=str)
def test_nan_in_a_query_that_sees_no_key(keys, prefix, impl, device):
    """Padding on the left may hold anything: it stays 0 beside virtual keys."""
    inputs = shifted_attention_inputs(virtual=keys, device=device)
    options = {"causal": True, "kv_start": ints(0, 9).to(device), "prefix": prefix}
    clean = shifted_attention(*inputs, **options, return_lse=True, impl=impl)
    inputs[0][1, :, :9] = torch.nan
    out, lse = shifted_attention(*inputs, **options, return_lse=True, impl=impl)
    assert not out[1, :, :9].any() and (lse[1, :, :9] == -torch.inf).all()
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])


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


def test_func_grad(impl, device):
    """torch.func.grad builds a graph of the backward, which must not be refused before it is used."""
    q, *others = shifted_attention_inputs(device=device)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(shifted_attention(leaf, *others, impl=impl).sum(), leaf)
    dq = torch.func.grad(lambda x: shifted_attention(x, *others, impl=impl).sum())(q)
    torch.testing.assert_close(dq, expected)


def test_gradients_of_any_layout(operator, device):
    """``out.sum()`` sends an expanded scalar back, a transposed loss a strided tensor."""
    inputs = [x.requires_grad_() for x in shifted_attention_inputs(device=device)]
    out = shifted_attention(*inputs, impl=operator)
    dense = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    strided = torch.autograd.grad(out.mT.contiguous().sum(), inputs)
    for first, *others in zip(dense, expanded, strided, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bf16 towards zero")
def test_autocast(impl, device):
    """fp32 queries under autocast are bf16 queries; the fp32 parameters stay, with fp32 gradients."""
    inputs = shifted_attention_inputs(device=device)
    dout, dlse = output_gradients(*inputs[0].shape, dtype=torch.bfloat16, device=device)
    half = [x.bfloat16() for x in inputs[:3]] + list(inputs[3:])
    outputs, grads = run(half, {"causal": True}, (dout, dlse), impl)

    def call(*x):
        with torch.autocast(device, torch.bfloat16):
            return shifted_attention(*x, causal=True, return_lse=True, impl=impl)

    cast_outputs, cast_grads = gradients(call, inputs, (dout, dlse))
    with torch.autocast(device, torch.bfloat16):
        fp64 = shifted_attention(*(x.double() for x in inputs), impl=impl.replace("triton", "composed"))
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
