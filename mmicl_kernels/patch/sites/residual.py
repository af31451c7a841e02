"""Vectors in the residual stream: a forward hook on every module whose output they are added to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mmicl_kernels.methods import Adapter, ResidualSite
from mmicl_kernels.models.anchors import Anchor
from mmicl_kernels.ops import residual_shift
from mmicl_kernels.ops._core.layout import accumulated
from mmicl_kernels.ops.residual_shift.entries import entries, stacked
from mmicl_kernels.patch.sites.hooks import ForwardHook
from mmicl_kernels.patch.sites.recomputation import refuse_reentrant_checkpointing
from mmicl_kernels.patch.sites.selection import is_backward
from mmicl_kernels.patch.slots import SlotStack, for_batch
from mmicl_kernels.patch.state import State

# Adapters a batch row can name before its ids grow and compiled models are compiled again.
ENTRIES = 4


class SiteShift:
    """The shifts of one site, by layer, and what they share: the slots that every batch row uses.

    ``ids`` and ``strengths``, ``[rows, K]``, are None while no rows() are open.
    """

    def __init__(self, state: State, site: ResidualSite) -> None:
        if site.readout:
            self.layers: list[LayerShift] = [PromptShift(state, state.anchors[0], site, self)]
        else:
            self.layers = [LayerShift(state, anchor, site, self) for anchor in state.anchors]
        self.ids: Tensor | None = None
        self.strengths: Tensor | None = None

    def choose(
        self,
        rows: list[dict[str, float]] | None,
        slots: dict[str, int],
        strength: float,
        device: torch.device,
    ) -> None:
        """``rows`` as names and strengths; ``slots`` of the adapters that act here."""
        if rows is None:
            self.ids = self.strengths = None
            return
        width = max(ENTRIES, *map(len, rows))
        chosen = [[(slots.get(name, -1), strength * x) for name, x in row.items()] for row in rows]
        padded = [row + [(-1, 0.0)] * (width - len(row)) for row in chosen]
        # "cpu": a caller may have set another default device.
        ids = torch.tensor([[slot for slot, _ in row] for row in padded], dtype=torch.int32, device="cpu")
        strengths = torch.tensor([[x for _, x in row] for row in padded], dtype=torch.float32, device="cpu")
        # A slot at strength 0 is not even read: 0 * nan is nan.
        self.ids, self.strengths = ids.where(strengths != 0, -1).to(device), strengths.to(device)


class LayerShift(SlotStack):
    """The shift of one layer at one site."""

    def __init__(self, state: State, anchor: Anchor, site: ResidualSite, rows: SiteShift) -> None:
        super().__init__(state.slots, anchor.device)
        self._state, self._anchor, self._site, self._rows = state, anchor, site, rows
        self._key = str(anchor.index)

    def __call__(self, x: Tensor) -> Tensor:
        """``x [B, T, C]`` shifted as the handle says."""
        if x.dim() == 2:  # mixtures of experts return tokens in one row
            return self(x[:, None])[:, 0]
        adapter = self._state.direct_adapter(x, self._anchor)
        shifted = None if adapter is None else self._shifted_directly(x, adapter)
        if shifted is not None:
            return shifted
        self._state.check_recomputation(self._anchor)
        self.note_training()
        options = {"preserve_norm": self._site.preserve_norm, "impl": self._state.impl}
        chosen = self._state.selection.of(x)
        if self._rows.ids is None:
            adapter = self._state.require_single()
            vector, scale = adapter.residual_shift(self._site, self._key)
            if adapter.has_strength:
                scale = self._state.scaled(_as_tensor(scale, vector))
            vector = vector.to(x.device)
            if chosen is not None:
                vector, scale = vector[None], _as_tensor(scale, vector)[None]
                options["adapter_ids"] = chosen.int()[..., None] - 1
            elif (
                torch.compiler.is_compiling() and not torch.is_grad_enabled() and not self._site.preserve_norm
            ):
                vector, scale = accumulated(x, vector, entries(x, scale, None, None)[0])
                return _sum(x, vector, scale)
            return residual_shift(x, vector, scale, **options)
        B, (vector, scale) = x.shape[0], self.stacked()
        ids, strengths = (for_batch(rows.to(x.device), B) for rows in (self._rows.ids, self._rows.strengths))
        if chosen is not None:
            ids = ids[:, None].where(chosen[..., None], -1)
            strengths = strengths[:, None].expand(ids.shape)
        return residual_shift(x, vector, scale, adapter_ids=ids, strengths=strengths, **options)

    def _shifted_directly(self, x: Tensor, adapter: Adapter) -> Tensor | None:
        """By what adds least to a token: one sum, or the operator itself; None: it is the public op's."""
        vector, scale = parts = adapter.residual_shift(self._site, self._key)
        strength, preserve_norm = self._state.strength, self._site.preserve_norm
        is_number = type(scale) is float
        adds = strength == 1 and not (preserve_norm or is_number) and vector.is_cpu
        if adds and vector.dtype == scale.dtype == x.dtype:
            # As the operator, which reads no vector whose coefficient is 0.
            return torch.addcmul(x, vector, scale) if scale.item() != 0 else x
        settings = (strength, x.dtype, scale if is_number else None)
        parts = (vector,) if is_number else parts
        entry = self.prepared(parts, settings, self._entry, x, vector, scale, adapter)
        if entry is None:
            return None
        return torch.ops.mmicl.residual_shift_inference.default(x, *entry, None, None, preserve_norm)

    def _entry(
        self, x: Tensor, vector: Tensor, scale: Tensor | float, adapter: Adapter
    ) -> tuple[Tensor | None, ...]:
        """Vector and scale as the operator takes them."""
        if adapter.has_strength:
            scale = self._state.scaled(_as_tensor(scale, vector))
        return stacked(*accumulated(x, vector.to(x.device), entries(x, scale, None, None)[0]))

    def _of(self, adapter: Adapter) -> list[Tensor] | None:
        if self._site not in adapter.residual_sites:
            return None
        vector, scale = adapter.residual_shift(self._site, self._key)
        return [vector, _as_tensor(scale, vector)]


@dataclass
class PassEntries:
    """What :class:`PromptShift` gave the tokens of a pass, None where it is not known."""

    entries: tuple[Tensor, Tensor] | None
    was_repeated: bool = False


class PromptShift(LayerShift):
    """Two vectors at the first layer's input, for two kinds of a prompt's tokens.

    A layer that a backward pass runs again gets the tensor that it got before, by which the tokens are known:
    objectives may make several passes.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._passes = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        return {name: x for name, x in super().__getstate__().items() if name != "_passes"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _passes=WeakTensorKeyDictionary())

    def __call__(self, x: Tensor) -> Tensor:
        state = self._state
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            ids, strengths = self._entries(x)
        else:
            refuse_reentrant_checkpointing(state.model, self._anchor)
            ids, strengths = self._known_entries(x)
        if self._rows.ids is None:
            vector, scale = state.require_single().residual_shift(self._site, self._key)
            scale = _as_tensor(scale, vector)
        else:
            vector, scale = self.stacked()
        return residual_shift(
            x, vector.to(x.device).flatten(0, -2), scale.to(x.device).reshape(-1, 1).expand(-1, 2).flatten(),
            adapter_ids=ids, strengths=strengths, preserve_norm=self._site.preserve_norm, impl=state.impl,
        )  # fmt: skip

    def _known_entries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of this pass, or of that which a backward pass repeats. Raises RuntimeError: which is not known."""
        one = self._passes.get(x)
        if self._state.selection.is_running or not is_backward():
            entries = self._entries(x)
            # Of two passes over one tensor it is not known which is repeated.
            is_second = one is not None and not one.was_repeated
            self._passes[x] = PassEntries(None if is_second else entries)
            return entries
        if one is None or one.entries is None:
            raise RuntimeError(
                "gradient checkpointing runs the first layer again, and which tokens it reads is not known: "
                "expected use_reentrant=False, and of each pass inputs_embeds of its own"
            )
        one.was_repeated = True
        return one.entries

    def _entries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and strengths ``[B, T, K]`` of the slots' vectors."""
        slots, weights = (y[..., None] for y in self._state.selection.slots(x, self._site.readout))
        if self._rows.ids is None:
            return slots, self._state.scaled(weights)
        rows = (self._rows.ids, self._rows.strengths)
        ids, strengths = (for_batch(y.to(x.device), x.shape[0])[:, None] for y in rows)
        ids = torch.where((ids < 0) | (slots < 0), -1, 2 * ids + slots)
        return ids, (strengths * weights).expand(ids.shape)


def _sum(x: Tensor, vector: Tensor, scale: Tensor | None) -> Tensor:
    """What compilers fuse. The operators read no vector whose coefficient is 0: -0.0 adds nothing."""
    added = vector if scale is None else torch.where(scale == 0, -0.0, scale * vector)
    return (x.to(vector.dtype) + added).to(x.dtype)


def _as_tensor(scale: Tensor | float, vector: Tensor) -> Tensor:
    return scale if isinstance(scale, Tensor) else vector.new_full((), scale)


class ResidualHook(ForwardHook):
    """``shifts`` act on the module's output, in their order."""

    def __init__(self, anchor: Anchor, name: str) -> None:
        super().__init__(getattr(anchor, name))
        self._layer = anchor.layer
        self.shifts: list[LayerShift] = []

    def __call__(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if self._layer.training and module is not self._layer:
            _refuse_dropout(self._layer)
        x = output[0] if isinstance(output, tuple) else output
        for shift in self.shifts:
            x = shift(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x


class InputHook(ForwardHook):
    """``shifts`` act on what enters a layer."""

    def __init__(self, anchor: Anchor) -> None:
        super().__init__(anchor.layer, before=True)
        self.shifts: list[LayerShift] = []

    def __call__(
        self, module: nn.Module, args: tuple, inputs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        x = args[0] if args else inputs["hidden_states"]
        for shift in self.shifts:
            x = shift(x)
        return ((x, *args[1:]), inputs) if args else (args, {**inputs, "hidden_states": x})


def hooks_of(anchors: list[Anchor], module: str) -> list[InputHook] | list[ResidualHook]:
    """Where the sites of ``module`` are in a model."""
    if module == "input":
        return [InputHook(anchors[0])]
    return [ResidualHook(anchor, module) for anchor in anchors]


def _refuse_dropout(layer: nn.Module) -> None:
    """Raise ValueError if ``layer`` drops out what a branch returned: a vector must reach the stream."""
    rates = [child.p for child in layer.children() if isinstance(child, nn.Dropout)]
    rate = max(getattr(layer, "dropout", 0.0), *rates, 0.0)
    if rate > 0:
        raise ValueError(f"dropout is {rate}, expected 0: set it to 0 in the config or call model.eval()")
