"""Value and gradients of ``row_projection``; test_row_projection_triton.py runs this file interpreted."""

import functools

import pytest
import torch
from torch.nn import functional as F

from mmicl_kernels.ops.row_projection import row_projection
from mmicl_kernels.testing.budgets import assert_all_within_budget, gradients
from mmicl_kernels.testing.inputs import hidden_states, normal
from tests.ops.triton_process import FLOATS, INTERPRETED

# Rows, by name: a mask's number of rows, or indices of the B * T = 26 rows, whole.
ROWS = {
    "mask": None,
    "mask_exact": 0,
    "mask_fewer": 5,
    "indices": (3, 25, 0, 14, 7),
    "duplicates": (3, 25, 3, 3, 0, 25, 14, 3),
    "none": (-1, 3, -1, 25, 3),
    "nothing": (-1, -1),
    "empty": (),
    "one": (12,),
    "all": tuple(range(26)),
}
# Sizes and layouts, on indices with duplicates; and which parameters there are.
SIZES = {
    **{f"columns_{C}": {"C": C} for C in (1, 7, 8, 1000)},
    **{f"outputs_{D}": {"D": D} for D in (1, 5, 64)},
    **{layout: {"layout": layout} for layout in ("tokens_first", "sliced", "expanded")},
    "half_parameters": {"parameter_dtype": torch.float16},
    "wide_bank": {"out": torch.float32},
    "narrow_bank": {"out": torch.float16},
}
FORMS = {
    "linear": (),
    "bias": ("bias",),
    "norm": ("bias", "norm_weight", "norm_bias"),
    "norm_weight": ("norm_weight",),
}
CASES = [
    *((name, {}, form) for name in ROWS for form in ("bias", "norm")),
    *(("duplicates", sizes, "bias") for sizes in SIZES.values()),
    # The norm of a row of one number is its bias, and has no gradient.
    *(("duplicates", sizes, "norm") for name, sizes in SIZES.items() if name != "outputs_1"),
    *(("none", {}, form) for form in ("linear", "norm_weight")),
]
IDS = [f"{name}-{'-'.join(map(str, sizes.values()))}-{form}" for name, sizes, form in CASES]


def make_inputs(form, dtype, device="cpu", B=2, T=13, C=40, D=24, layout="dense", parameter_dtype=None):
    """``hidden, weight`` and the further parameters by name."""
    parameter_dtype = parameter_dtype or torch.promote_types(dtype, torch.float32)
    options = {"dtype": parameter_dtype, "device": device}
    hidden = hidden_states(B, T, C, dtype=dtype, device=device, layout=layout, seed=1)
    weight = normal(D, C, seed=2, **options) * C**-0.5
    return hidden, weight, {name: normal(D, seed=3 + i, **options) for i, name in enumerate(FORMS[form])}


def make_rows(name, device="cpu", B=2, T=13):
    """``rows``, ``num_rows`` and, for the eager form, the index of each row or -1."""
    rows = ROWS[name]
    if isinstance(rows, tuple):
        index = torch.tensor(rows, dtype=torch.long, device=device)
        return index, None, index
    mask = torch.arange(B * T, device=device).view(B, T) % 3 != 1
    index = mask.flatten().nonzero()[:, 0]
    if rows is None:
        return mask, None, index
    return mask, len(index) + rows, F.pad(index, (0, rows), value=-1)


def op(rows, num_rows, names, hidden, weight, *rest, **options):
    return row_projection(
        hidden, rows, weight, num_rows=num_rows, **dict(zip(names, rest, strict=True)), **options
    )


def eager(index, names, order, out, hidden, weight, *rest):
    """Gather, linear layer and norm in the dtype of hidden, with rows and columns in some order."""
    named = {name: x.to(hidden.dtype) for name, x in zip(names, rest, strict=True)}
    rows, columns = order
    inside = rows[index[rows] >= 0]
    x = hidden.flatten(0, 1)[index[inside]][:, columns]
    y = F.linear(x, weight.to(x.dtype)[:, columns], named.get("bias"))
    if "norm_weight" in named:
        y = F.layer_norm(y, y.shape[1:], named["norm_weight"], named.get("norm_bias"))
    return torch.zeros(len(index), len(weight), dtype=out, device=y.device).index_put((inside,), y.to(out))


@functools.cache
def budget(case, dtype, device):
    name, sizes, form = CASES[case]
    sizes = dict(sizes)
    out = sizes.pop("out", dtype)
    hidden, weight, named = make_inputs(form, dtype, device, **sizes)
    rows, num_rows, index = make_rows(name, device)
    inputs = (hidden, weight, *named.values())
    dout = normal(len(index), len(weight), dtype=out, device=device, seed=9)
    lows = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        order = [torch.randperm(n, generator=generator).to(device) for n in (len(index), hidden.shape[2])]
        lows.append(gradients(functools.partial(eager, index, named, order, out), inputs, (dout,)))
    fn = functools.partial(op, rows, num_rows, tuple(named), dtype=out)
    wide = functools.partial(fn, dtype=torch.float64, impl="reference")
    exact = gradients(wide, [x.double() for x in inputs], (dout.double(),))
    return inputs, fn, dout, lows, exact, ("out", "dhidden", "dweight", *(f"d{x}" for x in named))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_value_and_gradients(case, dtype, impl, device):
    inputs, fn, dout, lows, exact, names = budget(case, dtype, device)
    (out,), grads = gradients(functools.partial(fn, impl=impl), inputs, (dout,))
    assert_all_within_budget(names, (out, *grads), [sum(x, ()) for x in lows], sum(exact, ()))
    assert out.dtype == dout.dtype and out.is_contiguous()
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_the_reference_agrees_with_independent_code(case):
    if "out" in CASES[case][1] or "parameter_dtype" in CASES[case][1]:
        pytest.skip("rounded to other dtypes than fp64")
    *_, lows, exact, names = budget(case, torch.float64, "cpu")
    for name, a, b in zip(names, sum(lows[0], ()), sum(exact, ()), strict=True):
        bound = 100 * a.numel() ** 0.5 * torch.finfo(torch.float64).eps
        assert (a - b).norm() <= bound * max(1.0, float(b.norm())), name


def test_the_formula_in_numbers(impl):
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[-1.0, 0.0], [7.0, 7.0]]])
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, -1.0]]), torch.tensor([0.0, 1.0, 10.0])
    fn = functools.partial(row_projection, hidden, weight=weight, bias=bias, impl=impl)
    expected = torch.tensor([[3.0, 11.0, 8.0], [-1.0, 1.0, 9.0]])
    mask = torch.tensor([[False, True], [True, False]])
    assert torch.equal(fn(mask), expected)
    assert torch.equal(fn(torch.tensor([2, 1, -1])), F.pad(expected.flip(0), (0, 0, 0, 1)))
    assert torch.equal(fn(mask, num_rows=3), F.pad(expected, (0, 0, 0, 1)))
    norm = {"norm_weight": torch.tensor([1.0, 2.0, 0.0]), "norm_bias": torch.tensor([0.0, 0.0, 4.0])}
    normed = fn(mask, **norm, eps=2.0)
    sigma = (torch.tensor([98.0, 168.0]) / 9 + 2).sqrt()  # variances of (3, 11, 8) and of (-1, 1, 9)
    by_hand = torch.stack([torch.tensor([-13.0, -12.0]) / 3, torch.tensor([22.0, -12.0]) / 3])
    torch.testing.assert_close(normed[:, :2], (by_hand / sigma).t())
    assert torch.equal(normed[:, 2], torch.full((2,), 4.0))


@pytest.mark.parametrize("form", FORMS)
def test_other_rows_and_rows_that_are_none_have_no_part(form, impl):
    """Whatever lies in rows that are not chosen, NaN included, and in the gradients of what is no row."""
    hidden, weight, named = make_inputs(form, torch.float32)
    rows = torch.tensor([4, -1, 9, 4])
    fn = functools.partial(op, rows, None, tuple(named), impl=impl)
    dout = normal(4, 24, dtype=torch.float32)
    expected = gradients(fn, (hidden, weight, *named.values()), (dout,))
    others = torch.ones(26, dtype=torch.bool).index_fill(0, rows[rows >= 0], False).view(2, 13)
    hidden = hidden.masked_fill(others[..., None], torch.nan)
    dout[1] = torch.nan
    actual = gradients(fn, (hidden, weight, *named.values()), (dout,))
    assert all(map(torch.equal, sum(actual, ()), sum(expected, ())))
    assert not actual[0][0][1].any() and not actual[1][0][others].any()


def test_a_mask_is_its_indices(impl):
    """Bit for bit, in any stride; 32-bit and strided indices too."""
    hidden, weight, named = make_inputs("norm", torch.float32)
    mask = normal(13, 2, dtype=torch.float32).t() > 0
    index = mask.flatten().nonzero()[:, 0]
    fn = functools.partial(row_projection, hidden, weight=weight, **named, impl=impl)
    expected = fn(index)
    for rows in (mask, mask.contiguous(), index.int(), index.repeat_interleave(2)[::2]):
        assert torch.equal(fn(rows), expected)
    assert torch.equal(fn(mask, num_rows=len(index)), expected)
    assert torch.equal(fn(mask, num_rows=26), F.pad(expected, (0, 0, 0, 26 - len(index))))


@pytest.mark.parametrize("num_rows", (None, 0, 3))
@pytest.mark.parametrize("shape", ((0, 3), (2, 0)))
def test_empty(shape, num_rows, impl):
    hidden, (_, weight, named) = torch.zeros(*shape, 40), make_inputs("norm", torch.float32)
    mask = torch.ones(shape, dtype=torch.bool)
    fn = functools.partial(op, mask, num_rows, tuple(named), impl=impl)
    out = fn(hidden, weight, *named.values())
    assert out.shape == (num_rows or 0, 24) and not out.any()
    _, grads = gradients(fn, (hidden, weight, *named.values()), (out,))
    assert grads[0].shape == hidden.shape and not any(g.any() for g in grads)


def test_duplicates_are_summed_in_fp32(impl):
    """4096 uses of a row: in halves the sum would stop growing at 2048."""
    if impl == "reference":
        pytest.skip("its gradient is that of autograd")
    hidden, rows = torch.ones(1, 3, 8, dtype=torch.float16), torch.ones(4096, dtype=torch.long)
    weight = torch.eye(8)
    _, (dhidden, _) = gradients(
        functools.partial(op, rows, None, (), impl=impl),
        (hidden, weight),
        (torch.ones(4096, 8, dtype=torch.float16),),
    )
    assert torch.equal(dhidden[0, :, 0], torch.tensor([0.0, 4096.0, 0.0], dtype=torch.float16))


@pytest.mark.parametrize("form", ("bias", "norm"))
def test_a_frozen_weight_saves_no_gathered_rows(form, operator):
    hidden, weight, named = make_inputs(form, torch.float32)
    fn = functools.partial(op, torch.tensor([3, 3, -1, 9]), None, tuple(named), impl=operator)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.shape), x)[1], lambda x: x):
        fn(hidden.requires_grad_(), weight, *named.values())
        assert (4, 40) not in saved
        fn(hidden.detach(), weight.requires_grad_(), *named.values())
        assert (4, 40) in saved and hidden.shape not in saved


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, operator):
    hidden, weight, named = make_inputs(form, torch.float16, layout="tokens_first")
    index = torch.tensor([3, -1, 9])
    parameters = (weight, *(named.get(x) for x in ("bias", "norm_weight", "norm_bias")))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (hidden, index, *parameters, 1e-5, torch.float32, operator)
    torch.library.opcheck(torch.ops.mmicl.row_projection_fwd, arguments, test_utils=tests)
    out, *saved = torch.ops.mmicl.row_projection_fwd(*arguments)
    here = [x is not None for x in parameters]
    for needs in ([True, *here], [False, *here], [True] + [False] * 4, [False] * 3 + here[2:]):
        torch.library.opcheck(
            torch.ops.mmicl.row_projection_bwd,
            (torch.ones_like(out), index, *saved, *parameters, 2, 13, needs, operator),
            test_utils=tests,
        )


@pytest.mark.parametrize("name", ("mask_fewer", "duplicates"))
@pytest.mark.parametrize("form", ("linear", "norm"))
def test_compile(name, form, operator):
    """First and second call, then another length, without a graph break, forward and backward."""
    if INTERPRETED:
        pytest.skip("the interpreter's kernels are not traced")
    torch.compiler.reset()
    _, weight, named = make_inputs(form, torch.float32)

    def fn(hidden, weight, *rest, rows):
        num_rows = 20 if rows.dtype == torch.bool else None
        return op(rows, num_rows, tuple(named), hidden, weight, *rest, impl=operator)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (13, 13, 17):
        hidden, *_ = make_inputs(form, torch.float32, T=T)
        rows, _, _ = make_rows(name, T=T)
        if rows.dtype == torch.bool:
            rows[0] = False  # fewer than 20 at both lengths
        inputs, dout = (hidden, weight, *named.values()), torch.ones(20 if rows.dim() == 2 else 8, 24)
        pairs = (sum(gradients(functools.partial(f, rows=rows), inputs, (dout,)), ()) for f in (fn, compiled))
        for plain, other in zip(*pairs, strict=True):
            assert plain.stride() == other.stride()
            torch.testing.assert_close(other, plain)


def changed(**changes):
    hidden, weight, named = make_inputs("norm", torch.float32, C=8, D=6)
    return {"hidden": hidden, "rows": torch.tensor([1, 2]), "weight": weight, **named, **changes}


MASK = torch.ones(2, 13, dtype=torch.bool)
BAD = {
    "hidden_rank": (changed(hidden=torch.zeros(3, 8)), ValueError, r"hidden has shape \[3, 8\].*\[B, T, C\]"),
    "hidden_dtype": (changed(hidden=torch.zeros(2, 3, 8).int()), TypeError, "hidden has dtype torch.int32"),
    "hidden_stride": (changed(hidden=torch.zeros(2, 8, 13).mT), ValueError, "hidden has strides"),
    "weight_size": (changed(weight=torch.zeros(6, 7)), ValueError, r"weight has shape \[6, 7\].*C = 8"),
    "weight_dtype": (changed(weight=torch.zeros(6, 8).int()), TypeError, "weight has dtype torch.int32"),
    "weight_device": (changed(weight=torch.zeros(6, 8, device="meta")), ValueError, "weight is on meta"),
    "bias_size": (changed(bias=torch.zeros(8)), ValueError, r"bias has shape \[8\].*D = 6"),
    "norm_size": (changed(norm_weight=torch.zeros(8)), ValueError, r"norm_weight has shape \[8\].*D = 6"),
    "norm_dtype": (changed(norm_bias=torch.zeros(6).int()), TypeError, "norm_bias has dtype torch.int32"),
    "norm_bias": (changed(norm_weight=None), ValueError, "norm_bias was given without norm_weight"),
    "eps": (changed(eps=0.0), ValueError, "eps is 0.0, expected a number above 0"),
    "eps_large": (changed(eps=1e39), ValueError, "eps is 1e.39, expected a number of fp32"),
    "eps_type": (changed(eps="1"), TypeError, "eps must be a number, got str"),
    "dtype": (changed(dtype=torch.int8), TypeError, "dtype is torch.int8, expected None or torch.float16"),
    "rows_type": (changed(rows=[1]), TypeError, "rows must be a tensor, got list"),
    "rows_dtype": (changed(rows=torch.ones(2)), TypeError, "rows has dtype torch.float32, expected"),
    "rows_rank": (changed(rows=torch.ones(2, 13).long()), ValueError, r"rows has shape \[2, 13\].*\[N\]"),
    "rows_high": (changed(rows=torch.tensor([0, 26])), ValueError, "rows has values from 0 to 26"),
    "rows_low": (changed(rows=torch.tensor([-2, 3])), ValueError, "rows has values from -2 to 3.* to 25"),
    "rows_device": (changed(rows=torch.zeros(1, device="meta").long()), ValueError, "rows is on meta"),
    "mask_shape": (changed(rows=MASK[:, 1:]), ValueError, r"rows has shape \[2, 12\].*T = 13"),
    "mask_flat": (changed(rows=MASK[0]), ValueError, r"rows has shape \[13\], expected \[B, T\]"),
    "num_rows_few": (changed(rows=MASK, num_rows=25), ValueError, "num_rows is 25, expected at least the 26"),
    "num_rows_low": (changed(rows=MASK, num_rows=-1), ValueError, "num_rows is -1, expected 0 or more"),
    "num_rows_type": (changed(rows=MASK, num_rows=2.0), TypeError, "num_rows must be an int, got float"),
    "num_rows_indices": (changed(num_rows=2), ValueError, r"num_rows is 2 beside indices \[2\]"),
    "impl": (changed(impl="fast"), ValueError, "impl is 'fast'"),
    "impl_cuda": (changed(impl="cuda"), NotImplementedError, "row_projection has no impl='cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        row_projection(**arguments)


@pytest.mark.skipif(INTERPRETED, reason="an environment variable lets the kernels run on CPU tensors")
def test_triton_on_cpu_tensors_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        row_projection(**changed(impl="triton"))


def test_a_mask_with_more_rows_is_cut_in_a_compiled_graph():
    """Where its rows cannot be counted without waiting, the first ones are taken, as on CUDA."""
    torch.compiler.reset()
    arguments = changed(rows=MASK)
    expected = row_projection(**arguments)[:5]
    compiled = torch.compile(row_projection, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments, num_rows=5), expected)
