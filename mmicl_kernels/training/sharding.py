"""FSDP2 of the frozen model, as a launcher or the arguments ask, and what DeepSpeed cannot do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments

from mmicl_kernels.methods import Adapter

ASKED = "ACCELERATE_USE_FSDP"  # what `accelerate launch --use_fsdp` sets


@contextmanager
def without_fsdp(arguments: TrainingArguments) -> Iterator[FullyShardedDataParallelPlugin | None]:
    """What is asked for, if FSDP is; in a ``with`` block neither accelerate nor a Trainer sees that.

    They would shard the adapter with the model, and write both into checkpoints. Without GPUs accelerate
    would ignore it.
    """
    told, environment = arguments.fsdp_plugin_args, os.environ.get(ASKED, "false")
    plugin = None
    if told is not None or environment.lower() == "true":
        plugin = FullyShardedDataParallelPlugin(**(told or {}))
    os.environ[ASKED], arguments.fsdp_plugin_args = "false", None
    try:
        yield plugin
    finally:
        os.environ[ASKED], arguments.fsdp_plugin_args = environment, told


def shard(
    model: nn.Module, adapter: Adapter, plugin: FullyShardedDataParallelPlugin, accelerator: Accelerator
) -> None:
    """Shard ``model`` over the processes in place, by accelerate's rules; ``adapter`` stays whole.

    Raises:
        ValueError: an option is not supported. NotImplementedError: nor is fusing demonstrations, AIM's.
    """
    refused = {
        "version is 1, expected 2": plugin.fsdp_version != 2,
        "activation_checkpointing is on, expected activation_checkpointing of TrainingArguments": (
            plugin.activation_checkpointing
        ),
        "offload_params is on, expected off": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    }
    for message, found in refused.items():
        if found:
            raise ValueError(f"fsdp_{message}")
    if adapter.fuses:
        raise NotImplementedError(
            f"FSDP was asked for; {adapter.method!r} reads hidden states of a whole model, expected DDP"
        )
    if plugin.transformer_cls_names_to_wrap is None:
        # Some models name classes that they have not, which accelerate refuses.
        there = {type(x).__name__ for x in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(there & set(model._no_split_modules or ()))
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    try:
        fsdp2_prepare_model(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin = None
    # Of weights that only the first process had read, others have told nothing.
    (adapter.backbone,) = broadcast_object_list([adapter.backbone])


def check_deepspeed(stage: int, adapter: Adapter) -> None:
    """Raise NotImplementedError for what DeepSpeed cannot train: stage 3, scalars, decay to the identity."""
    if stage == 3:
        raise NotImplementedError(
            "zero_stage is 3, which parts the adapter's parameters too, expected at most 2, or FSDP version 2"
        )
    # It broadcasts no scalar, as LIVE's and M2IV's scales are, and its optimizer sees no matrices, which
    # AIM's decay pulls to the identity.
    if any(x.dim() == 0 for x in adapter.parameters()) or adapter.objective_class().decay_to_identity:
        raise NotImplementedError(
            f"DeepSpeed cannot train method {adapter.method!r}'s parameters, expected MimIC or DDP"
        )
