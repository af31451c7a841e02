"""A model and its adapter as one module, for what trains modules."""

from typing import Any

from torch import nn

from mmicl_kernels.integration.attach import attach
from mmicl_kernels.methods import Adapter


class AdaptedModel(nn.Module):
    """``model`` with ``adapter`` attached, as DistributedDataParallel and trainers expect it.

    Its parameters are the model's, frozen from now on, and the adapter's, which a state dict has under
    ``adapter.``. It is called as the model is. ``handle`` is that of :func:`attach`; while it is disabled or
    other rows are chosen, some parameters have no gradient, for which DDP needs ``find_unused_parameters``.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, *, impl: str = "auto") -> None:
        """Raises: as :func:`attach`."""
        super().__init__()
        self.handle = attach(model, adapter, impl=impl)
        self.model, self.adapter = model.requires_grad_(False), adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
