"""A model and its adapter as one module, for what trains modules."""

from typing import Any

from torch import nn

from mmicl_kernels.integration.attach import attach
from mmicl_kernels.methods import Adapter


class AdaptedModel(nn.Module):
    """``model`` with ``adapter`` attached, as DistributedDataParallel and trainers expect it.

    Its parameters are the model's, frozen from now on, and the adapter's, which a state dict has under
    ``adapter.``. It is called as the model is. ``handle`` is that of :func:`attach`. DDP leaves the model
    alone, which must be the same in all processes: it broadcasts and averages the adapter's parameters only,
    so the model may be sharded (``fully_shard``).
    """

    def __init__(self, model: nn.Module, adapter: Adapter, *, impl: str = "auto") -> None:
        """Raises: as :func:`attach`."""
        super().__init__()
        self.handle = attach(model, adapter, impl=impl)
        self.model, self.adapter = model.requires_grad_(False), adapter
        states = (*model.named_parameters(), *model.named_buffers())
        self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name, _ in states]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
