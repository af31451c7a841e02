"""The module is its parameters and one op call."""

import pytest
import torch

from mmicl_kernels import modules
from mmicl_kernels.modules.token_fuser import TokenFuser
from mmicl_kernels.ops.row_projection import row_projection
from mmicl_kernels.testing.inputs import normal


@pytest.mark.parametrize("layer_norm", (False, True))
@pytest.mark.parametrize("impl", ("reference", "composed", "auto"))
def test_token_fuser(layer_norm, impl):
    module, hidden = TokenFuser(16, layer_norm, eps=1e-3), normal(2, 5, 16, dtype=torch.float32)
    for i, p in enumerate(module.parameters()):
        p.data = normal(*p.shape, dtype=torch.float32, seed=i)
    mask = torch.arange(10).view(2, 5) % 2 == 0
    options = {"num_rows": 6, "dtype": torch.float16, "impl": impl}
    expected = row_projection(
        hidden, mask, module.weight, module.bias, norm_weight=module.norm_weight, norm_bias=module.norm_bias,
        eps=1e-3, **options,
    )  # fmt: skip
    assert torch.equal(module(hidden, mask, **options), expected)
    assert expected.shape == (6, 16) and expected[:5].all() and not expected[5].any()
    grads = torch.autograd.grad(expected.float().square().sum(), list(module.parameters()))
    module(hidden, mask, **options).float().square().sum().backward()
    assert len(grads) == (4 if layer_norm else 2)
    for p, grad in zip(module.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad) and grad.any()


def test_a_new_fuser_leaves_the_states_as_they_are():
    hidden, rows = normal(1, 3, 64, dtype=torch.float32), torch.tensor([2, 0])
    assert torch.equal(TokenFuser(64)(hidden, rows), hidden[0, rows])
    normed = torch.nn.functional.layer_norm(hidden[0, rows], (64,), eps=1e-5)
    torch.testing.assert_close(TokenFuser(64, layer_norm=True)(hidden, rows), normed)


def test_construction():
    assert modules.TokenFuser is TokenFuser
    module = TokenFuser(8, layer_norm=True, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "weight": (8, 8),
        "bias": (8,),
        "norm_weight": (8,),
        "norm_bias": (8,),
    }
    module = TokenFuser(4096)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert sum(p.numel() for p in module.parameters()) == 16_781_312  # as many as SelfCP's, before its norm
    assert "hidden_size=4096, layer_norm=False, eps=1e-05" in repr(module)
