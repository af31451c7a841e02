"""Queries as batches, with demonstrations drawn for each: what a ``DataLoader`` collates with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.batch import AggregationBatch, Batch
from mmicl_kernels.data.episodes import EpisodeBatch, episode_batch
from mmicl_kernels.data.prefix import prefixed_batch
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.data.sampling import Draw as DrawnIndices
from mmicl_kernels.data.shots import Draw, RandomShots, demonstration_of, generator_of, key_of

Made = TypeVar("Made", bound=Batch)


class Collator(Generic[Made]):
    """Makes a batch of queries, or of pairs of a query and its demonstrations.

    For a query alone demonstrations are drawn from ``pool``. What is drawn depends on the seed, the epoch and
    the query, so neither on its batch nor on which worker makes it. An example is a ``Demonstration``, or
    what makes one by ``.demonstration()``; one that has an ``id`` is known by it, else by its content.

    Attributes:
        epoch: the same query has other demonstrations in each. It is shared with the workers of a
            ``DataLoader``, those that persist included.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        pool: Sequence[Any],
        shots: int | tuple[int, int],
        *,
        draw: Draw | None = None,
        seed: int = 0,
    ) -> None:
        """``shots`` is how many demonstrations, or (low, high), of which the number is drawn for each query.

        Raises:
            TypeError, ValueError: ``builder`` is no PromptBuilder, ``shots`` is negative or not in order.
        """
        if not isinstance(builder, PromptBuilder):
            raise TypeError(f"builder is a {type(builder).__name__}, expected a PromptBuilder")
        low, high = (shots, shots) if isinstance(shots, int) else shots
        if not 0 <= low <= high:
            raise ValueError(f"shots is {shots!r}, expected a number or (low, high) with 0 <= low <= high")
        self.builder, self.pool, self.shots, self.seed = builder, pool, (low, high), seed
        self.draw = RandomShots() if draw is None else draw
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Before a ``DataLoader`` begins its batches: workers make some of them ahead."""
        self._epoch.fill_(epoch)

    def __call__(self, queries: Sequence[Any]) -> Made:
        """Raises as the builder and the batch; ValueError: the pool is too small. It names the queries."""
        pairs = [x if isinstance(x, tuple) else (x, self.drawn(x)) for x in queries]
        with _naming(pairs):
            return self._batch(
                [demonstration_of(x) for x, _ in pairs],
                [[demonstration_of(x) for x in shots] for _, shots in pairs],
            )

    def arguments(self, queries: Sequence[Any]) -> dict[str, object]:
        """The batch's ``arguments()``: the ``data_collator`` of a Trainer."""
        return self(queries).arguments()

    def drawn(self, query: Any, epoch: int | None = None) -> list[Any]:
        """The demonstrations of a query in an epoch, by default in this one."""
        generator = generator_of(query, seed=self.seed, epoch=self.epoch if epoch is None else epoch)
        low, high = self.shots
        shots = low if low == high else int(torch.randint(low, high + 1, (), generator=generator))
        return [self.pool[i] for i in self.draw(self.pool, query, shots, generator)]

    def _batch(self, queries: list[Demonstration], shots: list[list[Demonstration]]) -> Made:
        raise NotImplementedError


@contextmanager
def _naming(pairs: Sequence[tuple[Any, Sequence[Any]]]) -> Iterator[None]:
    """A ValueError in a ``with`` block says which queries and demonstrations are at it."""
    try:
        yield
    except ValueError as error:
        names = [[_name(x), *map(_name, shots)] for x, shots in pairs]
        raise ValueError(f"{error} (queries, each with its demonstrations: {names})") from error


def _name(example: Any) -> str:
    name = getattr(example, "id", None)
    return getattr(example, "text", type(example).__name__)[:40] if name is None else str(name)


class EpisodeCollator(Collator[EpisodeBatch]):
    """Batches for all methods but AIM: each query alone and after its demonstrations.

    Args:
        shots_per_pass: how many demonstrations a prompt of the teacher has at most; with it batches are
            ``ManyShotBatch``, for LIVE and M2IV.
        padding_side: "right" or "left".
        shared_shots: whether all queries of a batch have the same demonstrations, none of which is one of
            them, so that a teacher reads them once: batches are ``PrefixedBatch``. What is drawn then depends
            on the batch's queries: two halves of a batch are not the batch. Pairs keep their own.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        pool: Sequence[Any] = (),
        shots: int = 8,
        *,
        draw: Draw | None = None,
        shots_per_pass: int | None = None,
        padding_side: str = "right",
        shared_shots: bool = False,
        seed: int = 0,
    ) -> None:
        """Raises as :class:`Collator`; ValueError: ``shared_shots`` with options that it does not go with."""
        super().__init__(builder, pool, shots, draw=draw, seed=seed)
        if shots_per_pass is not None and shots_per_pass < 1:
            raise ValueError(f"shots_per_pass is {shots_per_pass!r}, expected at least 1")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is {padding_side!r}, expected 'right' or 'left'")
        low, high = self.shots
        if shared_shots and (low != high or shots_per_pass is not None or padding_side != "right"):
            raise ValueError(
                f"shared_shots is True, shots {shots!r}, shots_per_pass {shots_per_pass!r} and padding_side "
                f"{padding_side!r}, expected a number, None and 'right'"
            )
        if shared_shots and not isinstance(self.draw, RandomShots):
            raise ValueError(
                f"draw is a {type(self.draw).__name__} and shared_shots True, expected RandomShots, which "
                "draws for several queries"
            )
        self.shots_per_pass, self.padding_side, self.shared_shots = shots_per_pass, padding_side, shared_shots

    def __call__(self, queries: Sequence[Any]) -> EpisodeBatch:
        """Raises as the builder and the batch; ValueError: the pool is too small."""
        shots, _ = self.shots
        if not self.shared_shots or shots == 0 or any(isinstance(x, tuple) for x in queries):
            return super().__call__(queries)
        generator = generator_of(*queries, seed=self.seed, epoch=self.epoch)
        drawn = [self.pool[i] for i in self.draw.for_all(self.pool, queries, shots, generator)]
        with _naming([(x, drawn) for x in queries]):
            made = [[demonstration_of(x) for x in row] for row in (queries, drawn)]
            return prefixed_batch(self.builder, *made)

    def _batch(self, queries: list[Demonstration], shots: list[list[Demonstration]]) -> EpisodeBatch:
        options = {"shots_per_pass": self.shots_per_pass, "padding_side": self.padding_side}
        return episode_batch(self.builder, queries, shots, **options)


class AggregationCollator(Collator[AggregationBatch]):
    """Batches for AIM: demonstrations, each a prompt of its own, and queries that come after some of them.

    A demonstration that several queries have is there once.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        pool: Sequence[Any] = (),
        shots: int | tuple[int, int] = (1, 4),
        *,
        draw: Draw | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(builder, pool, shots, draw=draw, seed=seed)

    def _batch(self, queries: list[Demonstration], shots: list[list[Demonstration]]) -> AggregationBatch:
        """Raises ValueError: no query has a demonstration."""
        places: dict[str, int] = {}
        once: list[Demonstration] = []
        for x in (x for row in shots for x in row):
            if key_of(x) not in places:
                places[key_of(x)] = len(once)
                once.append(x)
        chosen = [[places[key_of(x)] for x in row] for row in shots]
        return AggregationBatch(*self.builder.demonstrations(once), *self.builder.queries(queries), chosen)


class DrawnEpisodes(Dataset):
    """Pairs of a query and its demonstrations, of which :func:`draw_demonstrations` has the indices: M2IV."""

    def __init__(self, pool: Sequence[Any], draws: Sequence[DrawnIndices]) -> None:
        self.pool, self.draws = pool, draws

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: int) -> tuple[Any, tuple[Any, ...]]:
        draw = self.draws[index]
        return self.pool[draw.query], tuple(self.pool[i] for i in draw.demonstrations)


def epochs(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches without end, with other demonstrations in each epoch.

    Raises:
        ValueError: it has none.
    """
    for epoch in count():
        for part in (loader.collate_fn, loader.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        some = False
        for batch in loader:
            some = True
            yield batch
        if not some:
            raise ValueError("loader has no batches, expected at least one")
