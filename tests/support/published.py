"""MimIC once more, from the semantics of its official code, as an eager attention function of its own.

Shares nothing with the package but the adapter's parameters. It is written for dynamic caches, whose
rows are all in use, so it is also what a static cache must agree with.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

import mmicl_kernels as mk

NAME = "published_mimic"
SELF_ATTENTIONS = re.compile(
    r"^(?:model|language_model\.model)\.(?:text_model\.|language_model\.|decoder\.)?layers\.(\d+)\.self_attn$"
)


@dataclass
class Layer:
    """One layer's rows of the official ``log_Z1_lin`` and ``attn_shift``."""

    weight: Tensor
    bias: Tensor
    shift: Tensor
    normalizer: str


def published_attention(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **_):
    """``attn + mu * shift`` with ``mu = Z1 / (Z1 + Z2)``; Z2 is unmasked when "all_keys".

    A sink of the model's, ``s_aux``, is a key of every head's that has this score and the value 0.
    """
    layer = module.config.published_layer
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    masked = scores + additive_mask(attention_mask, scores)
    blind = (masked == -torch.inf).all(-1, keepdim=True)
    masked = masked.masked_fill(blind, 0.0)
    if s_aux is not None:
        masked, value = with_sinks(masked, value, s_aux)
    attn = torch.softmax(masked, -1) @ value

    log_z2 = torch.logsumexp(scores if layer.normalizer == "all_keys" else masked, -1)
    mu = magnitude(query, log_z2, layer.weight, layer.bias)
    out = (attn + mu[..., None] * layer.shift[:, None]).masked_fill(blind, 0.0)
    return out.transpose(1, 2).contiguous(), None


def with_sinks(scores: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``scores [B, H, T, S + 1]`` and ``value [B, H, S + 1, D]``."""
    sinks = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], -1), nn.functional.pad(value, (0, 0, 0, 1))


def magnitude(query: Tensor, log_z2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``Z1 / (Z1 + Z2)``, ``[B, H, T]``. With ``testing.budgets`` one of the two oracles."""
    log_z1 = torch.einsum("bhtd,hd->bht", query, weight) + bias[:, None]
    return torch.exp(log_z1 - torch.logaddexp(log_z1, log_z2))


def additive_mask(attention_mask: Tensor | None, scores: Tensor) -> Tensor:
    """What sdpa and eager understand by their mask, where no row of the cache is unused."""
    T, S = scores.shape[-2:]
    if attention_mask is None:
        assert T in (1, S), f"{T} queries and {S} keys without a mask: not a dynamic cache"
        attention_mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if attention_mask.dtype != torch.bool:
        return attention_mask.to(scores.dtype)
    return torch.zeros_like(scores).masked_fill(~attention_mask, -torch.inf)


@contextmanager
def published(model: PreTrainedModel, adapter: mk.MimICAdapter) -> Iterator[None]:
    """``model`` with ``adapter`` through :func:`published_attention`."""
    dtype, layers = model.get_input_embeddings().weight.dtype, {}
    for index, of in adapter.layers.items():
        parameters = (x.to(dtype) for x in (of.weight, of.bias, of.shift))
        layers[index] = Layer(*parameters, adapter.config.normalizer)
    with attending(model, published_attention, layers):
        yield


@contextmanager
def attending(model: PreTrainedModel, function: Callable, layers: Mapping[str, object]) -> Iterator[None]:
    """Self-attentions call ``function``, which finds its one of ``layers`` as ``config.published_layer``."""
    AttentionInterface.register(NAME, function)
    found = [(SELF_ATTENTIONS.match(name), module) for name, module in model.named_modules()]
    modules = {match[1]: module for match, module in found if match}
    assert modules.keys() == layers.keys()
    originals = {index: module.config for index, module in modules.items()}
    try:
        for index, module in modules.items():
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = NAME
            module.config.published_layer = layers[index]
        yield
    finally:
        for index, module in modules.items():
            module.config = originals[index]


def random_adapter(
    model: PreTrainedModel, *, seed: int = 0, normalizer: str = "visible", **config
) -> mk.MimICAdapter:
    """An adapter with gates all over (0, 1) and shifts larger than what attention returns."""
    adapter = mk.create(model, mk.MimICConfig(normalizer=normalizer, **config))
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name.endswith("bias"):
                parameter.add_(2.0)  # about the log of the number of keys
    return adapter


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` in fp64, the norms included, which HuggingFace computes in fp32."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            module.forward = partial(_rms_norm, scale=_scale_of(module, eps), eps=eps)
    return model


@torch.no_grad()
def _scale_of(norm: nn.Module, eps: float) -> Tensor | float:
    """What ``norm`` multiplies by: its weight, one more than that in Gemma and Qwen3.5, or nothing."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return 1.0
    x = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = norm(x) / _rms_norm(x, scale=1.0, eps=eps)
    return min(weight, weight + 1, key=lambda scale: float((seen - scale).norm()))


def _rms_norm(hidden: Tensor, *, scale: Tensor | float, eps: float) -> Tensor:
    return scale * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps))


@torch.no_grad()
def multiply(adapter: nn.Module, factor: float) -> None:
    """Every parameter in its place, behind the back of whoever is attached."""
    for parameter in adapter.parameters():
        parameter.mul_(factor)


@torch.no_grad()
def fix_gates(adapter: mk.MimICAdapter, bias: float) -> None:
    """Whatever the query is: closed by a bias of -1e4, open by one of 1e4."""
    for layer in adapter.layers.values():
        layer.weight.zero_()
        layer.bias.fill_(bias)


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return cast(inputs, torch.float64)


@torch.no_grad()
def whole_logits(model: PreTrainedModel, inputs: dict[str, Tensor], **options) -> Tensor:
    """Logits of all tokens, padding too."""
    return model(**inputs, **options).logits


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the tokens that are not padding."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def text_config(model: PreTrainedModel):
    return model.config.get_text_config()


def counted_calls(model: PreTrainedModel) -> tuple[dict[str, int], Callable[[], None]]:
    """Calls per module by name, and what stops the counting."""
    calls: dict[str, int] = {}

    def hook(name, *_):
        calls[name] = calls.get(name, 0) + 1

    hooks = [module.register_forward_hook(partial(hook, name)) for name, module in model.named_modules()]
    return calls, lambda: [x.remove() for x in hooks]
