"""What the tests of traps share: calls of modules and of our attention, and MimIC's formula by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import mmicl_kernels as mk
from mmicl_kernels.patch.sites import hf_attention
from mmicl_kernels.testing.tiny_models import ALL_MODELS, is_available, tiny_inputs, tiny_model
from tests.support.published import magnitude, random_adapter, relative_error, whole_logits

EPS = torch.finfo(torch.float32).eps
# Of each way in which the stream, the masks and the tower differ, one, in `make test`.
QUICK = ("blip2", "cohere2_vision", "gemma4", "glm4v", "llama4", "mllama", "molmo2-norm_after", "qwen3_5")
# Positions of three dimensions.
M_ROPE = ("glm4v", "glm4v_moe", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe")
M_ROPE += ("qwen3_vl", "qwen3_vl_moe")


def families(*names, quick=QUICK):
    """Those of ``names`` that the installed transformers has, all by default; slow but for ``quick``."""
    marks = {name: [] if name in quick else [pytest.mark.slow] for name in names or ALL_MODELS}
    for name, x in marks.items():
        if not is_available(name):
            x.append(pytest.mark.skip(reason=f"transformers {transformers.__version__} has no {name}"))
    return pytest.mark.parametrize("name", [pytest.param(name, marks=x) for name, x in marks.items()])


def frozen(name: str, base: str = "sdpa") -> nn.Module:
    return tiny_model(name, attn_implementation=base).requires_grad_(False)


def zero_shift(model):
    adapter = mk.create(model, mk.M2IVConfig()).requires_grad_(False)
    for name, x in adapter.named_parameters():
        x.fill_(1.0 if name.endswith("scale") else 0.0)
    return adapter


def cross_attentions(model, name):
    """The layers of cross-attention and their attentions."""
    if name == "idefics":
        return [(layer, layer.cross_attn) for layer in model.model.gated_cross_attn_layers]
    layers = model.model.language_model.layers
    return [(layer, layer.cross_attn) for layer in layers if hasattr(layer, "cross_attn")]


@dataclass
class Call:
    """Of a module: what it got, and what its caller got."""

    module: nn.Module
    args: tuple
    kwargs: dict
    output: object

    @property
    def hidden(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @property
    def result(self) -> Tensor:
        return self.output[0] if isinstance(self.output, tuple) else self.output


@contextmanager
def recorded(*modules: nn.Module) -> Iterator[list[Call]]:
    """Calls in the order in which they end. Hooks of models that are attached within come before."""
    calls = []

    def hook(module, args, kwargs, output):
        kept = tree_map_only(Tensor, Tensor.clone, (args, kwargs, output))
        calls.append(Call(module, *kept))

    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for x in hooks:
            x.remove()


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """The parameters and buffers of ``module`` as before, at the end of the block."""
    before = {name: x.clone() for name, x in module.state_dict().items()}
    try:
        yield
    finally:
        module.load_state_dict(before)


@dataclass
class AttentionCall:
    """Of the attention function: the state it got and what it returned, ``[B, T, H, D]``."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict
    out: Tensor


def recorded_attention(monkeypatch) -> list[AttentionCall]:
    """The calls of models that are attached from now on."""
    calls, function = [], hf_attention.attention_forward

    def spy(module, query, key, value, attention_mask, **options):
        out, weights = function(module, query, key, value, attention_mask, **options)
        calls.append(AttentionCall(module, query, key, value, attention_mask, options, out))
        return out, weights

    monkeypatch.setattr(hf_attention, "attention_forward", spy)
    return calls


def mimic_calls(monkeypatch, name: str, base: str = "sdpa") -> list[tuple[AttentionCall, nn.Module]]:
    """Of one prompt: each call of the attention function, with its layer of a MimIC adapter."""
    model, calls = frozen(name, base), recorded_attention(monkeypatch)
    adapter = random_adapter(model)
    with mk.attach(model, adapter):
        whole_logits(model, tiny_inputs(model))
    return list(zip(calls, adapter.layers.values(), strict=True))


def by_hand(
    call: AttentionCall,
    layer: nn.Module,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    capped_gate: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``softmax(q k) v + sigmoid(w q + b - lse) s``, keys where ``visible [T, S]``.

    Without ``capped_gate`` the lse is of scores before the cap, which is wrong.
    """
    q, k, v = (x.to(dtype) for x in (call.query, call.key, call.value))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    raw = scaling * (q @ k.transpose(-1, -2))
    scores = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    scores, raw = (x.masked_fill(~visible, -torch.inf) for x in (scores, raw))
    weight, bias, shift = (x.detach().to(dtype) for x in (layer.weight, layer.bias, layer.shift))
    lse = (scores if capped_gate else raw).logsumexp(-1)
    gate = magnitude(q, lse, weight, bias)
    return (scores.softmax(-1) @ v + gate[..., None] * shift[:, None]).transpose(1, 2)


def assert_by_hand(call: AttentionCall, layer: nn.Module, visible: Tensor, **options) -> Callable[..., float]:
    """``call`` is the formula but for fp32; returns what tells how many budgets away another form is."""
    exact = by_hand(call, layer, visible, **options)
    budget = 4 * relative_error(by_hand(call, layer, visible, dtype=torch.float32, **options), exact)
    assert relative_error(call.out, exact) <= budget

    def in_budgets(visible=visible, **changed) -> float:
        return relative_error(call.out, by_hand(call, layer, visible, **{**options, **changed})) / budget

    return in_budgets
