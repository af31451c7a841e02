"""The modules are their parameters and one op call."""

import subprocess
import sys

import pytest
import torch

from mmicl_kernels import ops
from mmicl_kernels.modules import AttentionShift, ShiftedAttention
from mmicl_kernels.testing.inputs import attention_shift_inputs, shifted_attention_inputs

B, H, G, T, S, D = 2, 4, 2, 9, 9, 16
IMPLS = ("reference", "composed", "auto")


def filled(module):
    """Parameters at which the shift matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_shift(impl):
    out, lse, q, *_ = attention_shift_inputs(B, H, T, D)
    module = filled(AttentionShift(H, D))
    expected = ops.attention_shift(out, lse, q, module.weight, module.bias, module.shift, impl=impl)
    assert torch.equal(module(out, lse, q, impl=impl), expected)
    assert not torch.equal(expected, out)


VISIBILITIES = [
    {},
    {"causal": True},
    {"causal": True, "window": 3},
    {"mask": torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(0)) > 0.3},
    {"causal": True, "softcap": 2.0, "scale": 0.3},
    {"causal": True, "normalizer": "all_keys"},
]


@pytest.mark.parametrize("options", VISIBILITIES, ids=lambda options: "-".join(options) or "full")
@pytest.mark.parametrize("impl", IMPLS)
def test_shifted_attention(impl, options):
    q, k, v, *_ = shifted_attention_inputs(B, H, G, T, S, D)
    module = filled(ShiftedAttention(H, D))
    expected = ops.shifted_attention(q, k, v, module.weight, module.bias, module.shift, impl=impl, **options)
    assert torch.equal(module(q, k, v, impl=impl, **options), expected)
    if options:
        assert not torch.equal(module(q, k, v, impl=impl), expected)


def test_composition():
    """The one is the other after a plain attention that returns its lse."""
    q, k, v, *_ = shifted_attention_inputs(B, H, G, T, S, D, dtype=torch.float64)
    whole = filled(ShiftedAttention(H, D, dtype=torch.float64))
    shift = AttentionShift(H, D, dtype=torch.float64)
    shift.load_state_dict(whole.state_dict())
    zeros = torch.zeros(H, D, dtype=torch.float64), torch.zeros(H, dtype=torch.float64)
    out, lse = ops.shifted_attention(q, k, v, *zeros, zeros[0], causal=True, return_lse=True)
    torch.testing.assert_close(shift(out, lse, q), whole(q, k, v, causal=True), rtol=1e-13, atol=1e-13)


def test_state_dicts_are_interchangeable():
    whole, shift = filled(ShiftedAttention(H, D)), AttentionShift(H, D)
    assert {name: tuple(x.shape) for name, x in whole.state_dict().items()} == {
        "weight": (H, D),
        "bias": (H,),
        "shift": (H, D),
    }
    shift.load_state_dict(whole.state_dict(), strict=True)
    again = ShiftedAttention(H, D)
    again.load_state_dict(shift.state_dict(), strict=True)
    for name, x in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)


@pytest.mark.parametrize("module_class", [AttentionShift, ShiftedAttention])
def test_construction(module_class):
    module = module_class(H, D, device="meta", dtype=torch.bfloat16)
    assert all(x.is_meta and x.dtype == torch.bfloat16 for x in module.parameters())
    torch.manual_seed(1)
    first = module_class(64, 64)
    assert not first.bias.any()
    assert abs(first.weight.std().item() / 0.02 - 1) < 0.1
    assert abs(first.shift.std().item() / 0.001 - 1) < 0.1
    kept = {name: x.clone() for name, x in first.state_dict().items()}
    torch.manual_seed(1)
    filled(first)
    torch.manual_seed(1)
    first.reset_parameters()
    assert all(torch.equal(x, kept[name]) for name, x in first.state_dict().items())
    assert "num_heads=64, head_dim=64" in repr(first)


@pytest.mark.parametrize("module_class", [AttentionShift, ShiftedAttention])
def test_training(module_class):
    """Every parameter gets the gradient that the op gives it."""
    module = filled(module_class(H, D))
    if module_class is AttentionShift:
        args, op, options = attention_shift_inputs(B, H, T, D)[:3], ops.attention_shift, {}
    else:
        args, op = shifted_attention_inputs(B, H, G, T, S, D)[:3], ops.shifted_attention
        options = {"causal": True}
    module(*args, **options).square().sum().backward()
    parameters = [module.weight, module.bias, module.shift]
    loss = op(*args, *parameters, **options).square().sum()
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        assert parameter.grad.norm() > 0
        assert torch.equal(parameter.grad, grad)


def test_usable_without_transformers():
    script = """
import sys
sys.modules["transformers"] = sys.modules["safetensors"] = sys.modules["tqdm"] = None
import torch
from mmicl_kernels.modules import ShiftedAttention
import mmicl_kernels as mk
q = torch.randn(1, 4, 5, 8)
out = mk.ShiftedAttention(4, 8)(q, q, q, causal=True)
assert out.shape == q.shape and torch.isfinite(out).all()
assert mk.ShiftedAttention is ShiftedAttention
"""
    subprocess.run([sys.executable, "-c", script], check=True)
