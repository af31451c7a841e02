"""Exact cosines: one product in fp32 finds who may be among the best, fp64 decides."""

import math
import sqlite3

import torch
from torch import Tensor

from mmicl_kernels.methods import CheckpointError

NUMBERS_AT_ONCE = 2**15 - 1  # scored in fp64: torch divides more among threads, which wait for each other
ROWS_AT_ONCE = 2**12  # read


def unit(embedding: Tensor) -> Tensor:
    """``embedding`` in fp64, with length one."""
    embedding = embedding.double()
    embedding = embedding / embedding.abs().max()  # or the squares of the largest overflow
    return embedding / embedding.norm()


def scaled(embedding: Tensor) -> Tensor:
    """``embedding`` fp32 times the power of two that brings its length to between 1/2 and 1.

    No bit is lost but in elements below 2^-126 of the length, which change no cosine by 2^-126.
    """
    exponent = math.frexp(float(embedding.double().norm()))[1]
    return (embedding.double() * 2.0**-exponent).float()


def score_error(dimension: int) -> float:
    """Bound on the error of a cosine that fp32 computes of ``scaled`` vectors and a query rounded to fp32.

    A sum of D products costs at most D halves of an eps, in any order; the rounding of the query, of the
    length and of the quotient another half each. The rest covers what these do to each other.
    """
    return (dimension + 4) * torch.finfo(torch.float32).eps


class Vectors:
    """The embeddings of an index in memory, as ``scaled`` has them: what was read stays, what is new is read.

    Ids only grow and are never used again, so an id that is gone is an entry that was removed or replaced.
    """

    def __init__(self) -> None:
        self.clear()

    @torch.inference_mode(False)  # what was made in that mode could not be changed outside, here and below
    def clear(self, generation: int | None = None, room: int = 0, dimension: int = 0) -> None:
        """Know nothing, and have room for ``room`` vectors."""
        self._generation, self._count = generation, 0
        # "cpu", here and below: a caller may have set another default device.
        self._vectors = torch.empty(room, dimension, dtype=torch.float32, device="cpu")
        self._norms = torch.empty(room, dtype=torch.float32, device="cpu")
        self._ids = torch.empty(room, dtype=torch.int64, device="cpu")
        self._alive = torch.ones(room, dtype=torch.bool, device="cpu")

    def nearest(
        self, index: sqlite3.Connection, query: Tensor, limit: int, ids: Tensor | None
    ) -> list[tuple[float, str, str]]:
        """``(cosine, name, digest)`` of the best ``limit``, best first, ties by name.

        Args:
            index: in a transaction. query: unit vector ``[D]`` fp64. ids: int64 of those to choose from, all
            of which have embeddings; None for all.

        Raises:
            CheckpointError: the vectors in ``index`` are damaged.
        """
        self._follow(index)
        if ids is None:
            places = self._alive[: self._count].nonzero().view(-1)
        else:
            places = torch.searchsorted(self._ids[: self._count], ids)
        limit = min(limit, len(places))
        if limit == 0:
            return []
        scores = self._scores(query)[places]
        bound = float(scores.topk(limit).values[-1]) - 2 * score_error(query.numel())
        places = places[(scores >= bound).nonzero().view(-1)]
        cosines = self._cosines(places, query)
        near = cosines >= cosines.topk(limit).values[-1]
        found = []
        for cosine, id in zip(cosines[near].tolist(), self._ids[places][near].tolist(), strict=True):
            row = index.execute("SELECT name, digest FROM entries WHERE id = ?", (id,)).fetchone()
            if row is None:
                ids = index.execute("SELECT id FROM entries WHERE dimension IS NOT NULL").fetchall()
                alive = torch.tensor(ids, dtype=torch.int64, device="cpu")
                self._alive[: self._count] = torch.isin(self._ids[: self._count], alive)
                return self.nearest(index, query, limit, None)
            found.append((cosine, *row))
        return sorted(found, key=lambda x: (-x[0], x[1]))[:limit]

    @torch.inference_mode(False)
    def _follow(self, index: sqlite3.Connection) -> None:
        """Read what is new; read all where this is another database, or what is new has no room."""
        generation = index.execute("PRAGMA user_version").fetchone()[0]
        last = int(self._ids[self._count - 1]) if self._count else 0
        count = "SELECT count(*), max(dimension) FROM entries WHERE +dimension IS NOT NULL AND id > ?"
        new, dimension = index.execute(count, (last,)).fetchone()
        if generation != self._generation or (
            new and (self._count + new > len(self._ids) or dimension != self._vectors.shape[1])
        ):
            last = 0
            new, dimension = index.execute(count, (last,)).fetchone()
            self.clear(generation, new + new // 4, dimension or 0)
        rows = index.execute("SELECT id, vector FROM vectors WHERE id > ? ORDER BY id", (last,))
        while new and (part := rows.fetchmany(ROWS_AT_ONCE)):
            size, place = self._vectors.shape[1], slice(self._count, self._count + len(part))
            ids, data = zip(*part, strict=True)
            if place.stop > len(self._ids) or any(type(x) is not bytes or len(x) != 4 * size for x in data):
                raise CheckpointError(f"the index has vectors of other sizes than {size}, or too many")
            vectors = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.float32).view(-1, size)
            self._vectors[place], self._norms[place] = vectors, vectors.double().norm(dim=-1)
            self._ids[place] = torch.tensor(ids, device="cpu")
            self._count = place.stop

    def _scores(self, query: Tensor) -> Tensor:
        """Cosines with all vectors, fp32; -inf of one that is not finite, which only damage can bring about.

        ``mv``, because ``@`` would follow the caller's autocast to bf16.
        """
        scores = self._vectors[: self._count].mv(query.float()) / self._norms[: self._count]
        return scores.nan_to_num_(-math.inf, -math.inf, -math.inf)

    def _cosines(self, places: Tensor, query: Tensor) -> Tensor:
        """The same in fp64, row by row: how a product is rounded depends on the place of its row."""
        cosines = []
        for part in places.split(max(1, NUMBERS_AT_ONCE // query.numel())):
            vectors = self._vectors[part].double()
            cosines.append((vectors * query).sum(-1) / vectors.norm(dim=-1))
        return torch.cat(cosines).nan_to_num(-math.inf, -math.inf, -math.inf)
