"""DemonstrationBank: AIM's fused tokens of many demonstrations, made once and used by any request."""

from __future__ import annotations

import operator
import os
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmicl_kernels.data import Demonstration, content_digest
from mmicl_kernels.durable import locked, no_fork
from mmicl_kernels.methods import Adapter, Backbone, CheckpointError
from mmicl_kernels.methods.base import is_plain
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.ops._core.checks import FLOAT_DTYPES
from mmicl_kernels.store.bank_files import (
    INDEX,
    LOCK,
    MEANS,
    RECORD,
    ROWS,
    SCALES,
    TEXTS,
    Contents,
    Description,
    Record,
    Records,
    created,
    read_description,
    read_records,
    write_after,
)
from mmicl_kernels.store.mapped import Mapped
from mmicl_kernels.store.vectors import NUMBERS_AT_ONCE, unit
from mmicl_kernels.store.working_set import WorkingSet


class Wording(NamedTuple):
    """What people can read of a demonstration."""

    text: str
    answer: str


class _State(NamedTuple):
    """What one look at the folder found. A newer one replaces it as a whole, so threads need no lock."""

    records: Records
    rows: Mapped  # [N, C]
    scales: Mapped | None  # [N]
    means: Mapped  # [M, C]
    texts: Mapped  # bytes


class DemonstrationBank:
    """Fused tokens of demonstrations, in ``folder``, under the ids 0, 1, 2, ... in order of addition.

    The rows stay on the disk: what a request names is read, through a memory map, when it is used.
    Demonstrations are only ever added. Any number of processes may read and write at once: writers take
    turns by an advisory lock, readers need none and see what there was when they opened, added, or called
    ``refresh``. A process killed at any moment leaves every demonstration whole or absent. One object may be
    shared by threads, and used on in a forked process. What ``add`` reads, writes and copies does not grow
    with the bank.

    Attributes:
        hidden_size: C. dtype: of the stored rows, fp32, fp16, bf16 or int8 (one fp32 scale per row).
        digest: ``digest()`` of the adapter that made the rows. backbone: the model it was made for.
        prompt: as given to ``create``.

    Raises:
        FileNotFoundError: no bank in ``folder``. CheckpointError: one that is damaged.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).absolute()  # a pickle may be opened elsewhere
        self._description = read_description(self.folder)
        self.hidden_size: int = self._description.hidden_size
        self.dtype: torch.dtype = self._description.dtype
        self.digest: str = self._description.digest
        self.backbone: Backbone = self._description.backbone
        self.prompt: str = self._description.prompt
        self._norms = torch.empty(0, dtype=torch.float64, device="cpu")  # of the means, as far as compared
        self._at_once = max(1, NUMBERS_AT_ONCE // self.hidden_size)  # means, compared
        self._state = self._mapped(read_records(self.folder))
        self._contents = Contents(self._state.records)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        adapter: Adapter,
        dtype: torch.dtype = torch.bfloat16,
        prompt: str = "",
    ) -> DemonstrationBank:
        """Make an empty bank for what ``adapter`` fuses, as it is now.

        ``prompt`` is kept: how demonstrations become prompts (``PromptBuilder.description``), of which their
        ids do not know.

        Raises:
            FileExistsError: there is a bank. TypeError, ValueError: ``adapter`` does not fuse, a bank cannot
            have this ``dtype``. OSError: the disk; there is no bank then.
        """
        if not isinstance(adapter, Adapter) or not adapter.fuses:
            raise TypeError(f"adapter is a {type(adapter).__name__}, expected one that fuses demonstrations")
        description = Description(uuid.uuid4().hex, dtype, adapter.digest(), adapter.backbone, prompt)
        with created(Path(folder).absolute(), description):
            return cls(folder)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Copies and pickles open the folder again."""
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self._state.records)

    def refresh(self) -> None:
        """See what other processes have added. Raises CheckpointError: damage, or a bank made anew."""
        with no_fork:
            if read_description(self.folder) != self._description:
                raise CheckpointError(f"{self.folder} holds another bank than when it was opened")
            records = read_records(self.folder, self._state.records)
            if records is not self._state.records:
                self._state = self._mapped(records)

    def find(self, demonstration: Demonstration) -> int | None:
        """The id of this demonstration, by its content and the bank's adapter; None if it is not there."""
        return self._id_of(self._digest_of(demonstration))

    def add(self, demonstrations: Sequence[Demonstration], tokens: Sequence[Tensor]) -> list[int]:
        """Store fused tokens; when this returns, the disk has them.

        A demonstration that is there already, or was named earlier in the call, keeps its first id and its
        first tokens. All is checked before anything is written. Waits for the disk once per file, not once
        per demonstration.

        Args:
            tokens: of each demonstration ``[n_i, C]``, floating, on any device; n_i may be 0.

        Returns:
            The id of each.

        Raises:
            TypeError, ValueError: an argument is not as above, is not finite, or overflows in ``dtype``.
            OSError: the disk; of the call's demonstrations some may be there then, each of them whole.
        """
        demonstrations, tokens = list(demonstrations), list(tokens)
        if len(demonstrations) != len(tokens):
            raise ValueError(f"tokens has {len(tokens)} items, expected one for each of the "
                             f"{len(demonstrations)} demonstrations")  # fmt: skip
        digests = [self._digest_of(x) for x in demonstrations]
        columns = [self._columns(i, x) for i, x in enumerate(tokens)]
        if not columns:
            return []
        with locked(self.folder / LOCK):
            self.refresh()
            new: dict[bytes, int] = {}
            for i, digest in enumerate(digests):
                if self._id_of(digest) is None:
                    new.setdefault(digest, i)
            if new:
                chosen = new.values()
                self._write([demonstrations[i] for i in chosen], list(new), [columns[i] for i in chosen])
                self.refresh()
            return [self._id_of(digest) for digest in digests]

    @property
    def lengths(self) -> Tensor:
        """Tokens of every demonstration, int64 ``[M]`` on the CPU."""
        return self._state.records.offsets.diff()

    @property
    def fused(self) -> FusedTokens:
        """All rows, memory-mapped on the CPU: the bank of ``ops.prefix_splice``. Nothing is read before it is
        used, and nothing is checked: ``verify`` is for that. Writing into it does not reach the files.
        """
        state = self._state
        scale = None if state.scales is None else state.scales.tensor
        return FusedTokens(state.rows.tensor, state.records.offsets, scale)

    def prefetch(self, ids: Iterable[int]) -> None:
        """Have the disk read the rows of ``ids``, without waiting: many requests at once are faster than the
        page after page that ``fused`` is read in. Raises IndexError: no such id.
        """
        for id in ids:
            id, state = self._checked(id), self._state
            state.rows.prefetch(*state.records.offsets[id : id + 2].tolist())

    def tokens(self, id: int) -> Tensor:
        """Fused tokens ``[n, C]`` of one demonstration, in ``dtype``, or of int8 the fp32 products.

        Raises:
            IndexError: no such id. CheckpointError: its rows are damaged.
        """
        id, state = self._checked(id), self._state
        begin, end = state.records.offsets[id : id + 2].tolist()
        maps = [x for x in (state.rows, state.scales) if x is not None]
        state.rows.prefetch(begin, end)
        rows, *scale = parts = [x.tensor[begin:end].clone() for x in maps]
        if _crc(parts) != state.records[id].rows_crc:
            raise CheckpointError(f"{self.folder / ROWS}: the rows of demonstration {id} are damaged")
        return rows * scale[0][:, None] if scale else rows

    def mean(self, id: int) -> Tensor:
        """Mean ``[C]`` fp32 of a demonstration's tokens as they were added; zeros without any.

        Raises as ``tokens``.
        """
        id, state = self._checked(id), self._state
        mean = state.means.tensor[id].clone()
        if _crc([mean]) != state.records[id].mean_crc:
            raise CheckpointError(f"{self.folder / MEANS}: the mean of demonstration {id} is damaged")
        return mean

    def text(self, id: int) -> Wording:
        """Text and answer of a demonstration. Raises as ``tokens``."""
        id, state = self._checked(id), self._state
        record, begin = state.records[id], state.records[id - 1].answer_end if id else 0
        both = state.texts.tensor[begin : record.answer_end].numpy().tobytes()
        if zlib.crc32(both) != record.text_crc:
            raise CheckpointError(f"{self.folder / TEXTS}: the text of demonstration {id} is damaged")
        try:
            return Wording(both[: record.text_end - begin].decode(), both[record.text_end - begin :].decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.folder / TEXTS}: demonstration {id} is no text: {error}") from error

    def nearest(self, query: Tensor, limit: int) -> list[tuple[float, int]]:
        """``(cosine, id)`` of the demonstrations whose mean token is most like that of ``query``, best first.

        Exact up to the rounding of fp64; ties go by id. Those whose mean is zero, such as those without
        tokens, are not found. The first call reads all means, 4 C bytes per demonstration.

        Args:
            query: ``[C]``, or ``[n, C]``, whose mean is taken; any device.

        Raises:
            TypeError, ValueError: ``query`` has another shape, is not finite or has mean zero; ``limit`` is
            not positive.
        """
        if type(limit) is not int or limit < 1:
            raise ValueError(f"limit is {limit!r}, expected a positive integer")
        query = unit(self._query(query))
        means = self._state.means.tensor
        norms = self._norms_of(means)
        dots = [part.double().mv(query) for part in means.split(self._at_once)]
        scores = torch.cat(dots) / norms
        comparable = scores.abs() <= 2  # not of a mean that is zero, nor of one that damage made infinite
        scores = scores.where(comparable, -torch.inf)
        limit = min(limit, int(comparable.sum()))
        if limit == 0:
            return []
        # How a product is rounded depends on the place of its row; so candidates are scored row by row.
        error = (self.hidden_size + 4) * torch.finfo(torch.float64).eps
        near = (scores >= scores.topk(limit).values[-1] - 2 * error).nonzero().view(-1)
        cosines = [(means[ids].double() * query).sum(-1) / norms[ids] for ids in near.split(self._at_once)]
        best = zip(torch.cat(cosines).tolist(), near.tolist(), strict=True)
        return sorted(best, key=lambda pair: (-pair[0], pair[1]))[:limit]

    def verify(self) -> list[str]:
        """What is damaged, a sentence each; empty if nothing is. Reads every byte; nobody waits.

        What a killed process leaves behind is not damage: the next writer cuts it off.
        """
        try:
            bank = DemonstrationBank(self.folder)
        except (CheckpointError, OSError) as error:
            return [str(error)]
        problems = []
        for id in range(len(bank)):
            for part in (bank.tokens, bank.mean, bank.text):
                try:
                    part(id)
                except CheckpointError as error:
                    problems.append(str(error))
        return problems

    def working_set(self, device: torch.device | str, max_bytes: int) -> WorkingSet:
        """The demonstrations in use, on ``device``: see :class:`WorkingSet`."""
        return WorkingSet(self, device, max_bytes)

    def _mapped(self, records: Records) -> _State:
        """Raises CheckpointError: a file is shorter than the records say."""
        counts = {ROWS: records.num_rows, SCALES: records.num_rows, MEANS: len(records)}
        maps = {}
        for name, (dtype, width) in self._description.files.items():
            shape = (counts[name],) if name == SCALES else (counts[name], width)
            maps[name] = Mapped(self.folder / name, shape, dtype, scattered=name != MEANS)
        texts = Mapped(self.folder / TEXTS, (records.num_text_bytes,), torch.uint8)
        return _State(records, maps[ROWS], maps.get(SCALES), maps[MEANS], texts)

    def _digest_of(self, demonstration: Demonstration) -> bytes:
        """SHA-256 of the adapter and all parts, each after its length; the last two are the texts."""
        if not isinstance(demonstration, Demonstration):
            raise TypeError(f"demonstrations has a {type(demonstration).__name__}, expected Demonstration")
        texts = demonstration.text.encode(), demonstration.answer.encode()
        return content_digest((*demonstration.images, *texts), self.digest.encode())

    def _id_of(self, digest: bytes) -> int | None:
        with no_fork:
            records = self._state.records
            self._contents.follow(records)
            return self._contents.find(digest, records)

    def _columns(self, i: int, x: Tensor) -> dict[str, Tensor]:
        """What each file gets of ``tokens[i]``: rows ``[n, C]``, scales ``[n]``, mean ``[C]``."""
        if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"tokens[{i}] is {found}, expected a floating tensor")
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"tokens[{i}] has shape {list(x.shape)}, expected [n, {self.hidden_size}]")
        if not is_plain(x):
            raise ValueError(f"tokens[{i}] is sparse, meta, freed or the like, expected a dense tensor")
        x = x.detach().to("cpu")
        bad = torch.isfinite(x).all(-1).logical_not().nonzero()
        if len(bad):
            raise ValueError(f"tokens[{i}] has NaN or infinities, first in row {int(bad[0])}")
        mean = x.double().mean(0).float() if len(x) else x.new_zeros(x.shape[1], dtype=torch.float32)
        if self.dtype == torch.int8:
            rows, scale = _quantised(x.float())
            columns = {ROWS: rows, SCALES: scale, MEANS: mean}
        else:
            columns = {ROWS: x.to(self.dtype), MEANS: mean}
        if not all(bool(torch.isfinite(column).all()) for column in columns.values()):
            raise ValueError(f"tokens[{i}] has numbers up to {float(x.abs().max()):.4g}, "
                             f"too large for a bank of {self.dtype}")  # fmt: skip
        return columns

    def _write(
        self, demonstrations: list[Demonstration], digests: list[bytes], columns: list[dict[str, Tensor]]
    ) -> None:
        """Data, then records. For who holds the lock and has refreshed."""
        records = self._state.records
        call, end_row, end_text = len(records), records.num_rows, records.num_text_bytes
        texts, new = [], []
        for demonstration, digest, column in zip(demonstrations, digests, columns, strict=True):
            text, answer = demonstration.text.encode(), demonstration.answer.encode()
            texts.append(text + answer)
            end_row, text_end = end_row + len(column[ROWS]), end_text + len(text)
            end_text = text_end + len(answer)
            rows_crc = _crc([column[name] for name in (ROWS, SCALES) if name in column])
            crcs = rows_crc, _crc([column[MEANS]]), zlib.crc32(texts[-1])
            new.append(Record(end_row, text_end, end_text, call, digest, *crcs).pack())
        for name, size in self._sizes(records).items():
            parts = texts if name == TEXTS else (_bytes(column[name]) for column in columns)
            write_after(self.folder / name, size, parts)
        write_after(self.folder / INDEX, call * RECORD.size, new)

    def _sizes(self, records: Records) -> dict[str, int]:
        """Bytes of every data file that ``records`` speak of."""
        counts = {ROWS: records.num_rows, SCALES: records.num_rows, MEANS: len(records)}
        files = self._description.files.items()
        sizes = {name: counts[name] * width * dtype.itemsize for name, (dtype, width) in files}
        return {**sizes, TEXTS: records.num_text_bytes}

    def _checked(self, id: int) -> int:
        number = operator.index(id)
        if not 0 <= number < len(self):
            raise IndexError(f"id is {number}, expected 0 to {len(self) - 1} in {self.folder}")
        return number

    def _query(self, query: Tensor) -> Tensor:
        """``[C]`` fp64 on the CPU."""
        if not isinstance(query, Tensor) or query.dtype not in FLOAT_DTYPES:
            raise TypeError(f"query is a {type(query).__name__}, expected a floating tensor")
        if query.dim() not in (1, 2) or query.shape[-1] != self.hidden_size or query.numel() == 0:
            C = self.hidden_size
            raise ValueError(f"query has shape {list(query.shape)}, expected [{C}] or [n, {C}], n at least 1")
        query = query.detach().to("cpu").double()
        query = query.mean(0) if query.dim() == 2 else query
        if not bool(torch.isfinite(query).all()) or not bool(query.any()):
            raise ValueError("query has mean zero or is not finite, so it has no cosine with anything")
        return query

    def _norms_of(self, means: Tensor) -> Tensor:
        """Euclidean norms of ``means [M, C]``, fp64; those computed before are kept."""
        norms = self._norms
        new = means[len(norms) :].split(self._at_once)
        self._norms = norms = torch.cat([norms, *(part.double().norm(dim=-1) for part in new)])
        return norms[: len(means)]


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and fp32 scales ``[n]`` of ``x [n, C]`` fp32: symmetric, the largest number of a row is 127.

    A row of zeros has scale 1, and so has one so small that its scale would be zero in fp32.
    """
    scale = x.abs().amax(-1) / 127
    scale = scale.where(scale != 0, 1.0)
    return (x / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.flatten().view(torch.uint8).numpy())


def _crc(parts: Sequence[Tensor]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(_bytes(part), crc)
    return crc
