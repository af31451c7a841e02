"""``prefix_splice_``, the embedding hook's form; test_prefix_splice_triton.py runs this file interpreted."""

import functools
import itertools

import pytest
import torch

from mmicl_kernels.ops import prefix_splice, prefix_splice_
from mmicl_kernels.testing.budgets import assert_within_budget, gradients
from mmicl_kernels.testing.inputs import hidden_states, normal
from tests.ops.triton_process import FLOATS

# Triton's interpreter rounds bf16 towards zero, everything else to nearest.

# As in test_prefix_splice.py, and where each request's first fused token goes.
GRID = {
    "plain": {"sizes": (3, 1, 5), "requests": ((0, 1), (2,), (1, 2, 0)), "starts": (0, 2, 1)},
    "repeated": {"sizes": (3, 2), "requests": ((0, 0, 1), (1, 0)), "starts": (1, 5)},
    "none": {"sizes": (3,), "requests": ((), (0,), ()), "starts": (4, 1, 0)},
    "empty_bank": {"sizes": (), "requests": ((), ()), "starts": (0, 0)},
    "no_requests": {"sizes": (3,), "requests": (), "starts": ()},
    "chunk": {"sizes": (3, 4), "requests": ((0, 1), (1,), (0,), (1,)), "starts": (-2, -9, 9, 12)},
    "beams": {"sizes": (3, 1, 5), "requests": ((0, 1), (2, 1)), "starts": (2, 0), "copies": 3},
    "long": {"sizes": (700, 3, 65), "requests": ((0,), (2, 0, 1)), "starts": (7, 3), "L": 800},
    **{name: {"sizes": (3, 1, 5), "requests": ((0, 1), (2,)), "starts": (1, 2), "layout": name}
       for name in ("tokens_first", "sliced")},
    "no_rows": {"sizes": (3,), "requests": ((0,), (0,)), "starts": (0, 1), "L": 0},
    "columns_64": {"sizes": (3, 1), "requests": ((0, 1), (1,)), "starts": (1, 2), "C": 64},
    "no_columns": {"sizes": (3, 1), "requests": ((0, 1), (1,)), "starts": (1, 2), "C": 0},
}  # fmt: skip


def make_inputs(name, dtype=torch.float32, device="cpu"):
    """``embeddings, bank`` and the other arguments, by name."""
    case = GRID[name] if isinstance(name, str) else name
    sizes, requests, C = case["sizes"], case["requests"], case.get("C", 5)
    ints = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    rows = len(requests) * case.get("copies", 1)
    embeddings = hidden_states(
        rows, case.get("L", 12), C, dtype=dtype, device=device, layout=case.get("layout", "dense"), seed=1
    )
    bank = normal(sum(sizes), C, dtype=dtype, device=device, seed=2)
    return (embeddings, bank), {
        "offsets": ints([0, *itertools.accumulate(sizes)]),
        "demo_ids": ints([*itertools.chain(*requests)]),
        "cu_demos": ints([0, *itertools.accumulate(map(len, requests))]),
        "starts": ints(case["starts"]),
    }


def placed(embeddings, bank, **arguments):
    """A copy written into, with the same strides; autograd refuses to write into a leaf."""
    copy = embeddings * 1
    if not embeddings.requires_grad:
        storage = embeddings.untyped_storage().clone()
        copy = embeddings.new_empty(0).set_(
            storage, embeddings.storage_offset(), embeddings.shape, embeddings.stride()
        )
    out = prefix_splice_(copy, bank, **arguments)
    assert out is copy
    return out


def expected_values(embeddings, bank, offsets, demo_ids, cu_demos, starts):
    """Token by token; and where a token was written, its bank row, else -1."""
    out = embeddings.clone()
    B, L, _ = embeddings.shape
    source = torch.full((B, L), -1)
    for b in range(B):
        r = b * len(starts) // B
        place = int(starts[r])
        for d in demo_ids[cu_demos[r] : cu_demos[r + 1]].tolist():
            for n in range(offsets[d], offsets[d + 1]):
                if 0 <= place < L:
                    out[b, place], source[b, place] = bank[n], n
                place += 1
    return out, source


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", GRID)
def test_value_and_gradients(name, dtype, impl, device):
    (embeddings, bank), arguments = make_inputs(name, dtype, device)
    on_cpu = {k: v.cpu() for k, v in arguments.items()}
    expected, source = expected_values(embeddings.cpu(), bank.cpu(), **on_cpu)
    out = placed(embeddings, bank, **arguments, impl=impl)
    assert torch.equal(out.cpu(), expected) and out.stride() == embeddings.stride()

    dout = normal(*out.shape, dtype=dtype, device=device, seed=9)
    fn = functools.partial(placed, **arguments, impl=impl)
    _, (dembeddings, dbank) = gradients(fn, (embeddings, bank), (dout,))
    written = (source >= 0)[..., None]
    assert torch.equal(dembeddings.cpu(), dout.cpu().masked_fill(written, 0))
    tokens, rows = source[source >= 0], dout.cpu()[source >= 0]
    exact, low = (torch.zeros(bank.shape, dtype=x) for x in (torch.float64, dtype))
    for n, row in zip(tokens.tolist(), rows, strict=True):
        exact[n] += row
        low[n] += row
    assert_within_budget("dbank", dbank.cpu(), low, exact)


def test_equals_the_splice_of_a_prompt(impl):
    """Room left for the fused tokens, or the prompt spliced: the same rows, the same gradients."""
    (_, bank), arguments = make_inputs("plain")
    del arguments["starts"]
    prompt = normal(3, 4, 5, dtype=torch.float32, seed=3)
    dout = normal(3, 14, 5, dtype=torch.float32, seed=9)

    def spliced(bank, prompt):
        return prefix_splice(bank, prompt=prompt, length=14, **arguments, impl=impl).embeddings

    def in_place(bank, prompt):
        batch = spliced(bank * 0, prompt)  # zeros where the fused tokens belong
        starts = torch.tensor([10 - 4, 10 - 5, 10 - 9])
        return prefix_splice_(batch, bank, starts=starts, **arguments, impl=impl)

    pairs = (sum(gradients(fn, (bank, prompt), (dout,)), ()) for fn in (spliced, in_place))
    assert all(map(torch.equal, *pairs))


def test_chunks_of_a_prompt_are_the_whole(impl):
    (embeddings, bank), arguments = make_inputs("repeated")
    whole = placed(embeddings, bank, **arguments, impl=impl)
    starts = arguments.pop("starts")
    for first, last in ((0, 4), (4, 9), (9, 12)):
        chunk = embeddings[:, first:last].clone()
        prefix_splice_(chunk, bank, **arguments, starts=starts - first, impl=impl)
        assert torch.equal(chunk, whole[:, first:last])


def test_int8_bank(impl, device):
    (embeddings, bank), arguments = make_inputs("plain", torch.float16, device)
    scale = normal(len(bank), dtype=torch.float32, device=device)
    small = (bank * 50).to(torch.int8)
    out = placed(embeddings, small, bank_scale=scale, **arguments, impl=impl)
    expected = placed(embeddings, (small.float() * scale[:, None]).half(), **arguments, impl="reference")
    assert torch.equal(out, expected)


def test_only_the_bank_needs_a_gradient(impl):
    """The embedding is frozen: what comes out of it has no gradient, but what leaves the op has."""
    (embeddings, bank), arguments = make_inputs("plain")
    bank.requires_grad_()
    out = prefix_splice_(embeddings, bank, **arguments, impl=impl)
    assert out is embeddings and out.requires_grad
    (dbank,) = torch.autograd.grad(out, bank, torch.ones_like(out))
    assert torch.equal(dbank[:, 0], torch.tensor([2.0] * 4 + [2.0] * 5))


def test_opcheck(operator):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for name in ("plain", "beams"):
        (embeddings, bank), a = make_inputs(name)
        indices = (a["offsets"], a["demo_ids"], a["cu_demos"], a["starts"])
        arguments = (embeddings, bank, None, *indices, operator)
        torch.library.opcheck(torch.ops.mmicl.prefix_splice_place_, arguments, test_utils=tests)


def test_compile(operator):
    torch.compiler.reset()

    def fn(embeddings, bank, arguments):
        return prefix_splice_(embeddings * 1, bank, **arguments, impl=operator)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for name in ("plain", "plain", "repeated", "chunk"):
        inputs, arguments = make_inputs(name)
        pairs = (
            sum(gradients(functools.partial(f, arguments=arguments), inputs, (inputs[0],)), ())
            for f in (fn, compiled)
        )
        for eager, other in zip(*pairs, strict=True):
            assert torch.equal(eager, other)


def changed(**changes):
    (embeddings, bank), arguments = make_inputs("plain")
    return {"embeddings": embeddings, "bank": bank, **arguments, **changes}


BAD = {
    "rank": (
        changed(embeddings=torch.zeros(3, 5)), ValueError,
        r"embeddings has shape \[3, 5\], expected \[B, L, C\]",
    ),
    "dtype": (changed(embeddings=torch.zeros(3, 9, 5).int()), TypeError, "embeddings has dtype torch.int32"),
    "columns": (changed(embeddings=torch.zeros(3, 9, 4)), ValueError, r"embeddings has shape.*C = 5"),
    "stride": (changed(embeddings=torch.zeros(3, 5, 9).mT), ValueError, "embeddings has strides"),
    "shared": (
        changed(embeddings=torch.zeros(1, 9, 5).expand(3, 9, 5)), ValueError, "expected rows of their own",
    ),
    "rows": (
        changed(embeddings=torch.zeros(4, 9, 5)), ValueError,
        "embeddings has 4 rows, expected a multiple of the 3",
    ),
    "starts_shape": (
        changed(starts=torch.zeros(2).int()), ValueError, r"starts has shape \[2\], expected \[R\]",
    ),
    "starts_dtype": (changed(starts=torch.zeros(3)), TypeError, "starts has dtype torch.float32"),
    "starts_device": (
        changed(starts=torch.zeros(3, device="meta").int()), ValueError, "starts is on meta, expected cpu",
    ),
    "ids": (
        changed(demo_ids=torch.tensor([0, 1, 2, 1, 2, 3])), ValueError, "demo_ids has values from 0 to 3",
    ),
    "leaf": (changed(embeddings=torch.zeros(3, 9, 5, requires_grad=True)), RuntimeError, "leaf"),
    "impl": (changed(impl="cuda"), NotImplementedError, "prefix_splice has no impl='cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, composed):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        prefix_splice_(**arguments)
