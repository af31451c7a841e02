"""Values and gradients of ``prefix_splice``; test_prefix_splice_triton.py runs this file interpreted."""

import functools
import itertools
from unittest import mock

import pytest
import torch

from mmicl_kernels import _extension
from mmicl_kernels.ops import prefix_splice
from mmicl_kernels.testing.budgets import assert_within_budget, gradients
from mmicl_kernels.testing.inputs import hidden_states, normal
from tests.ops.triton_process import FLOATS, HALVES, INTERPRETED

# Triton's interpreter rounds bf16 towards zero, everything else to nearest.
LAYOUTS = ("left", "right", "packed")
FIELDS = ("embeddings", "attention_mask", "position_ids", "cu_seqlens", "labels")

# Tokens of every demonstration of the bank, which of them each request names, and what is special. By default
# the whole prompts [R, T] are used, and nothing has to be dropped.
GRID = {
    "plain": {"sizes": (3, 1, 5), "requests": ((0, 1), (2,), (1, 2, 0))},
    "one": {"sizes": (4,), "requests": ((0,),)},
    "repeated": {"sizes": (3, 2), "requests": ((0, 0, 1, 0), (1, 0, 1))},
    "shared": {"sizes": (3, 2, 4), "requests": ((0, 1), (0, 1), (0, 1), (2, 0))},
    "empty_prefix": {"sizes": (3, 1), "requests": ((), (1, 0), (), ())},
    "no_demonstrations": {"sizes": (3, 1), "requests": ((), ())},
    "empty_demonstrations": {"sizes": (0, 3, 0, 2, 0), "requests": ((0, 1, 2, 3, 4), (2, 0), (3, 0))},
    "empty_bank": {"sizes": (), "requests": ((), ())},
    "empty_tokens": {"sizes": (0, 0), "requests": ((0, 1), (1,))},
    "no_requests": {"sizes": (3, 1), "requests": ()},
    "no_prompt": {"sizes": (3, 1), "requests": ((0, 1), (1,)), "T": 0},
    "nothing": {"sizes": (3, 1), "requests": ((), ()), "T": 0},
    "bounds": {
        "sizes": (3, 1, 4), "requests": ((0, 1), (2,), (1,), ()), "bounds": ((0, 6), (2, 4), (3, 3), (5, 6)),
    },
    "starts": {
        "sizes": (3, 1), "requests": ((0,), (1, 1)), "bounds": ((5, 6), (0, 6)), "only": "prompt_start",
    },
    "ends": {"sizes": (3, 1), "requests": ((0,), (1, 1)), "bounds": ((0, 2), (0, 6)), "only": "prompt_end"},
    "packed_prompt": {"sizes": (3, 1, 4), "requests": ((0, 1), (2,), ()), "cu_prompt": (0, 4, 4, 9)},
    "packed_part": {"sizes": (3, 1), "requests": ((0,), (1,)), "cu_prompt": (2, 4, 7)},
    "dropped": {"sizes": (3, 1, 5), "requests": ((0, 1, 2), (2, 1, 0), (0, 0, 0, 1)), "max_length": 12},
    "dropped_between": {"sizes": (9, 1), "requests": ((1, 0, 1), (1, 1, 1)), "max_length": 10},
    "all_dropped": {"sizes": (3, 1), "requests": ((0, 1, 1), (0,)), "max_length": 6},
    "exactly_full": {"sizes": (3, 2), "requests": ((0, 0, 1), (1, 1, 1)), "max_length": 11},
    "unused_ids": {"sizes": (3, 1), "requests": ((0,), (1,)), "tail": (1, 0, 1)},
    "part_of_the_bank": {"sizes": (3, 1), "requests": ((0, 1), (1,)), "outside": (2, 3)},
    "many": {"sizes": tuple(range(9)), "requests": tuple(tuple(range(r % 9)) * (r % 4) for r in range(18))},
    "long": {"sizes": (700, 3, 65), "requests": ((0,), (2, 0, 1)), "T": 70, "C": 8},
    **{f"columns_{C}": {"sizes": (3, 1), "requests": ((0, 1), (1,)), "C": C} for C in (0, 1, 7, 64, 1000)},
    **{name: {"sizes": (3, 1, 5), "requests": ((0, 1), (2,)), "layout": name}
       for name in ("tokens_first", "sliced", "expanded")},
    "ids_64": {"sizes": (3, 1), "requests": ((1, 1), (0,)), "ids": torch.int64, "bounds": ((0, 6), (1, 4))},
    "ids_strided": {"sizes": (3, 1), "requests": ((1, 1), (0,)), "strided": True, "bounds": ((0, 6), (1, 4))},
}  # fmt: skip


def ints(values, device="cpu", dtype=torch.int32, strided=False):
    x = torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([x, x], -1).flatten()[::2] if strided else x


def make_inputs(name, dtype=torch.float32, device="cpu", layout="left"):
    """``bank, prompt`` and the other arguments, by name."""
    case = dict(GRID[name]) if isinstance(name, str) else dict(name)
    sizes, requests, C = case["sizes"], case["requests"], case.get("C", 5)
    before, after = case.get("outside", (0, 0))
    R, T = len(requests), case.get("T", 6)
    index = functools.partial(
        ints, device=device, dtype=case.get("ids", torch.int32), strided=case.get("strided", False)
    )
    memory = case.get("layout", "dense")
    bank = hidden_states(
        1, before + sum(sizes) + after, C, dtype=dtype, device=device, layout=memory, seed=1
    )[0]
    arguments = {
        "offsets": index([before, *(before + n for n in itertools.accumulate(sizes))]),
        "demo_ids": index([*itertools.chain(*requests), *case.get("tail", ())]),
        "cu_demos": index([0, *itertools.accumulate(map(len, requests))]),
        "layout": layout,
    }
    if "cu_prompt" in case:
        R, T = 1, case["cu_prompt"][-1] + 2
        arguments["cu_prompt"] = index(case["cu_prompt"])
    if "bounds" in case:
        low, high = zip(*case["bounds"], strict=True)
        bounds = {"prompt_start": index(low), "prompt_end": index(high)}
        arguments |= {k: v for k, v in bounds.items() if case.get("only", k) == k}
    prompt = hidden_states(R, T, C, dtype=dtype, device=device, layout=memory, seed=2)
    arguments["labels"] = torch.arange(R * T, device=device).view(R, T)
    longest = max((sum(sizes[i] for i in ids) for ids in requests), default=0) + T
    most = case.get("max_length", longest + 2)
    arguments |= {"max_length": most, "length": most}
    if layout == "packed":
        arguments["length"] = most * len(requests) + 3
    return (bank, prompt), arguments


def call(bank, prompt, *, offsets, demo_ids, cu_demos, **options):
    return prefix_splice(bank, offsets, demo_ids, cu_demos, prompt, **options)


@functools.cache
def budget(name, layout, dtype, device):
    inputs, arguments = make_inputs(name, dtype, device, layout)
    expected = call(*inputs, **arguments, impl="reference")
    dout = normal(*expected.embeddings.shape, dtype=dtype, device=device, seed=9)
    fn = embeddings_of(arguments, "reference")
    low = gradients(fn, inputs, (dout,))[1]
    exact = gradients(fn, [x.double() for x in inputs], (dout.double(),))[1]
    return inputs, arguments, expected, dout, low, exact


def embeddings_of(arguments, impl):
    return lambda bank, prompt: call(bank, prompt, **arguments, impl=impl).embeddings


@pytest.mark.parametrize(
    ("layout", "dtype"),
    # Interpreting takes long: fp16 of one layout stands for the others'.
    [(x, y) for x in LAYOUTS for y in FLOATS if not INTERPRETED or y == torch.float32 or x == "left"],
    ids=str,
)
@pytest.mark.parametrize("name", GRID)
def test_value_and_gradients(name, layout, dtype, operator, device):
    inputs, arguments, expected, dout, low, exact = budget(name, layout, dtype, device)
    actual = call(*inputs, **arguments, impl=operator)
    for field, a, b in zip(FIELDS, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b), field
    _, (dbank, dprompt) = gradients(embeddings_of(arguments, operator), inputs, (dout,))
    assert dbank.dtype == dprompt.dtype == dtype
    assert torch.equal(dprompt.double(), exact[1])
    assert_within_budget("dbank", dbank, low[0], exact[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GRID)
def test_the_reference_agrees_with_independent_code(name, layout):
    """Token by token, from what each is said to be."""
    inputs, arguments, expected, *_ = budget(name, layout, torch.float32, "cpu")
    rows = tokens(*inputs, **{k: v for k, v in arguments.items() if k not in ("length", "layout")})
    B, L = expected.attention_mask.shape
    begins = [0, *itertools.accumulate(map(len, rows))]
    assert expected.cu_seqlens.tolist() == begins
    C, filled = inputs[0].shape[1], torch.zeros(B, L, dtype=torch.bool)
    for r, sequence in enumerate(rows):
        b, first = (0, begins[r]) if layout == "packed" else (r, (L - len(sequence)) * (layout == "left"))
        for i, (vector, label) in enumerate(sequence):
            assert torch.equal(expected.embeddings[b, first + i], vector)
            assert expected.position_ids[b, first + i] == i and expected.labels[b, first + i] == label
            filled[b, first + i] = True
    assert torch.equal(expected.attention_mask == 1, filled)
    for x, fill in ((expected.embeddings, 0), (expected.position_ids, 0), (expected.labels, -100)):
        assert torch.equal(x[~filled], torch.full_like(x[~filled], fill)), C


def tokens(
    bank, prompt, *, offsets, demo_ids, cu_demos, max_length, labels, prompt_start=None, prompt_end=None,
    cu_prompt=None,
):  # fmt: skip
    """The tokens of every request: their vector and label."""
    result = []
    for r in range(len(cu_demos) - 1):
        if cu_prompt is not None:
            own = [(0, t) for t in range(cu_prompt[r], cu_prompt[r + 1])]
        else:
            low = 0 if prompt_start is None else prompt_start[r]
            high = prompt.shape[1] if prompt_end is None else prompt_end[r]
            own = [(r, t) for t in range(low, high)]
        sequence = [(prompt[at], labels[at]) for at in own]
        for k in range(cu_demos[r + 1] - 1, cu_demos[r] - 1, -1):
            d = demo_ids[k]
            fused = [(bank[n], -100) for n in range(offsets[d], offsets[d + 1])]
            if len(sequence) + len(fused) > max_length:
                break
            sequence = fused + sequence
        result.append(sequence)
    return result


def test_the_definition_in_numbers(impl):
    """Three requests: one that fits, one that loses its first demonstration, one without any."""
    bank = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    prompt = torch.tensor([[[10.0], [11.0]], [[20.0], [21.0]], [[30.0], [31.0]]])
    fn = functools.partial(
        prefix_splice, bank, ints([0, 1, 4]), ints([1, 0, 1, 0]), ints([0, 1, 4, 4]), prompt, impl=impl,
        labels=torch.tensor([[5, 6], [7, -100], [8, 9]]), prompt_start=ints([0, 0, 1]),
    )  # fmt: skip
    left = fn(length=6)
    assert left.embeddings[..., 0].tolist() == [
        [0, 2, 3, 4, 10, 11], [2, 3, 4, 1, 20, 21], [0, 0, 0, 0, 0, 31],
    ]  # fmt: skip
    assert left.position_ids.tolist() == [[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0] * 6]
    assert left.cu_seqlens.tolist() == [0, 5, 11, 12] and left.cu_seqlens.dtype == torch.int32
    right = fn(length=6, layout="right", max_length=5)
    assert right.embeddings[..., 0].tolist() == [
        [2, 3, 4, 10, 11, 0], [1, 20, 21, 0, 0, 0], [31, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert right.attention_mask.tolist() == [[1] * 5 + [0], [1] * 3 + [0] * 3, [1] + [0] * 5]
    packed = fn(length=10, layout="packed", max_length=5)
    assert packed.embeddings[0, :, 0].tolist() == [2, 3, 4, 10, 11, 1, 20, 21, 31, 0]
    assert packed.labels.tolist() == [[-100, -100, -100, 5, 6, -100, 7, -100, 9, -100]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0]]
    assert packed.cu_seqlens.tolist() == [0, 5, 8, 9]


def test_without_labels(impl):
    inputs, arguments = make_inputs("plain")
    with_labels = call(*inputs, **arguments, impl=impl)
    without = call(*inputs, **{**arguments, "labels": None}, impl=impl)
    assert without.labels is None
    assert all(map(torch.equal, with_labels[:4], without[:4]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_bank(layout, impl, device):
    """A row is dequantised in fp32 and rounded once."""
    (_, prompt), arguments = make_inputs("plain", torch.float16, device, layout)
    N, C = int(arguments["offsets"][-1]), prompt.shape[2]
    bank = torch.randint(-128, 128, (N, C), dtype=torch.int8, device=device)
    scale = normal(N, dtype=torch.float32, device=device).abs()
    out = call(bank, prompt, **arguments, bank_scale=scale, impl=impl)
    expected = call((bank.float() * scale[:, None]).half(), prompt, **arguments, impl="reference")
    assert all(map(torch.equal, out, expected))
    _, (dprompt,) = gradients(
        lambda p: call(bank, p, **arguments, bank_scale=scale, impl=impl).embeddings, (prompt,),
        (out.embeddings,),
    )  # fmt: skip
    assert dprompt.any()


@pytest.mark.parametrize("pair", ((torch.float32, torch.float16), (torch.float16, torch.float64)), ids=str)
def test_a_bank_in_another_dtype(pair, impl, device):
    """Rows are rounded to the prompt's dtype, the gradient of the bank to its own."""
    inputs, arguments = make_inputs("repeated", torch.float64, device)
    bank, prompt = (x.to(dtype) for x, dtype in zip(inputs, pair, strict=True))
    dout = normal(*call(bank, prompt, **arguments).embeddings.shape, dtype=pair[1], device=device)
    (out,), (dbank, _) = gradients(embeddings_of(arguments, impl), (bank, prompt), (dout,))
    assert torch.equal(out, call(bank.to(prompt.dtype), prompt, **arguments, impl="reference").embeddings)
    exact = gradients(embeddings_of(arguments, "reference"), inputs, (dout.double(),))[1][0]
    low = gradients(embeddings_of(arguments, "reference"), (bank, prompt), (dout,))[1][0]
    assert dbank.dtype == pair[0]
    assert_within_budget("dbank", dbank, low, exact)


def test_requests_of_a_batch_are_the_requests_alone(impl):
    inputs, arguments = make_inputs("shared")
    bank, prompt = inputs
    whole = call(*inputs, **arguments, impl=impl)
    cu, ids = arguments["cu_demos"].tolist(), arguments["demo_ids"]
    for r, (a, b) in enumerate(itertools.pairwise(cu)):
        one = {**arguments, "demo_ids": ids[a:b], "cu_demos": ints([0, b - a])}
        one["labels"] = arguments["labels"][r : r + 1]
        alone = call(bank, prompt[r : r + 1], **one, impl=impl)
        for field in ("embeddings", "attention_mask", "position_ids", "labels"):
            assert torch.equal(getattr(alone, field)[0], getattr(whole, field)[r]), field


def test_nan_stays_in_its_rows(impl):
    """Padding is zero whatever lies beside the tokens, and so is the gradient of what is not used."""
    inputs, arguments = make_inputs("bounds")
    bank, prompt = inputs
    used = torch.zeros(prompt.shape[:2], dtype=torch.bool)
    bounds = zip(arguments["prompt_start"].tolist(), arguments["prompt_end"].tolist(), strict=True)
    for r, (a, b) in enumerate(bounds):
        used[r, a:b] = True
    prompt[~used] = torch.nan
    out = call(bank, prompt, **arguments, impl=impl)
    assert not out.embeddings.isnan().any()
    dout = out.embeddings.masked_fill(out.attention_mask[..., None] == 0, torch.nan)
    _, (dbank, dprompt) = gradients(embeddings_of(arguments, impl), inputs, (dout,))
    assert not dbank.isnan().any() and not dprompt.isnan().any() and not dprompt[~used].any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_uses_are_summed_in_fp32(dtype, operator, device):
    """Eight gradients of 1 beside one so large that each alone would be lost in the rounding."""
    case = {"sizes": (1,), "requests": ((0,),) * 9, "T": 1}
    inputs, arguments = make_inputs(case, dtype, device)
    dout = torch.ones(9, arguments["length"], 5, dtype=dtype, device=device)
    large = 2 / torch.finfo(dtype).eps
    dout[0] = large
    _, (dbank, _) = gradients(embeddings_of(arguments, operator), inputs, (dout,))
    assert torch.equal(dbank, torch.full_like(dbank, large + 8))


def test_outputs_without_a_gradient_cost_nothing_backward(operator):
    """Autograd would fill zeros for each of them, by a launch each."""
    inputs, arguments = make_inputs("plain")
    out = call(*(x.requires_grad_() for x in inputs), **arguments, impl=operator).embeddings
    stopped = mock.patch.object(torch.ops.mmicl, "prefix_splice_bwd", side_effect=KeyError("only call"))
    with stopped, torch.profiler.profile() as profile, pytest.raises(KeyError, match="only call"):
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert "aten::zeros" not in {event.key for event in profile.key_averages()}


OPCHECKED = {"dropped": LAYOUTS, "bounds": ("left",), "packed_prompt": ("right", "packed")}


@pytest.mark.parametrize(("name", "layout"), [(n, x) for n, layouts in OPCHECKED.items() for x in layouts])
def test_opcheck(name, layout, operator):
    (bank, prompt), a = make_inputs(name, torch.float16, layout=layout)
    bounds = tuple(a.get(x) for x in ("prompt_start", "prompt_end", "cu_prompt"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (
        bank, None, a["offsets"], a["demo_ids"], a["cu_demos"], prompt, *bounds, a["labels"], layout,
        a["length"], a["max_length"], operator,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.mmicl.prefix_splice_fwd, arguments, test_utils=tests)
    outputs = torch.ops.mmicl.prefix_splice_fwd(*arguments)
    for needs in itertools.product((False, True), repeat=2):
        saved = (
            outputs[0], a["offsets"], a["demo_ids"], *outputs[5:], list(prompt.shape), *bounds, bank.shape[0],
            torch.float16, *needs, operator,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.mmicl.prefix_splice_bwd, saved, test_utils=tests)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile(layout, operator):
    """First and second call, then other lengths of everything, without a graph break."""
    torch.compiler.reset()

    def fn(bank, prompt, arguments):
        return tuple(call(bank, prompt, **arguments, impl=operator))

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for name in ("dropped", "dropped", "plain", "shared"):
        inputs, arguments = make_inputs(name, layout=layout)
        douts = (call(*inputs, **arguments).embeddings, None, None, None, None)
        both = (functools.partial(f, arguments=arguments) for f in (fn, compiled))
        pairs = (sum(gradients(f, inputs, douts), ()) for f in both)
        for eager, other in zip(*pairs, strict=True):
            assert eager.dtype == other.dtype and torch.equal(eager, other)


def changed(**changes):
    (bank, prompt), arguments = make_inputs("plain")
    return {"bank": bank, "prompt": prompt, **arguments, **changes}


int8 = torch.zeros(9, 5, dtype=torch.int8)
BAD = {
    "bank_rank": (changed(bank=torch.zeros(9)), ValueError, r"bank has shape \[9\], expected \[N, C\]"),
    "bank_type": (changed(bank=[1.0]), TypeError, "bank must be a tensor, got list"),
    "bank_dtype": (changed(bank=torch.zeros(9, 5).long()), TypeError, "bank has dtype torch.int64"),
    "bank_stride": (changed(bank=torch.zeros(5, 9).t()), ValueError, "bank has strides"),
    "bank_columns": (changed(bank=torch.zeros(9, 4)), ValueError, r"prompt has shape.*C = 4"),
    "bank_int8": (changed(bank=int8), ValueError, "without bank_scale, expected a scale"),
    "bank_meta": (
        changed(bank=torch.zeros(9, 5, device="meta")), ValueError, "offsets is on cpu, expected meta",
    ),
    "scale_alone": (
        changed(bank_scale=torch.ones(9)), TypeError, "bank has dtype torch.float32, expected torch.int8",
    ),
    "scale_shape": (
        changed(bank=int8, bank_scale=torch.ones(8)), ValueError, r"bank_scale has shape \[8\].*N = 9",
    ),
    "scale_grad": (
        changed(bank=int8, bank_scale=torch.ones(9, requires_grad=True)), ValueError, "requires grad",
    ),
    "offsets_empty": (changed(offsets=ints([])), ValueError, "offsets is empty, expected at least"),
    "offsets_dtype": (changed(offsets=torch.zeros(4)), TypeError, "offsets has dtype torch.float32"),
    "offsets_high": (
        changed(offsets=ints([0, 3, 4, 10])), ValueError, "offsets has values from 0 to 10, expected 0",
    ),
    "offsets_low": (changed(offsets=ints([-1, 3, 4, 9])), ValueError, "offsets has values from -1"),
    "offsets_order": (
        changed(offsets=ints([0, 5, 4, 9])), ValueError, "offsets decreases, expected bounds from 0",
    ),
    "ids_high": (
        changed(demo_ids=ints([0, 1, 2, 1, 3, 0])), ValueError, "demo_ids has values from 0 to 3, expe",
    ),
    "ids_low": (changed(demo_ids=ints([0, 1, 2, 1, -1, 0])), ValueError, "demo_ids has values from -1 to 2"),
    "ids_rank": (
        changed(demo_ids=ints([[0, 1]])), ValueError, r"demo_ids has shape \[1, 2\], expected \[K\]",
    ),
    "cu_long": (
        changed(cu_demos=ints([0, 2, 3, 7])), ValueError, "cu_demos has values from 0 to 7, expected 0 to 6",
    ),
    "cu_order": (changed(cu_demos=ints([0, 3, 2, 6])), ValueError, "cu_demos decreases"),
    "cu_first": (changed(cu_demos=ints([1, 2, 3, 6])), ValueError, "cu_demos begins with 1, expected 0"),
    "cu_requests": (changed(cu_demos=ints([0, 2, 6])), ValueError, r"prompt has shape \[3, 6, 5\].*R = 2"),
    "prompt_dtype": (changed(prompt=torch.zeros(3, 6, 5).int()), TypeError, "prompt has dtype torch.int32"),
    "prompt_long": (
        changed(length=5, max_length=None), ValueError, "prompt has 6 tokens in request 0, expected 0 to",
    ),
    "prompt_start": (
        changed(prompt_start=ints([0, 7, 0])), ValueError, "prompt_start has values from 0 to 7",
    ),
    "prompt_crossed": (
        changed(prompt_start=ints([0, 4, 0]), prompt_end=ints([6, 3, 6])), ValueError,
        "prompt has -1 tokens in request 1",
    ),
    "prompt_end": (
        changed(prompt_end=ints([0, 6])), ValueError, r"prompt_end has shape \[2\], expected \[R\]",
    ),
    "both_bounds": (
        changed(prompt_end=ints([1, 1, 1]), cu_prompt=ints([0] * 4)), ValueError, "expected one kind",
    ),
    "cu_prompt": (
        changed(cu_prompt=ints([0] * 4)), ValueError, r"prompt has shape \[3, 6, 5\], expected \[1, T, C\]",
    ),
    "labels_shape": (
        changed(labels=torch.zeros(3, 5).long()), ValueError, r"labels has shape \[3, 5\].*T = 6",
    ),
    "labels_dtype": (changed(labels=torch.zeros(3, 6)), TypeError, "labels has dtype torch.float32"),
    "length_type": (changed(length=6.0), TypeError, "length must be an int, got float"),
    "length_low": (changed(length=-1), ValueError, "length is -1, expected 0 or more"),
    "max_length": (changed(max_length=99), ValueError, "max_length is 99, expected 0 to 17"),
    "packed_empty": (
        changed(layout="packed", length=0, max_length=17), ValueError, "length is 0, expected at least",
    ),
    "packed_total": (changed(layout="packed"), ValueError, "length is 17, expected at least the 36 tokens"),
    "layout": (changed(layout="up"), ValueError, "layout is 'up', expected one of 'left', 'right', 'packed'"),
    "impl": (changed(impl="fast"), ValueError, "impl is 'fast'"),
    "impl_cuda": (changed(impl="cuda"), NotImplementedError, "prefix_splice has no impl='cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, composed):
    """The C++ kernels check values themselves, with the messages of the checks in Python."""
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(**arguments)


def test_bad_values_in_a_compiled_graph():
    """What cannot be checked while the graph is made is found by the C++ kernels when it runs."""
    if not _extension.load():
        pytest.skip("the C++ extension is not built")
    torch.compiler.reset()
    (bank, prompt), arguments = make_inputs("plain")
    fn = torch.compile(functools.partial(call, bank, prompt), fullgraph=True, backend="aot_eager")
    fn(**arguments)
    arguments["demo_ids"][4] = 3
    with pytest.raises(ValueError, match="demo_ids has values from 0 to 3, expected 0 to 2"):
        fn(**arguments)


@pytest.mark.skipif(INTERPRETED, reason="allocations of the CPU's implementations")
def test_bytes(composed):
    """What grows with C: the batch forward, the gradients backward; in plain PyTorch a block of padding."""
    from benchmarks.harness.timing import peak_allocated_bytes

    peaks, sizes = [], []
    for C in (1024, 2048):
        inputs, a = make_inputs({**GRID["dropped"], "C": C})
        out = call(*inputs, **a, impl=composed)
        widest = 0 if _extension.load() else a["length"] - int(out.cu_seqlens.diff().min())
        outputs = torch.ops.mmicl.prefix_splice_fwd(
            inputs[0], None, a["offsets"], a["demo_ids"], a["cu_demos"], inputs[1], None, None, None, None,
            "left", a["length"], a["length"], composed,
        )  # fmt: skip
        saved = (
            outputs[0], a["offsets"], a["demo_ids"], *outputs[5:], list(inputs[1].shape), None, None, None,
            inputs[0].shape[0], torch.float32, True, True, composed,
        )  # fmt: skip

        def forward(inputs=inputs, arguments=a):
            return call(*inputs, **arguments, impl=composed)

        def backward(saved=saved):
            return torch.ops.mmicl.prefix_splice_bwd(*saved)

        peaks.append([peak_allocated_bytes(fn) for fn in (forward, backward)])
        sizes.append([out.embeddings.nbytes + 4 * widest * C, sum(x.nbytes for x in inputs)])
    for (small, large), (few, many) in zip(zip(*peaks, strict=True), zip(*sizes, strict=True), strict=True):
        assert large - small == many - few
