"""Whether an adapter may join those that are attached."""

from collections.abc import Mapping

from mmicl_kernels.methods import ADAPTERS, Adapter, CheckpointError
from mmicl_kernels.models.anchors import Anchor, check_backbone, describe_backbone, refuse_adapter
from mmicl_kernels.patch.sites.embedding import Splicer
from mmicl_kernels.patch.slots import check_strength_of
from mmicl_kernels.patch.state import State
from mmicl_kernels.store import DemonstrationBank


def check_fits(name: str, adapter: Adapter, state: State, splicer: Splicer) -> None:
    """Raise TypeError, ValueError, UnsupportedModelError or CheckpointError, which say why it may not."""
    if not isinstance(adapter, Adapter):
        known = ", ".join(x.__name__ for x in ADAPTERS.known)
        raise TypeError(f"adapter {name!r} is a {type(adapter).__name__}, expected one of {known}")
    refuse_adapter(state.model, adapter, state.anchors)
    check_backbone(adapter, describe_backbone(state.model, state.anchors))
    check_strength_of(name, adapter, state.strength)
    _check_normalizer(name, adapter, state.adapters)
    if adapter.embedding_site is not None:
        _check_splicing(name, adapter, state.adapters, splicer)
    for anchor in state.anchors:
        _check_layer(name, adapter, anchor)
    for anchor in (x for x in state.anchors if str(x.index) in adapter.layers):
        for parameter in adapter.layers[str(anchor.index)].parameters():
            if parameter.device != anchor.device:
                raise ValueError(
                    f"adapter {name!r} has layer {anchor.index} on {parameter.device}, "
                    f"expected {anchor.device}"
                )


def check_bank(bank: DemonstrationBank | None, adapter: Adapter) -> None:
    """Raise CheckpointError if the tokens in ``bank`` are another adapter's."""
    if bank is not None and bank.digest != adapter.digest():
        raise CheckpointError(
            "the bank's tokens were made with another projection than the adapter's: add its "
            "demonstrations to a new bank, DemonstrationBank.create(folder, adapter)"
        )


def check_filling(
    bank: DemonstrationBank | None, adapters: Mapping[str, Adapter], batch_size: object
) -> None:
    """Raise as ``Handle.add_demonstrations`` unless ``bank`` can be added to."""
    if bank is None:
        raise ValueError("no bank is attached, expected attach(model, adapter, bank=...)")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}, expected an int of at least 1")
    check_bank(bank, require_fusing(adapters))


def require_splicing(adapters: Mapping[str, Adapter]) -> Adapter:
    """The one whose tokens stand before prompts. Raises ValueError: there is none."""
    found = [x for x in adapters.values() if x.embedding_site is not None]
    if not found:
        raise ValueError(
            f"none of the adapters {sorted(adapters)} fuses demonstrations or has learned tokens, expected "
            "AIM's or prompt tuning's"
        )
    return found[0]


def require_fusing(adapters: Mapping[str, Adapter]) -> Adapter:
    """The one that fuses demonstrations. Raises ValueError: there is none."""
    found = [x for x in adapters.values() if x.fuses]
    if not found:
        raise ValueError(f"none of the adapters {sorted(adapters)} fuses demonstrations, expected AIM's")
    return found[0]


def _check_layer(name: str, adapter: Adapter, anchor: Anchor) -> None:
    key = str(anchor.index)
    try:
        if anchor.self_attn is not None and adapter.attention_site is not None:
            adapter.attention_shift(key)
        for site in adapter.residual_sites:
            adapter.residual_shift(site, key)
    except KeyError as error:
        raise ValueError(
            f"adapter {name!r} has nothing for layer {key}: {error!r}; expected parameters in every layer, "
            "zeros where it is to do nothing"
        ) from error


def _check_normalizer(name: str, adapter: Adapter, adapters: Mapping[str, Adapter]) -> None:
    sites = [x.attention_site for x in adapters.values() if x.attention_site is not None]
    if (
        adapter.attention_site is not None
        and sites
        and adapter.attention_site.normalizer != sites[0].normalizer
    ):
        raise ValueError(
            f"adapter {name!r} has normalizer {adapter.attention_site.normalizer!r}, "
            f"expected {sites[0].normalizer!r} like the others"
        )


def _check_splicing(name: str, adapter: Adapter, adapters: Mapping[str, Adapter], splicer: Splicer) -> None:
    others = [other for other, x in adapters.items() if x.embedding_site is not None]
    if others:
        raise ValueError(
            f"adapter {name!r} has tokens before the prompt as {others[0]!r} has, expected one of them"
        )
    for parameter in adapter.beside_layers().values():
        if parameter.device != splicer.device:
            raise ValueError(f"adapter {name!r} is on {parameter.device}, expected {splicer.device}")
    if adapter.fuses:
        check_bank(splicer.bank, adapter)
