"""Which queries the batches of several processes have: together those of one process with a larger batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from mmicl_kernels.data.collate import Collator
from mmicl_kernels.data.shots import generator_of_text
from mmicl_kernels.training.module import token_counts

NO_QUERY = -1


class Queries(Dataset):
    """``queries``, and None at ``NO_QUERY``."""

    def __init__(self, queries: Sequence[Any]) -> None:
        self.queries = queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Any:
        return None if index == NO_QUERY else self.queries[index]


class QueryOrder(Sampler[int]):
    """Indices of an epoch's queries, the same in each process, which takes its batches of them.

    At the end there is ``NO_QUERY`` until they are a multiple of ``multiple``: accelerate would repeat
    queries, or leave a process without the batch that the others wait for.
    """

    def __init__(self, count: int, multiple: int, collator: Collator, seed: int | None = None) -> None:
        """``seed`` and the collator's epoch decide the order; without it they are in theirs."""
        self.count, self.multiple, self.collator, self.seed = count, multiple, collator, seed

    def __len__(self) -> int:
        return self.count + -self.count % self.multiple

    def __iter__(self) -> Iterator[int]:
        order = range(self.count)
        if self.seed is not None:
            generator = generator_of_text(f"order {self.seed} {self.collator.epoch}")
            order = torch.randperm(self.count, generator=generator).tolist()
        yield from order
        yield from [NO_QUERY] * (len(self) - self.count)


class CountedBatches:
    """The collator's ``arguments`` of rows of which some are no queries, with their ``token_counts``.

    A batch without any is ``filler`` with no tokens: its process takes part in what all do together.
    """

    def __init__(self, collator: Collator, filler: Any) -> None:
        self.collator, self.filler = collator, filler

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        queries = [x for x in rows if x is not None]
        arguments = self.collator.arguments(queries or [self.filler])
        counts = token_counts(arguments)
        return {**arguments, "token_counts": counts if queries else torch.zeros_like(counts)}
