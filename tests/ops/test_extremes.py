"""Sizes, scales and derivatives that nobody asks for until somebody does."""

import pytest
import torch

from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.testing.budgets import assert_within_budget, gradients
from mmicl_kernels.testing.inputs import attention_shift_inputs, shifted_attention_inputs

NAMES = ("q", "k", "v", "weight", "bias", "shift")


@pytest.mark.parametrize("B, T, S", ((0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)))
def test_expanded_gradients_of_empty_attention(B, T, S, impl):
    inputs = shifted_attention_inputs(B=B, H=4, G=2, T=T, S=S, D=8, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    shifted_attention(*inputs, impl=impl).sum().backward()
    for name, x in zip(NAMES, inputs, strict=True):
        assert x.grad.shape == x.shape and not x.grad.any(), name


@pytest.mark.parametrize("B, T", ((0, 3), (2, 0)))
def test_expanded_gradients_of_an_empty_shift(B, T, impl):
    inputs = attention_shift_inputs(B, 4, T, 8, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    attention_shift(*inputs, impl=impl).sum().backward()
    for x in inputs:
        assert x.grad.shape == x.shape and not x.grad.any()


# Hidden keys must stay hidden whatever the scale does to their scores; 1e-50 is 0 in fp32.
@pytest.mark.parametrize("scale", (0.0, -0.3, 1e-50))
@pytest.mark.parametrize("normalizer", ("visible", "all_keys"))
def test_scale_that_does_not_scale_up(scale, normalizer, operator, device):
    inputs = shifted_attention_inputs(B=2, H=4, G=2, T=9, S=9, D=8, dtype=torch.float32, device=device)
    arguments = {"causal": True, "scale": scale, "normalizer": normalizer}

    def run(inputs, impl):
        torch.manual_seed(1)
        dout = torch.randn(2, 4, 9, 8).to(inputs[0])
        values, grads = gradients(lambda *x: (shifted_attention(*x, impl=impl, **arguments),), inputs, [dout])
        return *values, *grads

    exact = run([x.double() for x in inputs], "reference")
    low = run(inputs, "reference")
    for name, got, eager, truth in zip(("out", *NAMES), run(inputs, operator), low, exact, strict=True):
        assert torch.isfinite(got).all(), name
        if truth.norm() > 1e-20:  # with scale 0 nothing reaches k
            assert_within_budget(name, got, eager, truth)


def test_forward_mode_is_refused(composed):
    q, k, v, weight, bias, shift = shifted_attention_inputs(B=1, H=2, G=2, T=3, S=3, D=8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="jvp|forward mode|forward-mode"):
        torch.func.jvp(
            lambda s: shifted_attention(q, k, v, weight, bias, s, impl=composed), (shift,), (shift,)
        )
    out, lse, q, *parameters, shift = attention_shift_inputs(1, 2, 3, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="jvp|forward mode|forward-mode"):
        torch.func.jvp(
            lambda s: attention_shift(out, lse, q, *parameters, s, impl=composed), (shift,), (shift,)
        )


def test_mapped_gradients_are_refused(composed):
    q, k, v, weight, bias, shift = shifted_attention_inputs(B=1, H=2, G=2, T=3, S=3, D=8, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.jacrev(lambda s: shifted_attention(q, k, v, weight, bias, s, impl=composed))(shift)


def test_meta_tensors_have_shapes(composed):
    inputs = shifted_attention_inputs(B=2, H=4, G=2, T=5, S=7, D=8, dtype=torch.bfloat16)
    out, lse = shifted_attention(*(x.to("meta") for x in inputs), return_lse=True, impl=composed)
    assert out.shape == (2, 4, 5, 8) and out.is_meta and lse.shape == (2, 4, 5)
