"""Patch a model with adapters."""

from collections.abc import Mapping

from torch import nn

from mmicl_kernels.integration.handle import Handle
from mmicl_kernels.library import DemonstrationBank
from mmicl_kernels.methods import Adapter
from mmicl_kernels.ops._impl import resolve
from mmicl_kernels.ops.shifted_attention.api import IMPLEMENTATIONS

DEFAULT_NAME = "default"


def attach(
    model: nn.Module,
    adapter: Adapter | Mapping[str, Adapter],
    *,
    impl: str = "auto",
    slots: int = 8,
    strength: float = 1.0,
    bank: DemonstrationBank | None = None,
    bank_bytes: int = 2**30,
    placeholder_ids: tuple[int, int] | None = None,
) -> Handle:
    """Patch ``model``, an instance of a supported HuggingFace LVLM, so that ``adapter`` acts in it.

    What peft, ``torch.compile`` or DistributedDataParallel made of one may be given too. A single adapter
    acts on every batch row. Of a dict of adapters, which may be of different methods, each row uses those
    that :meth:`Handle.rows` names. Nothing is registered on the model: its parameters, state dict and
    ``save_pretrained`` stay as they are, and no other instance is touched.

    Args:
        impl: implementation of :func:`mmicl_kernels.ops.shifted_attention`, ``residual_shift`` and
            ``prefix_splice_``.
        slots: how many adapters the handle can hold at once.
        strength: what every M2IV and LIVE vector is multiplied by, see :meth:`Handle.strength`.
        bank: demonstrations that an AIM adapter fused, for :meth:`Handle.splice`.
        bank_bytes: how much of the bank stays on an accelerator; the CPU maps its file.
        placeholder_ids: two ids of the vocabulary that no prompt has, in whose places fused tokens stand; by
            default the largest that the model's configuration does not name.

    Raises:
        UnsupportedModelError: unknown family, or a part of it is missing. CheckpointError: an adapter
        of another backbone, or a bank of another projection. TypeError, ValueError, NotImplementedError:
        other bad arguments. The model is untouched after any of them.
    """
    resolve(impl, IMPLEMENTATIONS, "auto", "shifted_attention")
    single = isinstance(adapter, Adapter)
    adapters = {DEFAULT_NAME: adapter} if single else adapter
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(f"adapter is {adapter!r}, expected an Adapter or a dict of them by name")
    if not isinstance(slots, int) or slots < len(adapters):
        raise ValueError(f"slots is {slots!r}, expected at least the {len(adapters)} adapters given")
    return Handle(model, adapters, single, impl, slots, strength, bank, bank_bytes, placeholder_ids)
