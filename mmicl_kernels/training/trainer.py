"""The Trainer of transformers for an adapter: what it does not do by itself for a :class:`TrainedModule`."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from mmicl_kernels.data.collate import Collator
from mmicl_kernels.durable import replacing
from mmicl_kernels.methods import CheckpointError
from mmicl_kernels.methods.base import DESCRIPTION_FILE
from mmicl_kernels.methods.measures import describe_large_shares
from mmicl_kernels.methods.objective import trainable
from mmicl_kernels.store import read_adapter
from mmicl_kernels.training.module import TrainedModule, token_shares
from mmicl_kernels.training.optimizer import decay_to_identity, parameter_groups
from mmicl_kernels.training.queries import CountedBatches, Queries, QueryOrder
from mmicl_kernels.training.sharding import check_deepspeed, shard, without_fsdp

STATE_FILE = "trainer_state.json"  # what a Trainer writes last into a checkpoint


class AdapterTrainer(Trainer):
    """Trains the adapter of a :class:`TrainedModule`.

    Beside what a Trainer does: the learning rates and the decay of the method's own; losses that are means
    over all tokens of an update, whether accumulated or of several processes; other demonstrations in each
    epoch; the parts of the loss in the log, with what decides it every ``measure_every`` updates; a
    checkpoint is an adapter's folder, with ``description``, which JSON can hold, in ``training.json``.

    A ``Collator`` makes the batches. The evaluation's demonstrations are the same each time.
    """

    def __init__(
        self,
        module: TrainedModule,
        arguments: TrainingArguments,
        collator: Collator,
        queries: Dataset,
        validation: Dataset | None = None,
        *,
        description: Mapping[str, Any] | None = None,
        measure_every: int = 100,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """Raises ValueError: ``arguments`` ask for other batches than :class:`QueryOrder` makes."""
        _check_order(arguments)
        if arguments.n_gpu > 1:  # several devices and one process: nn.DataParallel's copies call one model
            arguments._n_gpu = 1
        self.collator, self.module, self.description = collator, module, dict(description or {})
        super().__init__(
            module,
            arguments,
            train_dataset=Queries(queries),
            eval_dataset=None if validation is None else Queries(validation),
            data_collator=CountedBatches(collator, queries[0]),
            callbacks=[_Epochs(collator), *(callbacks or ())],
        )
        # Of several processes each has its own where nothing is kept; the best checkpoint is in the first's.
        (arguments.output_dir,) = broadcast_object_list([arguments.output_dir])
        # A compiled backward pass cannot be repeated, as measuring the parts' gradients would.
        self.measure_every = 0 if arguments.torch_compile else measure_every
        self._sums: dict[str, Tensor] = {}  # of the parts in the updates since the last line of the log
        self._logged = 0
        self._measured: int | None = None
        self._warned = False

    def create_accelerator_and_postprocess(self) -> None:
        """FSDP, if it is asked for, shards the model, and DDP averages the adapter's gradients."""
        with without_fsdp(self.args) as plugin:
            super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin.zero_stage, self.module.adapter)
        if plugin is not None:
            shard(self.module.model, self.module.adapter, plugin, self.accelerator)

    def _wrap_model(self, model: torch.nn.Module, training: bool = True, **kwargs: Any) -> torch.nn.Module:
        wrapped = super()._wrap_model(model, training, **kwargs)
        if wrapped is self.module and training and isinstance(self.module.model, FSDPModule):
            # accelerate refuses DDP where there are sharded parameters, which it leaves alone here.
            return DistributedDataParallel(wrapped)
        return wrapped

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:  # or the frozen model would be in checkpoints
            save = self.model_wrapped.save_checkpoint
            self.model_wrapped.save_checkpoint = partial(save, exclude_frozen_parameters=True)
        return prepared

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.module)
            parameters, objective = trainable(self.module.adapter), self.module.objective
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = kind(parameter_groups(parameters, rate, decay, objective), **options)
            decay_to_identity(self.optimizer, parameters, objective)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> QueryOrder:
        args, seed = self.args, None
        if args.train_sampling_strategy == "random":
            seed = args.seed if args.data_seed is None else args.data_seed
        return self._order(self.train_dataset, self._train_batch_size, seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> QueryOrder:
        return self._order(eval_dataset, self.args.eval_batch_size, None)

    def _order(self, queries: Dataset, batch_size: int, seed: int | None) -> QueryOrder:
        # Processes that share a layer's heads have the same queries.
        processes = self.accelerator.num_processes // self.get_tp_size()
        return QueryOrder(len(queries), batch_size * processes, self.collator, seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The batches of an update, each with its share of all tokens."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = [x["token_counts"].to(device) for x in batches]
            total = self.accelerator.reduce(sum(counts), "sum")
            number = len(batches) * self.accelerator.num_processes
            for batch, count in zip(batches, counts, strict=True):
                del batch["token_counts"]
                batch["shares"] = token_shares(count, total, number)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises FloatingPointError: the loss is not finite; nothing was changed by it."""
        step, objective = self.state.global_step, self.module.objective
        if not self._sums:  # the first after a line of the log, or after going on
            self._logged = step
        due = self.measure_every > 0 and step % self.measure_every == 0
        objective.measures = due and self._measured != step  # an update may have several batches
        self._measured = step
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            objective.measures = False
        total = self.accelerator.reduce(loss, "sum")  # of all processes: all stop, before the update
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {float(total)} at step {step}, expected finite")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Raises FloatingPointError: it is not finite, but in fp16, whose scale is lowered then."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {float(norm)} at step {self.state.global_step}")
        return norm

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self._note(outputs, inputs["shares"])
        return (loss, outputs) if return_outputs else loss

    def _note(self, outputs: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> None:
        measured = {name: x for name, x in outputs.items() if "/" in name}
        if measured and self.args.should_log:
            found = {name: float(x) for name, x in measured.items()}
            self.log(found)
            message = None if self._warned else describe_large_shares(found)
            if message is not None:
                self._warned = True
                warnings.warn(message, stacklevel=2)
        for name in outputs.keys() - measured.keys() - {"loss"}:
            part = outputs[name].detach() * shares[self.module.tokens_of(name)]
            self._sums[name] = self._sums.get(name, 0) + part / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """With the means of the parts over all processes' tokens, beside the loss."""
        if "loss" in logs and self._sums:
            updates = self.state.global_step - self._logged
            parts = {name: x / updates for name, x in sorted(self._sums.items())}
            logs = {**logs, **{name: float(self.accelerator.reduce(x, "mean")) for name, x in parts.items()}}
            self._sums, self._logged = {}, self.state.global_step
        super().log(logs, *args)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss and its parts, means over all tokens of the data, whatever the batches and processes."""
        model = self.model_wrapped if self.is_in_train else self.model
        was_training = model.training
        model.eval()
        sums: dict[str, Tensor] = {}
        queries = None if eval_dataset is None else Queries(eval_dataset)
        try:
            for inputs in self.get_eval_dataloader(queries):
                inputs = self._prepare_inputs(inputs)
                answer, query = inputs.pop("token_counts").double()
                with torch.no_grad(), self.compute_loss_context_manager():
                    outputs = model(**inputs)
                for name, x in outputs.items():
                    count = query if self.module.tokens_of(name) == "query" else answer
                    add = torch.stack([x.detach().double() * count, count])
                    sums[name] = sums.get(name, 0) + add
        finally:
            model.train(was_training)
        means = {}
        for name, x in sums.items():
            total, count = self.accelerator.reduce(x, "sum").tolist()
            means[name] = total / count
        weights = self.module.objective.weights
        means["loss"] = sum(weight * means[name] for name, weight in weights.items())
        metrics = {f"{metric_key_prefix}_{name}": x for name, x in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter's folder and its description, by the main process; all must call it."""
        whole = {name: _whole(x) for name, x in self.module.adapter.state_dict().items()}
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        adapter = self.module.adapter
        adapter.from_tensors(adapter.config, adapter.backbone, whole).save_pretrained(folder)
        with replacing(folder / DESCRIPTION_FILE) as (file,):
            file.write_text(json.dumps(self.description, indent=2))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """Raises CheckpointError: the folder has no adapter, or one of another method or model."""
        adapter, mine = read_adapter(resume_from_checkpoint), self.module.adapter
        differences = mine.backbone.differences(adapter.backbone)
        if type(adapter) is not type(mine) or adapter.config != mine.config or differences:
            raise CheckpointError(
                f"{resume_from_checkpoint} has {adapter.config}, expected {mine.config}"
                f"{'; '.join(['', *differences])}"
            )
        with torch.no_grad():
            for x, value in zip(mine.state_dict().values(), adapter.state_dict().values(), strict=True):
                value = value.to(x.device)
                if isinstance(x, DTensor):
                    value = distribute_tensor(value, x.device_mesh, x.placements)
                x.copy_(value)

    def restore(self, checkpoint: Path) -> None:
        """What :meth:`train` had left, where it was ended after the last update."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # or STATE_FILE might be there before another process's state

    def _load_best_model(self) -> None:
        # By its name: the folder may have been moved since.
        name = Path(self.state.best_model_checkpoint).name
        self._load_from_checkpoint(str(Path(self.args.output_dir) / name))


def _check_order(arguments: TrainingArguments) -> None:
    order, config = arguments.train_sampling_strategy, arguments.accelerator_config
    if order not in ("random", "sequential"):
        raise ValueError(f"train_sampling_strategy is {order!r}, expected 'random' or 'sequential'")
    for name, value in {
        "dataloader_drop_last": arguments.dataloader_drop_last,
        "split_batches": config.split_batches,
        "dispatch_batches": config.dispatch_batches,
    }.items():
        if value:
            raise ValueError(f"{name} is {value}, expected False: every query is in one process's batch")


class _Epochs(TrainerCallback):
    """Tells a collator which epoch begins, so that its demonstrations are drawn anew."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        self.collator.set_epoch(int(state.epoch or 0))


def _whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a training; one that was being written when it was killed is none."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and _is_complete(path):
            found.append((int(number), path))
    return max(found)[1] if found else None


def is_finished(checkpoint: Path) -> bool:
    """Whether it was written after the last update."""
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    return state.global_step >= state.max_steps


def check_whole(checkpoint: Path) -> None:
    """Raise ValueError unless it has what a training needs to go on, the optimizer's state too."""
    names = {x.name for x in checkpoint.iterdir()}
    # DeepSpeed's is in a folder of its own.
    if "optimizer.pt" not in names and not any(x.startswith("global_step") for x in names):
        raise ValueError(f"{checkpoint} has {sorted(names)}, expected optimizer.pt too, to go on from it")


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True
