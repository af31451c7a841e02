"""The places in a model that methods attach to, looked up in the tables of families."""

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mmicl_kernels.methods import Adapter, Backbone, CheckpointError
from mmicl_kernels.models.families import DECODERS, FAMILIES, Decoder, Family
from mmicl_kernels.models.parallel import class_name

FINGERPRINT_SAMPLES = 64
_TEXT_TYPES = {name.partition(":")[0]: decoder for name, decoder in DECODERS.items()}


class UnsupportedModelError(ValueError):
    """The model is of no known family, or lacks something its family should have."""


@dataclass(frozen=True)
class Anchor:
    """One decoder layer: its index, the modules methods attach to, and its attention's geometry.

    ``mixer`` is the layer's attention or what it has in its place; only where ``num_heads`` is not 0 is it a
    softmax attention, for MimIC. What ``after_attention`` and ``after_mlp`` return is added to the residual
    stream; ``layer`` returns it.
    """

    index: int
    layer: nn.Module
    mixer: nn.Module
    after_attention: nn.Module
    mlp: nn.Module
    after_mlp: nn.Module
    num_heads: int
    head_dim: int
    decoder: Decoder

    @property
    def self_attn(self) -> nn.Module | None:
        """The softmax attention, if the layer has one."""
        return self.mixer if self.num_heads else None

    @property
    def projection(self) -> nn.Module:
        """What maps the heads of ``self_attn`` back to the stream."""
        return getattr(self.mixer, self.decoder.projection)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return compute_device(self.mixer)


def compute_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes: offloaded weights are elsewhere until accelerate's hook brings them."""
    for part in module.modules():  # of peft's layers, the one inside may have the hook
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # several are one that has them
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    return next(module.parameters()).device


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of what peft, ``torch.compile`` and DistributedDataParallel make of one.

    Raises:
        UnsupportedModelError: not a module.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(f"model is a {type(model).__name__}, expected a HuggingFace model")
        children = dict(model.named_children())
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif list(children) in (["_orig_mod"], ["module"]):
            (model,) = children.values()
        else:
            return model


def family_of(model: nn.Module) -> Family:
    """Raises UnsupportedModelError, which says what was found, if the model's family is not in the table."""
    config = getattr(model, "config", None)
    name = known_type(config, FAMILIES)
    if not isinstance(name, str) or name not in FAMILIES or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has config.model_type {name!r}, expected one of "
            f"{', '.join(map(repr, sorted(FAMILIES)))}; found {_survey(model)}. Missing: an entry in "
            "mmicl_kernels.models.families, see models/README.md"
        )
    return FAMILIES[name]


def known_type(config: object, table: Mapping[str, object]) -> object:
    """The ``model_type`` of ``config``; of a user's own class, of what transformers has it made from.

    Of transformers' own classes one may be made from another and be built otherwise.
    """
    name = own = getattr(config, "model_type", None)
    for kind in type(config).__mro__:
        if isinstance(name, str) and name in table:
            return name
        if kind.__module__.partition(".")[0] == "transformers":
            break
        name = next((vars(x)["model_type"] for x in kind.__mro__[1:] if "model_type" in vars(x)), None)
    return own


def find_anchors(model: nn.Module) -> list[Anchor]:
    """The decoder layers of ``model``, without those that no method touches.

    Raises:
        UnsupportedModelError: naming the family, what was looked for, what was found and what is missing.
    """
    layers, decoder = _decoder_layers(model)
    where = f"{model.config.model_type}: {family_of(model).layers}"
    return [
        _anchor(index, layer, decoder, f"{where}.{index}")
        for index, layer in enumerate(layers)
        if not any(hasattr(layer, child) for child in decoder.skipped)
    ]


def find_mixers(model: nn.Module) -> list[nn.Module]:
    """Every decoder layer's attention, of whichever kind, or what it has in its place. Raises as above."""
    layers, decoder = _decoder_layers(model)
    names = (*decoder.skipped, *decoder.mixers, decoder.attention)
    return [next(getattr(layer, name) for name in names if hasattr(layer, name)) for layer in layers]


def _decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, Decoder]:
    family, where = family_of(model), model.config.model_type
    decoder = _decoder_of(model, model.config.get_text_config(), where)
    first, _, rest = family.layers.partition(".")
    # A model without its head is what one with it has as ``model``.
    path = rest if first == "model" and not hasattr(model, first) else family.layers
    layers = _child(model, path, f"{type(model).__name__} ({where})")
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedModelError(
            f"{where}: {path} is a {type(layers).__name__} of {len(list(layers.children()))} "
            "modules, expected a list of layers"
        )
    return layers, decoder


def refuse_adapter(model: nn.Module, adapter: Adapter, anchors: list[Anchor]) -> None:
    """Raise UnsupportedModelError, which says why, if ``adapter`` cannot act in ``model``."""
    reason = None
    if adapter.embedding_site is not None:
        option, why = family_of(model).no_placeholders or (None, None)
        reason = why if option and getattr(model.config.get_text_config(), option, None) else None
    if adapter.attention_site is not None:
        reason = _no_attention(anchors) or reason
    if reason is not None:
        method, kind = adapter.method, model.config.model_type
        raise UnsupportedModelError(f"method {method!r} cannot apply to {kind}: {reason}")


def _no_attention(anchors: list[Anchor]) -> str | None:
    """Why no attention can be shifted, if that is so."""
    attentions = [anchor.self_attn for anchor in anchors if anchor.self_attn is not None]
    if not attentions:
        return "no layer has softmax attention"
    others = [x for x in attentions if not _asks_interface(x)]
    if not others:
        return None
    return (
        f"the forward of {type(others[0]).__name__} does not ask transformers' AttentionInterface which "
        "function to call, expected one that does"
    )


def _asks_interface(attention: nn.Module) -> bool:
    """Whether ``attention`` calls what its config names; a forward of somebody's own may not."""
    code = getattr(inspect.unwrap(attention.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def describe_backbone(model: nn.Module, anchors: list[Anchor]) -> Backbone:
    """The identity an adapter keeps of the model it belongs to."""
    text = model.config.get_text_config()
    return Backbone(
        model_class=class_name(model),
        model_type=known_type(model.config, FAMILIES),
        text_model_type=known_type(text, _TEXT_TYPES),
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


def _decoder_of(model: nn.Module, text: object, where: str) -> Decoder:
    name = known_type(text, _TEXT_TYPES) + (":norm_after" if getattr(text, "norm_after", False) else "")
    if name not in DECODERS:
        raise UnsupportedModelError(
            f"{where} with a text model of type {name!r}, expected one of "
            f"{', '.join(map(repr, sorted(DECODERS)))}; found {_survey(model)}"
        )
    for option, value in DECODERS[name].requires.items():
        if getattr(text, option, None) != value:
            raise UnsupportedModelError(
                f"{where} with a text model of type {name!r} whose {option} is "
                f"{getattr(text, option, None)!r}, expected {value!r}"
            )
    return DECODERS[name]


def _survey(model: nn.Module) -> str:
    """The lists of modules in ``model`` that may be layers, and what theirs consist of."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            children = ", ".join(f"{x}: {type(child).__name__}" for x, child in module[0].named_children())
            kinds = Counter(type(layer).__name__ for layer in module)
            counts = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
            found.append(f"{name} of {counts} ({children or 'no children'})")
    return "; ".join(found) or "no list of layers"


def _anchor(index: int, layer: nn.Module, decoder: Decoder, where: str) -> Anchor:
    children = dict(layer.named_children())
    mixer = next((children[name] for name in decoder.mixers if name in children), None)
    heads, head_dim = 0, 0
    if mixer is None:
        mixer = _child(layer, decoder.attention, where)
        heads, head_dim = _geometry(mixer, decoder.projection, f"{where}.{decoder.attention}")
    mlp = _child(layer, decoder.mlp, where)
    after_attention = _child(layer, decoder.after_attention, where) if decoder.after_attention else mixer
    after_mlp = _child(layer, decoder.after_mlp, where) if decoder.after_mlp else mlp
    return Anchor(index, layer, mixer, after_attention, mlp, after_mlp, heads, head_dim, decoder)


def _geometry(attention: nn.Module, projection: str, where: str) -> tuple[int, int]:
    """Heads and their dim, as the output projection has them."""
    width = getattr(_child(attention, projection, where), "in_features", None)
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(width, int) or not isinstance(head_dim, int) or head_dim < 1 or width % head_dim != 0:
        raise UnsupportedModelError(
            f"{where}.head_dim is {head_dim!r}, expected a divisor of {projection}.in_features = {width}"
        )
    return width // head_dim, head_dim


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
    attentions = [anchor for anchor in anchors if anchor.num_heads]
    samples = []
    for anchor in (*attentions[:1], *attentions[-1:]):
        weight = anchor.projection.weight
        # Quantised and sharded weights are tensors of other classes.
        if type(weight) is not nn.Parameter or weight.is_meta or not weight.is_floating_point():
            return ()
        flat = weight.detach().flatten()
        # In integers: a linspace in fp32 rounds differently on different devices.
        rows = torch.arange(FINGERPRINT_SAMPLES, device=flat.device) * (flat.numel() - 1)
        rows //= FINGERPRINT_SAMPLES - 1
        samples += flat[rows].float().tolist()
    return tuple(samples)
