"""M2IV and LIVE once more, without hooks and ops: biases of linear layers, and wrapped forwards."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import mmicl_kernels as mk
from tests.support.published import random_adapter

DECODER_LAYER = re.compile(
    r"^(?:model|language_model\.model)\.(?:text_model\.|language_model\.|decoder\.)?layers\.(\d+)$"
)


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Layers by their index; those of cross-attention to images are no method's."""
    found = {
        match[1]: module for name, module in model.named_modules() if (match := DECODER_LAYER.match(name))
    }
    return {index: layer for index, layer in found.items() if "CrossAttention" not in type(layer).__name__}


def random_shift(model: PreTrainedModel, config=None, *, seed: int = 0) -> mk.M2IVAdapter | mk.LIVEAdapter:
    """Vectors as long as the states they are added to. A scale of 1/2 makes ``scale * vector`` exact."""
    adapter = mk.create(model, config or mk.M2IVConfig())
    generator = torch.Generator().manual_seed(300 + seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


def library(model: PreTrainedModel) -> dict[str, mk.MimICAdapter | mk.M2IVAdapter | mk.LIVEAdapter]:
    """Adapters of every method, by name."""
    return {
        "a": random_shift(model, seed=0),
        "b": random_shift(model, seed=1),
        "live": random_shift(model, mk.LIVEConfig(), seed=2),
        "stream": random_shift(model, mk.LIVEConfig(site="layer"), seed=3),
        "mimic": random_adapter(model),
        "ffn": random_adapter(model, seed=1, ffn_shift=True),
    }


@contextmanager
def biased(model: PreTrainedModel, adapter: mk.M2IVAdapter, strength: float = 1.0) -> Iterator[None]:
    """M2IV as biases: a branch plus a vector is its last linear layer with that bias."""
    linears = []
    for index, layer in decoder_layers(model).items():
        of = adapter.layers[index]
        linears += [(layer.self_attn.o_proj, of.attn), (layer.mlp.down_proj, of.mlp)]
    try:
        for linear, shift in linears:
            assert linear.bias is None
            bias = strength * shift.scale.detach() * shift.vector.detach()
            linear.bias = nn.Parameter(bias.to(linear.weight.dtype))
        yield
    finally:
        for linear, _ in linears:
            linear.bias = None


@contextmanager
def renormed(model: PreTrainedModel, vectors: dict[str, Tensor], site: str) -> Iterator[None]:
    """LIVE with ``vectors`` by layer index, scale included, at the output of "mlp" or "layer"."""
    layers = decoder_layers(model)
    modules = {index: layer.mlp if site == "mlp" else layer for index, layer in layers.items()}
    try:
        for index, module in modules.items():
            module.forward = MovedWithNorm(module.forward, vectors[index].detach())
        yield
    finally:
        for module in modules.values():
            del module.forward


class Moved:
    """A forward whose output, or the first of several, is moved by ``vector``."""

    def __init__(self, forward: Callable, vector: Tensor) -> None:
        self.forward, self.vector = forward, vector

    def __call__(self, *args, **kwargs):
        out = self.forward(*args, **kwargs)
        return (self.moved(out[0]), *out[1:]) if isinstance(out, tuple) else self.moved(out)

    def moved(self, x: Tensor) -> Tensor:
        return x + self.vector.to(x.dtype)


class MovedWithNorm(Moved):
    def moved(self, x: Tensor) -> Tensor:
        y = super().moved(x)
        return y * (torch.linalg.norm(x, dim=-1) / torch.linalg.norm(y, dim=-1))[..., None]
