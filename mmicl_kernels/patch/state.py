"""What patched layers read while a model runs: its adapters, which batch row uses which, how strongly."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from mmicl_kernels import _extension
from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.checkpointing import repeats_reentrant
from mmicl_kernels.models.anchors import Anchor
from mmicl_kernels.patch.sites.passes import PassesToRepeat
from mmicl_kernels.patch.sites.recomputation import refuse_reentrant_checkpointing
from mmicl_kernels.patch.sites.selection import TokenSelection, is_backward
from mmicl_kernels.patch.slots import check_products, check_strength, check_strength_of

Rows = list[dict[str, float]]  # of every batch row the adapters, with their strengths


class State:
    """Of one model; patched layers and its handle share it.

    ``adapters`` are those attached, by name, and ``slots`` the places they take. ``rows`` are the open ones
    or None. ``adapter_ids [rows]`` are the slots of those that shift attention, -1 where a row has none, and
    ``prefixes [slots]`` says which of these are a prefix, None for none; ``selection`` on which tokens
    all act. What is in the model knows its state, which keeps ``patches``, all of them, in being.
    """

    patches: object

    def __init__(self, model: nn.Module, anchors: list[Anchor], impl: str, slots: int) -> None:
        self.model, self.anchors, self.impl, self.normalizer = model, anchors, impl, "visible"
        self.device = anchors[0].device
        self.adapters: dict[str, Adapter] = {}
        self.slots: list[Adapter | None] = [None] * slots
        self.rows: Rows | None = None
        self.adapter_ids: Tensor | None = None
        self.prefixes: Tensor | None = None
        self.selection = TokenSelection(model, anchors, self.device)
        self.first_attention = next((x for x in anchors if x.num_heads), None)
        self.warned_of_padding = False
        self._last_forward: tuple[float, Rows | None] | None = None
        self._passes = PassesToRepeat()

    def set_strength(self, value: float) -> None:
        """Raises TypeError, ValueError as ``Handle.strength``."""
        check_strength("strength", value)
        for name, adapter in self.adapters.items():
            check_strength_of(name, adapter, value)
        check_products(self.rows or [], float(value))
        self.strength = float(value)  # what every vector in the residual stream is multiplied by
        with torch.inference_mode(False):
            self._strength_tensor = torch.tensor(self.strength, dtype=torch.float32, device=self.device)

    @property
    def single(self) -> Adapter | None:
        """The adapter of all rows, where there is only one."""
        return next(iter(self.adapters.values())) if len(self.adapters) == 1 else None

    def require_single(self) -> Adapter:
        """The adapter of all rows. Raises RuntimeError where ``Handle.rows`` must say which."""
        single = self.single
        if single is None:
            names = ", ".join(map(repr, self.adapters))
            raise RuntimeError(
                f"several adapters are attached ({names}): say which rows use which, "
                "`with handle.rows([...]):`"
            )
        return single

    def direct_adapter(self, x: Tensor, anchor: Anchor) -> Adapter | None:
        """The adapter of all rows and tokens, where a site may ask a C++ operator for ``x`` itself.

        None with gradients, in graphs, on other devices, for tensors that only stand for others: there is the
        public op, whose checks take longer than these operators. None in training too: what reentrant
        checkpointing runs without gradients is checked, because it is run again with them.
        """
        if is_grad_enabled() or forward_ad._current_level >= 0 or is_dynamo_compiling():
            return None
        if anchor.layer.training:
            return None
        alone = len(self.adapters) == 1 and self.rows is None and not self.selection.is_installed
        plain = type(x) is Tensor and x.is_cpu and self.impl in ("auto", "composed")
        return next(iter(self.adapters.values())) if alone and plain and _extension.load() else None

    def scaled(self, scale: Tensor) -> Tensor:
        """``scale`` times the global strength; 0 at strength 0, whatever ``scale`` is."""
        # Compiled graphs multiply always, so that they do not depend on the value.
        if not torch.compiler.is_compiling() and self.strength == 1:
            return scale
        strength = self._strength_tensor.to(scale.device)
        return torch.where(strength == 0, 0.0, scale * strength)

    def check_recomputation(self, anchor: Anchor) -> None:
        """Raise RuntimeError where checkpointing would give other gradients than without.

        Reentrant it may lose them. Any kind repeats a forward pass, in which rows and strength must be those
        of the last forward pass that built a graph: of several before one backward pass, the earlier ones
        must have had the same, and of one with chosen tokens there may be no other.
        """
        if torch.compiler.is_compiling():
            return
        refuse_reentrant_checkpointing(self.model, anchor)
        if not (torch.is_grad_enabled() or repeats_reentrant(anchor.layer)):
            return
        now = (self.strength, self.rows)
        if not is_backward() or self.selection.is_running:
            self._last_forward = now
            self._passes.note(self.selection.current)
        elif not self._passes.are_only(self.selection.current):
            raise RuntimeError(
                "gradient checkpointing runs layers again and another forward pass chose its tokens since, "
                "or the block of tokens() ended: call backward() within it, after each forward pass"
            )
        elif self._last_forward not in (now, None):
            raise RuntimeError(
                f"strength and rows are {now}, expected {self._last_forward} as at the last forward pass: "
                "with gradient checkpointing call backward() within their block, before another forward pass"
            )
