"""Patch a model with adapters, and find what was patched."""

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from mmicl_kernels.methods import Adapter
from mmicl_kernels.models.anchors import find_anchors, unwrap
from mmicl_kernels.ops._core.dispatch import resolve
from mmicl_kernels.ops.shifted_attention.api import IMPLEMENTATIONS
from mmicl_kernels.patch.handle import Handle
from mmicl_kernels.patch.patches import Patches, is_patched, patches_of
from mmicl_kernels.patch.sites.embedding import Splicer
from mmicl_kernels.patch.state import State
from mmicl_kernels.store import DemonstrationBank

DEFAULT_NAME = "default"


def attach(
    model: nn.Module,
    adapter: Adapter | Mapping[str, Adapter],
    *,
    impl: str = "auto",
    slots: int = 8,
    strength: float = 1.0,
    tokens: str | Tensor | None = None,
    bank: DemonstrationBank | None = None,
    bank_bytes: int = 2**30,
    placeholder_ids: tuple[int, int] | None = None,
) -> Handle:
    """Patch ``model``, an instance of a supported HuggingFace LVLM, so that ``adapter`` acts in it.

    What peft, ``torch.compile`` or DistributedDataParallel made of one may be given too. One adapter acts on
    every batch row. Of several in a dict, which may be of different methods, each row uses those that
    :meth:`Handle.rows` names. Nothing is registered on the model: its parameters, state dict and
    ``save_pretrained`` stay as they are, and no other instance is touched. A model has one handle: it is
    patched anew only where nobody has the handle that patched it before, with a warning.

    Args:
        impl: implementation of :func:`mmicl_kernels.ops.shifted_attention`, ``residual_shift`` and
            ``prefix_splice_``.
        slots: how many adapters the handle can hold at once.
        strength: what every M2IV and LIVE vector is multiplied by, see :meth:`Handle.strength`.
        tokens: which tokens they act on, see :meth:`Handle.tokens`; all by default.
        bank: demonstrations that an AIM adapter fused, for :meth:`Handle.splice`.
        bank_bytes: how much of the bank stays on an accelerator; the CPU maps its file.
        placeholder_ids: two ids of the vocabulary that no prompt has, in whose places tokens are spliced; by
            default the largest that the model's configuration does not name.

    Raises:
        UnsupportedModelError: unknown family, or a part of it is missing. CheckpointError: an adapter
        of another backbone, or a bank of another projection. TypeError, ValueError, NotImplementedError:
        other bad arguments, or a model whose handle is in use. The model is untouched after any of them.
    """
    resolve(impl, IMPLEMENTATIONS, "auto", "shifted_attention")
    adapters = {DEFAULT_NAME: adapter} if isinstance(adapter, Adapter) else adapter
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(f"adapter is {adapter!r}, expected an Adapter or a dict of them by name")
    if not isinstance(slots, int) or slots < len(adapters):
        raise ValueError(f"slots is {slots!r}, expected at least the {len(adapters)} adapters given")
    model = unwrap(model)
    dropped = _check_free(model)
    if dropped is not None:
        dropped.remove()
    try:
        state = State(model, find_anchors(model), impl, slots)
        state.set_strength(strength)
        state.selection.choose(tokens)
        handle = Handle(Patches(state, Splicer(state, bank, bank_bytes, placeholder_ids)))
        handle._patches.start(adapters)
    except BaseException:
        if dropped is not None:
            dropped.sync()
        raise
    if dropped is not None:
        dropped.detach()
        warnings.warn(
            f"the model was patched and nobody had its handle: {sorted(dropped.state.adapters)} made way for "
            f"{sorted(adapters)} (mk.handle_of(model) returns such a handle, mk.detach(model) ends it)",
            stacklevel=2,
        )
    return handle


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of ``model``, also if the one that :func:`attach` returned was dropped; None if it is plain.

    ``model`` may be wrapped as for :func:`attach`. Of a disabled and dropped handle nothing is left.

    Raises:
        UnsupportedModelError: unknown family.
    """
    patches = patches_of(unwrap(model))
    if patches is None:
        return None
    handle = patches.handle and patches.handle()
    return Handle(patches) if handle is None else handle


def detach(model: nn.Module) -> None:
    """Restore ``model`` exactly, whoever has its handle. A plain model stays as it is. Raises: as above."""
    handle = handle_of(model)
    if handle is not None:
        handle.detach()


def _check_free(model: nn.Module) -> Patches | None:
    """What patches ``model`` and was dropped. Raises ValueError if it is patched otherwise."""
    patches = patches_of(model)
    if patches is not None and patches.is_dropped:
        return patches
    if patches is not None or is_patched(model):
        raise ValueError(
            "the model is patched already: add() to its handle, which mk.handle_of(model) returns, or "
            "mk.detach(model) (a deepcopy of a patched model is patched too: copy it before attach)"
        )
    return None
