"""``prefix_splice``: beside a copy of as many bytes, a Python loop, cat and pad, masked_scatter.

A case has B requests of 16 demonstrations each, padded left to T tokens of C = H * D numbers. The peers get
every id and length as Python numbers, for nothing; the op reads them from tensors.
"""

import random
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness.case import DTYPES, Case, square
from benchmarks.harness.spec import Inputs, Provider, Spec, memcpy, on_both
from benchmarks.harness.timing import Function
from benchmarks.harness.values import Part
from mmicl_kernels.ops import prefix_splice

DEMONSTRATIONS = 16  # of a request
BANKED = 512

CPU_CASES = tuple(square(32, T, 8, dtype=dtype) for dtype, T in product(DTYPES, (128, 224, 512)))
CUDA_CASES = (
    *(square(32, T, 32, model="Idefics2-8b") for T in (512, 2048)),
    square(8, 4096, 32, model="Idefics2-8b"),
    square(64, 1024, 32, 64, model="SmolVLM"),
    square(1, 1024, 32, model="Idefics2-8b"),
)


class Ragged(NamedTuple):
    """Tokens of every banked demonstration, ids of every request, tokens of every prompt and the most."""

    sizes: list[int]
    requests: list[list[int]]
    prompts: list[int]
    longest_prompt: int

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.sizes)]

    def pieces(self, r: int) -> list[tuple[int, int]]:
        """Bank rows of the demonstrations of a request."""
        offsets = self.offsets
        return [(offsets[d], offsets[d + 1]) for d in self.requests[r]]

    def fused(self, r: int) -> int:
        return sum(self.sizes[d] for d in self.requests[r])


def ragged(case: Case) -> Ragged:
    """The lengths of a case, the same ones every time: all fits, and some are half as long as others."""
    rng = random.Random(0)
    most = case.T // 8
    size = (case.T - most) // DEMONSTRATIONS
    sizes = [rng.randint(max(size // 2, 1), size) for _ in range(BANKED)]
    requests = [[rng.randrange(BANKED) for _ in range(DEMONSTRATIONS)] for _ in range(case.B)]
    return Ragged(sizes, requests, [rng.randint(most // 2, most) for _ in range(case.B)], most)


def make_inputs(case: Case, device: str) -> Inputs:
    """bank, offsets, demo_ids, cu_demos, prompt (padded left) and where the prompts begin."""
    torch.manual_seed(0)
    lengths, C = ragged(case), case.H * case.D
    options = {"dtype": case.torch_dtype, "device": device}
    ints = {"dtype": torch.int32, "device": device}
    return (
        torch.randn(sum(lengths.sizes), C, **options),
        torch.tensor(lengths.offsets, **ints),
        torch.tensor([d for ids in lengths.requests for d in ids], **ints),
        torch.arange(case.B + 1, **ints) * DEMONSTRATIONS,
        torch.randn(case.B, lengths.longest_prompt, C, **options),
        torch.tensor([lengths.longest_prompt - n for n in lengths.prompts], **ints),
    )


def num_bytes(case: Case) -> int:
    """Every row of the batch written, and what is not padding read, once."""
    lengths = ragged(case)
    tokens = sum(lengths.fused(r) + lengths.prompts[r] for r in range(case.B))
    return (tokens + case.B * case.T) * case.H * case.D * case.torch_dtype.itemsize


def _ours(impl: str) -> Provider:
    def bind(case: Case, inputs: Inputs) -> Function:
        *spliced, start = inputs
        return lambda: _heads(
            case, prefix_splice(*spliced, prompt_start=start, length=case.T, impl=impl).embeddings
        )

    return bind


def python_loop(case: Case, inputs: Inputs) -> Function:
    """One copy per demonstration into a batch of zeros."""
    bank, *_, prompt, _ = inputs
    lengths, T = ragged(case), case.T

    def run() -> Tensor:
        out = prompt.new_zeros(case.B, T, prompt.shape[2])
        mask = torch.zeros(case.B, T, dtype=torch.long, device=prompt.device)
        positions, totals = torch.zeros_like(mask), []
        for r, own in enumerate(lengths.prompts):
            first = T - own
            out[r, first:] = prompt[r, lengths.longest_prompt - own :]
            for low, high in reversed(lengths.pieces(r)):
                out[r, first - (high - low) : first] = bank[low:high]
                first -= high - low
            mask[r, first:] = 1
            positions[r, first:] = torch.arange(T - first, device=prompt.device)
            totals.append(T - first)
        _cu_seqlens(totals, prompt)
        return _heads(case, out)

    return run


def cat_and_pad(case: Case, inputs: Inputs) -> Function:
    """``torch.cat`` per request, then ``pad_sequence``."""
    bank, *_, prompt, _ = inputs
    lengths, T = ragged(case), case.T

    def run() -> Tensor:
        rows = []
        for r, own in enumerate(lengths.prompts):
            fused = [bank[low:high] for low, high in lengths.pieces(r)]
            rows.append(torch.cat([*fused, prompt[r, lengths.longest_prompt - own :]]))
        ones = [torch.ones(len(x), dtype=torch.long, device=x.device) for x in rows]
        batch, mask = (pad_sequence(x, batch_first=True, padding_side="left") for x in (rows, ones))
        batch, mask = F.pad(batch, (0, 0, T - batch.shape[1], 0)), F.pad(mask, (T - mask.shape[1], 0))
        (mask.cumsum(1) - 1).clamp_(min=0)
        _cu_seqlens([len(x) for x in rows], prompt)
        return _heads(case, batch)

    return run


def masked_scatter(case: Case, inputs: Inputs) -> Function:
    """As models place image features; the batch with the prompts in place, mask and rows are given."""
    bank, *_, prompt, _ = inputs
    lengths, T = ragged(case), case.T
    batch = prompt.new_zeros(case.B, T, prompt.shape[2])
    mask = torch.zeros(case.B, T, dtype=torch.bool)
    for r, own in enumerate(lengths.prompts):
        batch[r, T - own :] = prompt[r, lengths.longest_prompt - own :]
        mask[r, T - own - lengths.fused(r) : T - own] = True
    rows = [n for r in range(case.B) for piece in lengths.pieces(r) for n in range(*piece)]
    rows, mask = torch.tensor(rows, device=prompt.device), mask.to(prompt.device)
    return lambda: _heads(case, batch.masked_scatter(mask[..., None], bank[rows]))


def parts(case: Case, inputs: Inputs) -> list[Part]:
    """Of the first and the last request all rows."""
    bank, offsets, demo_ids, cu_demos, prompt, start = inputs
    found = []
    for r in dict.fromkeys((0, case.B - 1)):
        ids, cu = demo_ids[DEMONSTRATIONS * r : DEMONSTRATIONS * (r + 1)], cu_demos[:2]
        own = {"prompt_start": start[r : r + 1], "length": case.T, "impl": "reference"}
        low, exact = (
            _heads(case, prefix_splice(x, offsets, ids, cu, p, **own).embeddings)
            for x, p in ((bank, prompt[r : r + 1]), (bank.double(), prompt[r : r + 1].double()))
        )
        found.append(Part(f"embeddings[{r}]", 0, (slice(r, r + 1),), low, exact))
    return found


def _cu_seqlens(totals: list[int], like: Tensor) -> Tensor:
    return torch.tensor([0, *accumulate(totals)], dtype=torch.int32, device=like.device)


def _heads(case: Case, embeddings: Tensor) -> Tensor:
    """``[B, H, T, D]``, the shape of every benchmark's output."""
    return embeddings.unflatten(2, (case.H, case.D)).transpose(1, 2)


SPEC = Spec(
    name="prefix_splice",
    tests=("tests/ops/test_prefix_splice.py",),
    make_inputs=make_inputs,
    bytes=num_bytes,
    flops=lambda case: 0,  # copies alone
    parts=parts,
    lineups=on_both(
        cpu=CPU_CASES,
        cuda=CUDA_CASES,
        floors={"memcpy": memcpy(num_bytes)},
        others={"loop": python_loop, "pad_sequence": cat_and_pad, "masked_scatter": masked_scatter},
        stock=("loop", "pad_sequence", "masked_scatter"),
        ours=_ours,
    ),
    share=0.04,
)
