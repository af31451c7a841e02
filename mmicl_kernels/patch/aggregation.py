"""Demonstrations through the frozen model: whose hidden states become fused tokens."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from mmicl_kernels.data import Demonstration
from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.teaching import evaluating
from mmicl_kernels.models.tokens import text_positions
from mmicl_kernels.store import DemonstrationBank

# Makes demonstrations into a batch of prompts, and says which of its tokens are fused, bool [B, T]; None is
# the text after the last image.
Collate = Callable[[Sequence[Demonstration]], tuple[Mapping[str, Tensor], Tensor | None]]


@torch.no_grad()
def last_hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states ``[B, T, C]`` in eval mode, after the final norm, without the language head.

    Raises:
        ValueError: they are not one per token of ``input_ids``. NotImplementedError: ``model`` is sharded.
    """
    if isinstance(model, FSDPModule):
        # Its weights are gathered when the whole of it is called, language head and all.
        raise NotImplementedError(
            "the model is sharded by fully_shard, expected a whole one: aggregate before"
        )
    with evaluating(model):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    if hidden.shape[:2] != inputs["input_ids"].shape:
        raise ValueError(
            f"{type(model).__name__} has hidden states {list(hidden.shape)}, expected one per token of "
            f"input_ids {list(inputs['input_ids'].shape)}"
        )
    return hidden


def aggregate(
    model: nn.Module, adapter: Adapter, inputs: Mapping[str, Tensor], positions: Tensor | None, impl: str
) -> list[Tensor]:
    """See ``Handle.aggregate``; ``model`` is plain."""
    shape = inputs["input_ids"].shape
    chosen = adapter.embedding_site.positions
    if positions is None and chosen != "text":
        raise ValueError(f"positions is None, expected a mask of what the adapter fuses, {chosen!r}")
    if positions is None:
        positions = text_positions(model, inputs)
    if positions.shape != shape or positions.dtype != torch.bool:
        raise ValueError(
            f"positions is {positions.dtype} {list(positions.shape)}, expected torch.bool {list(shape)}"
        )
    if "attention_mask" in inputs and (positions & ~inputs["attention_mask"].bool()).any():
        raise ValueError("positions marks padding, expected tokens that attention_mask keeps")
    counts = positions.sum(-1).tolist()
    hidden = last_hidden(model, inputs)
    return list(adapter.fuse(hidden, positions, num_rows=sum(counts), impl=impl).split(counts))


def fill(
    bank: DemonstrationBank,
    demonstrations: Sequence[Demonstration],
    collate: Collate,
    aggregate: Callable[[Mapping[str, Tensor], Tensor | None], list[Tensor]],
    batch_size: int,
    progress: bool,
) -> list[int]:
    """See ``Handle.add_demonstrations``: those that the bank lacks, batch by batch; the ids of all."""
    new = [x for x in dict.fromkeys(demonstrations) if bank.find(x) is None]
    with tqdm(total=len(new), desc="aggregating", unit="demonstration", disable=not progress) as bar:
        for start in range(0, len(new), batch_size):
            batch = new[start : start + batch_size]
            with torch.no_grad():
                bank.add(batch, aggregate(*collate(batch)))
            bar.update(len(batch))
    return [bank.find(x) for x in demonstrations]
