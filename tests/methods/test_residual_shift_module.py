"""The module is its parameters and one op call."""

import pytest
import torch

from mmicl_kernels import ops
from mmicl_kernels.modules import ResidualShift
from mmicl_kernels.testing.inputs import normal


@pytest.mark.parametrize("preserve_norm", (False, True))
@pytest.mark.parametrize("impl", ("reference", "composed", "auto"))
def test_residual_shift(preserve_norm, impl):
    module, x = ResidualShift(16, preserve_norm), normal(2, 5, 16, dtype=torch.float32)
    expected = ops.residual_shift(x, module.vector, module.scale, preserve_norm=preserve_norm, impl=impl)
    assert torch.equal(module(x, impl=impl), expected) and not torch.equal(expected, x)
    grads = torch.autograd.grad(expected.square().sum(), (module.vector, module.scale))
    module(x, impl=impl).square().sum().backward()
    assert torch.equal(module.vector.grad, grads[0]) and torch.equal(module.scale.grad, grads[1])
    assert all(g.any() for g in grads)


def test_construction():
    module = ResidualShift(8, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    module = ResidualShift(4096)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "vector": (4096,),
        "scale": (),
    }
    assert abs(module.vector.std().item() / 0.01 - 1) < 0.1 and abs(module.scale.item() - 0.1) < 1e-7
    assert "hidden_size=4096, preserve_norm=False" in repr(module)
