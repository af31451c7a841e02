"""Where a family of HuggingFace LVLMs keeps what the methods attach to. Knowledge is data: one table."""

from dataclasses import dataclass

import torch
from torch import nn

from mmicl_kernels.methods import Adapter, Backbone, CheckpointError


class UnsupportedModelError(ValueError):
    """The model is of no known family, or lacks something its family should have."""


@dataclass(frozen=True)
class Family:
    """Paths of a family, keyed in ``FAMILIES`` by ``config.model_type``.

    ``layers`` is the module list of the text decoder; ``attention`` and ``mlp`` are children of one
    layer; ``text`` are the ``model_type``s of text decoders that were tested in it.
    """

    layers: str
    text: tuple[str, ...]
    attention: str = "self_attn"
    mlp: str = "mlp"


FAMILIES = {
    "gemma3": Family("model.language_model.layers", text=("gemma3_text",)),
    # Its gated cross-attention layers stand in a list of their own and are never touched.
    "idefics": Family("model.layers", text=("idefics",)),
    "idefics2": Family("model.text_model.layers", text=("mistral",)),
    "llava": Family("model.language_model.layers", text=("llama", "qwen2")),
    "qwen2_5_vl": Family("model.language_model.layers", text=("qwen2_5_vl_text",)),
}

FINGERPRINT_SAMPLES = 64


@dataclass(frozen=True)
class Anchor:
    """One decoder layer: its index, the modules methods attach to, and its attention's geometry.

    What ``after_attention`` and ``after_mlp`` return is added to the residual stream; ``layer`` returns it.
    """

    index: int
    layer: nn.Module
    self_attn: nn.Module
    after_attention: nn.Module
    mlp: nn.Module
    after_mlp: nn.Module
    num_heads: int
    head_dim: int

    @property
    def device(self) -> torch.device:
        return self.self_attn.o_proj.weight.device


def find_anchors(model: nn.Module) -> list[Anchor]:
    """The decoder layers of ``model``.

    Raises:
        UnsupportedModelError: naming the family, what was looked for and what is missing.
    """
    family_name = getattr(getattr(model, "config", None), "model_type", None)
    if family_name not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has config.model_type {family_name!r}, expected one of "
            f"{', '.join(map(repr, sorted(FAMILIES)))}"
        )
    family = FAMILIES[family_name]
    text = model.config.get_text_config().model_type
    if text not in family.text:
        raise UnsupportedModelError(
            f"{family_name} with a text model of type {text!r}, expected one of "
            f"{', '.join(map(repr, family.text))}"
        )
    layers = _child(model, family.layers, family_name)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedModelError(
            f"{family_name}: {family.layers} is a {type(layers).__name__}, expected a list of layers"
        )
    return [_anchor(index, layer, family, family_name) for index, layer in enumerate(layers)]


def describe_backbone(model: nn.Module, anchors: list[Anchor]) -> Backbone:
    """The identity an adapter keeps of the model it belongs to."""
    text = model.config.get_text_config()
    return Backbone(
        model_class=type(model).__name__,
        model_type=model.config.model_type,
        text_model_type=text.model_type,
        hidden_size=text.hidden_size,
        name=str(getattr(model.config, "name_or_path", "") or ""),
        revision=str(getattr(model.config, "_commit_hash", "") or ""),
        layers={anchor.index: (anchor.num_heads, anchor.head_dim) for anchor in anchors},
        fingerprint=_fingerprint(anchors),
    )


def check_backbone(adapter: Adapter, backbone: Backbone) -> None:
    """Raise CheckpointError unless ``adapter`` was made for ``backbone``."""
    differences = adapter.backbone.differences(backbone)
    if differences:
        raise CheckpointError("the adapter belongs to another backbone: " + "; ".join(differences))


def _anchor(index: int, layer: nn.Module, family: Family, family_name: str) -> Anchor:
    where = f"{family_name}: {family.layers}.{index}"
    attention = _child(layer, family.attention, where)
    mlp = _child(layer, family.mlp, where)
    projection = _child(attention, "o_proj", f"{where}.{family.attention}")
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or projection.in_features % head_dim != 0:
        raise UnsupportedModelError(
            f"{where}.{family.attention}.head_dim is {head_dim!r}, expected a divisor of "
            f"o_proj.in_features = {projection.in_features}"
        )
    return Anchor(
        index, layer, attention, after_attention(layer, attention), mlp, after_mlp(layer, mlp),
        projection.in_features // head_dim, head_dim,
    )  # fmt: skip


def after_attention(layer: nn.Module, attention: nn.Module) -> nn.Module:
    """The last module before the attention branch joins the residual stream.

    GLM-4V and Gemma norm the branch first. A ``post_attention_layernorm`` is that norm only where the
    MLP has one of its own; elsewhere it is the MLP's.
    """
    children = dict(layer.named_children())
    if "post_self_attn_layernorm" in children:
        return children["post_self_attn_layernorm"]
    return children["post_attention_layernorm"] if "pre_feedforward_layernorm" in children else attention


def after_mlp(layer: nn.Module, mlp: nn.Module) -> nn.Module:
    """The last module before the MLP's branch joins the residual stream: a norm in GLM-4V and Gemma."""
    children = dict(layer.named_children())
    return children.get("post_mlp_layernorm") or children.get("post_feedforward_layernorm") or mlp


def _child(module: nn.Module, path: str, where: str) -> nn.Module:
    for name in path.split("."):
        children = dict(module.named_children())
        if name not in children:
            raise UnsupportedModelError(
                f"{where} has no {name!r} on the path {path!r}, found {', '.join(sorted(children))}"
            )
        module = children[name]
    return module


def _fingerprint(anchors: list[Anchor]) -> tuple[float, ...]:
    """Evenly spaced weights of the first and last output projection; empty if they cannot be read."""
    samples = []
    for anchor in (anchors[0], anchors[-1]):
        weight = anchor.self_attn.o_proj.weight
        if weight.is_meta or not weight.is_floating_point():
            return ()
        flat = weight.detach().flatten()
        # In integers: a linspace in fp32 rounds differently on different devices.
        rows = torch.arange(FINGERPRINT_SAMPLES, device=flat.device) * (flat.numel() - 1)
        rows //= FINGERPRINT_SAMPLES - 1
        samples += flat[rows].float().tolist()
    return tuple(samples)
