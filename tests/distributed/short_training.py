"""A few steps of training, in one process or several, and how close their results must be."""

from itertools import accumulate

import torch
from torch import Tensor, nn

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.testing.tiny_models import TEXT
from tests.support.published import random_adapter
from tests.support.residuals import random_shift
from tests.support.same_adapter import by_kind

EPS = torch.finfo(torch.float32).eps
# The same sums in another order: some roundings per layer, three or four layers deep.
ROUNDINGS = 64 * EPS
# A scale's gradient is a sum over the vector's C terms, about sqrt(C) times smaller than they are.
CANCELLATION = {"scale": TEXT["hidden_size"] ** 0.5}
STEPS = 3
METHODS = ("mimic", "ffn_shift", "hificl", "stave", "m2iv", "live", "aim", "prompt_tuning")


def adapter_of(model: nn.Module, method: str) -> nn.Module:
    """One whose parameters are as large as what they are added to."""
    if method == "aim":
        return mk.create(model, mk.AIMConfig())
    if method == "prompt_tuning":
        return mk.create(model, mk.PromptTuningConfig(std=1.0))
    if method in ("mimic", "ffn_shift"):
        return random_adapter(model, ffn_shift=method == "ffn_shift")
    configs = {
        "hificl": mk.HiFICLConfig(),
        "stave": mk.STAVEConfig(),
        "m2iv": mk.M2IVConfig(),
        "live": mk.LIVEConfig(site="layer"),
    }
    return random_shift(model, configs[method])


def half_of(inputs: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: x.chunk(2)[rank] for name, x in inputs.items()}


def loss_of(module: nn.Module, handle: mk.Handle, inputs: dict[str, Tensor]) -> Tensor:
    """A mean over prompts, so that it is the mean of those of two halves."""
    methods = [adapter.method for adapter in handle.adapters.values()]
    if "prompt_tuning" in methods:
        inputs = handle.splice(inputs)
    if "aim" in methods:
        fused = handle.aggregate(inputs)
        tokens = FusedTokens(torch.cat(fused), torch.tensor([0, *accumulate(map(len, fused))]), None)
        inputs = handle.splice(inputs, [[row ^ 1] for row in range(len(fused))], tokens=tokens)
    logits = module(**inputs, use_cache=False).logits
    mask = inputs["attention_mask"]
    return (logits.square().mean(-1) * mask).sum() / len(mask)


def train(module: nn.Module, handle: mk.Handle, adapter: nn.Module, inputs, rate: float) -> None:
    """Plain descent: an update is as exact as its gradient."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=rate)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(module, handle, inputs).backward()
        optimizer.step()
        handle.unsplice()


def fitting_rate(module: nn.Module, handle: mk.Handle, adapter: nn.Module, inputs) -> float:
    """The learning rate at which a step is a tenth of the parameters."""
    loss_of(module, handle, inputs).backward()
    parameters = torch.cat([x.detach().flatten() for x in adapter.parameters()])
    gradients = torch.cat([x.grad.flatten() for x in adapter.parameters()])
    adapter.zero_grad()
    return float(0.1 * parameters.norm() / gradients.norm())


def gradients(adapter: nn.Module) -> dict[str, Tensor]:
    return by_kind({name: x.grad for name, x in adapter.named_parameters()})


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for kind, x in expected.items():
        error, allowed = (actual[kind] - x).norm(), ROUNDINGS * CANCELLATION.get(kind, 1.0) * x.norm()
        assert error <= allowed and allowed > 0, f"{kind}: {error}, expected at most {allowed}"


def assert_same_steps(actual: nn.Module, expected: nn.Module, start: nn.Module, steps: int = STEPS) -> None:
    """Both were trained from ``start``, by updates that differ by roundings."""
    a, b, c = (by_kind(dict(x.named_parameters())) for x in (actual, expected, start))
    for kind in c:
        moved, error = (b[kind] - c[kind]).norm(), (a[kind] - b[kind]).norm()
        # Errors of a step change the next one's gradients a little: twice as many roundings.
        often = 1 if steps == 1 else 2
        allowed = often * ROUNDINGS * CANCELLATION.get(kind, 1.0) * moved + steps * EPS * b[kind].norm()
        assert error <= allowed < moved, f"{kind}: {error} of {moved}, expected at most {allowed}"


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=ROUNDINGS, atol=ROUNDINGS)
