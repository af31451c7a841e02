"""Which layers of a model were patched with what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from mmicl_kernels.methods import Adapter
from mmicl_kernels.models.anchors import Anchor
from mmicl_kernels.patch.sites.hf_attention import is_users_own


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer.

    Attributes:
        index: of the layer. mixer: the class of its attention, or of what it has in its place.
        attention: names of the adapters that shift its attention. residual: of those that act on its
        residual stream, by site: "input", "after_attention", "mlp", "layer".
        replaced: the attention implementation that ours stands in for, where transformers has none of that
        name or somebody registered another function under it, or "".
        skipped: what does not act here and why, or "".
    """

    index: int
    mixer: str
    attention: tuple[str, ...] = ()
    residual: tuple[tuple[str, tuple[str, ...]], ...] = ()
    replaced: str = ""
    skipped: str = ""

    def __str__(self) -> str:
        parts = [f"attention of {', '.join(self.attention)}"] if self.attention else []
        parts += [f"in place of {self.replaced!r}"] if self.replaced else []
        parts += [f"{site} of {', '.join(names)}" for site, names in self.residual]
        parts += [self.skipped] if self.skipped else []
        return f"{self.mixer}: {'; '.join(parts) or 'untouched'}"


@dataclass(frozen=True)
class Report:
    """``layers`` of the decoder; ``embedding`` names the adapters whose tokens enter there.

    As a string it has one line per run of layers that are alike.
    """

    layers: tuple[LayerReport, ...]
    embedding: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"embedding  tokens of {', '.join(self.embedding)}"] if self.embedding else []
        for text, run in groupby(self.layers, key=str):
            first, *rest = (layer.index for layer in run)
            lines.append(f"layers {first}-{rest[-1]}  {text}" if rest else f"layer {first}  {text}")
        return "\n".join(lines)


def report(mixers: Sequence[nn.Module], anchors: list[Anchor], adapters: Mapping[str, Adapter]) -> Report:
    """``mixers`` are those of all layers, ``anchors`` the layers that may be patched."""
    found = {anchor.index: anchor for anchor in anchors}
    shifting = tuple(name for name, x in adapters.items() if x.attention_site is not None)
    sites = dict.fromkeys(site.module for adapter in adapters.values() for site in adapter.residual_sites)
    acting = {site: tuple(x for x in adapters if _acts(adapters[x], site)) for site in sites}
    layers = []
    for index, mixer in enumerate(mixers):
        name = type(mixer).__name__
        first = index == anchors[0].index
        residual = tuple((site, names) for site, names in acting.items() if first or site != "input")
        if index not in found:
            layers.append(LayerReport(index, name, skipped="left alone by every method"))
        elif found[index].self_attn is None:
            missing = f"no softmax for {', '.join(shifting)} to shift" if shifting else ""
            layers.append(LayerReport(index, name, residual=residual, skipped=missing))
        else:
            layers.append(LayerReport(index, name, shifting, residual, _replaced(mixer)))
    splicing = tuple(name for name, x in adapters.items() if x.embedding_site is not None)
    return Report(tuple(layers), splicing)


def _replaced(attention: nn.Module) -> str:
    """The implementation that a patched attention would have asked for, if it is a user's own."""
    layer = getattr(attention, "mmicl_layer", None)
    own = layer is not None and is_users_own(layer.base_implementation)
    return layer.base_implementation if own else ""


def _acts(adapter: Adapter, site: str) -> bool:
    return any(x.module == site for x in adapter.residual_sites)
