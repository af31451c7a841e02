"""A model and its adapter as one module, for what trains modules."""

import inspect
import os
from typing import Any

from torch import Tensor, nn

from mmicl_kernels.methods import Adapter
from mmicl_kernels.patch.attach import attach


class AdaptedModel(nn.Module):
    """``model`` with ``adapter`` attached, as DistributedDataParallel and trainers expect it.

    Its parameters are the model's, frozen from now on, and the adapter's, which a state dict has under
    ``adapter.``. Of the model's a state dict has only those that train all the same, as LoRA's may, so that
    checkpoints are small and weights may be tied or quantised. It is called as the model is and has what the
    model has: ``generate``, ``config``, ``device``, ``dtype``, ``gradient_checkpointing_enable`` and so on.
    ``handle`` is that of :func:`attach`. DDP leaves the model alone, which must be the same in all processes:
    it broadcasts and averages the adapter's parameters only, so the model may be sharded (``fully_shard``).
    """

    # Trainers refuse to train quantised weights; those that train here are the adapter's.
    is_quantized = False

    def __init__(self, model: nn.Module, adapter: Adapter, *, impl: str = "auto") -> None:
        """Raises: as :func:`attach`."""
        super().__init__()
        self.handle = attach(model, adapter, impl=impl)
        self.model, self.adapter = model.requires_grad_(False), adapter
        states = (*model.named_parameters(), *model.named_buffers())
        self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name, _ in states]
        self.register_state_dict_post_hook(_leave_frozen_out)
        self.register_load_state_dict_post_hook(_miss_nothing_frozen)

    def __getattr__(self, name: str) -> Any:
        """What is no attribute of this is the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the model has and this has not is the model's: its ``generation_config``, its ``config``."""
        model = self.__dict__.get("_modules", {}).get("model")
        mine = model is None or name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        if mine or name in self._modules or not hasattr(model, name):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    def train(self, mode: bool = True) -> "AdaptedModel":
        """As of any module; but norms that keep running statistics stay in evaluation mode.

        Else they would normalise by the batch, and change what the model is without the adapter.
        """
        super().train(mode)
        for module in self.model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.eval()
        return self

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``; ``labels`` are named because trainers look for the name."""
        if labels is not None:
            kwargs["labels"] = labels
        return self.model(*args, **kwargs)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the model divides its loss by ``num_items_in_batch``: if not, the Trainer does."""
        told = getattr(self.model, "accepts_loss_kwargs", None)
        if told is not None:
            return told
        parameters = inspect.signature(self.model.forward).parameters.values()
        return any(x.kind == inspect.Parameter.VAR_KEYWORD for x in parameters)

    def get_base_model(self) -> nn.Module:
        """The model inside; it stays patched."""
        return self.model

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        is_main_process: bool = True,
        save_function: object = None,
        state_dict: object = None,
    ) -> None:
        """The adapter's ``save_pretrained``, by the main process; the model is not saved.

        ``save_function`` and ``state_dict`` are what trainers give a model; the adapter needs neither.
        """
        if is_main_process:
            self.adapter.save_pretrained(folder)


def _leave_frozen_out(adapted: AdaptedModel, state: dict[str, Any], prefix: str, _: object) -> None:
    trained = {f"{prefix}model.{name}" for name, x in adapted.model.named_parameters() if x.requires_grad}
    for key in [key for key in state if key.startswith(f"{prefix}model.") and key not in trained]:
        del state[key]


def _miss_nothing_frozen(adapted: AdaptedModel, keys: Any) -> None:
    parameters = adapted.model.named_parameters(remove_duplicate=False)
    frozen = [name for name, x in (*parameters, *adapted.model.named_buffers()) if not x.requires_grad]
    ends = tuple(f"model.{name}" for name in frozen)
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(ends)]
