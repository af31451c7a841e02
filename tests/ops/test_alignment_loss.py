"""Value and gradients of ``alignment_loss``; test_alignment_loss_triton.py runs this file interpreted."""

import functools
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mmicl_kernels.ops.alignment_loss import alignment_loss
from mmicl_kernels.testing.budgets import assert_all_within_budget, gradients
from mmicl_kernels.testing.inputs import hidden_states, normal
from tests.ops.triton_process import FLOATS, INTERPRETED

FORMS = ("relative", "mean_square")

# Rows, by name: a mask, or indices of the B * T = 26 rows, whole.
ROWS = {
    "mask": None,
    "indices": (3, 25, 0, 14, 7),
    "duplicates": (3, 25, 3, 3, 0, 25, 14, 3),
    "none": (-1, 3, -1, 25, 3),
    "nothing": (-1, -1),
    "empty": (),
    "one": (12,),
    "all": tuple(range(26)),
}
# Sizes, layouts and dtypes, on indices with duplicates.
SIZES = {
    **{f"columns_{C}": {"columns": (C, C)} for C in (1, 7, 8, 1000)},
    "layers_of_other_widths": {"columns": (40, 1, 72)},
    "one_layer": {"columns": (40,)},
    **{layout: {"layout": layout} for layout in ("tokens_first", "sliced", "expanded")},
    "wide_targets": {"target_dtype": torch.float64},
    "narrow_targets": {"target_dtype": torch.float16},
}
CASES = [
    *((name, {}, form) for name in ROWS for form in FORMS),
    *(("duplicates", sizes, "relative") for sizes in SIZES.values()),
    ("duplicates", SIZES["layers_of_other_widths"], "mean_square"),
]
IDS = [f"{name}-{'-'.join(map(str, sizes.values()))}-{form}" for name, sizes, form in CASES]


def make_rows(name, device="cpu", B=2, T=13):
    """``rows``, and the index of each or -1."""
    if ROWS[name] is not None:
        index = torch.tensor(ROWS[name], dtype=torch.long, device=device)
        return index, index
    mask = torch.arange(B * T, device=device).view(B, T) % 3 != 1
    return mask, mask.flatten().nonzero()[:, 0]


def make_inputs(
    N, dtype=torch.float32, device="cpu", B=2, T=13, columns=(40, 40), layout="dense", target_dtype=None
):
    """``states, targets``: layers of other sizes, and in each a token that is larger than the others."""
    options = {"dtype": dtype, "device": device}
    states = [hidden_states(B, T, C, **options, layout=layout, seed=i) for i, C in enumerate(columns)]
    options["dtype"] = target_dtype or dtype
    targets = [normal(N, C, **options, seed=10 + i) * 3**i for i, C in enumerate(columns)]
    for y in targets:
        y[:1] *= 10
    return states, targets


def loss_of(targets, rows, form, *states, impl):
    return alignment_loss(states, targets, rows, form=form, impl=impl)


def eager(index, targets, form, seed, *states):
    """As one would write it, a wide copy of each layer's rows; rows and columns in some order."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for x, y in zip(states, targets, strict=True):
        acc = torch.promote_types(x.dtype, torch.float32)
        rows = torch.randperm(len(index), generator=generator).to(x.device)
        columns = torch.randperm(x.shape[2], generator=generator).to(x.device)
        rows = rows[index[rows] >= 0]
        x, y = (z[:, columns].to(acc) for z in (x.flatten(0, 1)[index[rows]], y[rows]))
        if len(rows) == 0:
            losses.append(x.sum())
        elif form == "mean_square":
            losses.append(F.mse_loss(x, y))
        else:
            losses.append(((x - y).square().sum(1) / (x.square() + y.square()).sum(1)).mean())
    return sum(losses) / len(losses)


@functools.cache
def budget(case, dtype, device):
    name, sizes, form = CASES[case]
    rows, index = make_rows(name, device)
    states, targets = make_inputs(len(index), dtype, device, **sizes)
    acc = torch.promote_types(dtype, torch.float32)
    dout = torch.tensor(0.7, dtype=acc, device=device)
    lows = [
        gradients(functools.partial(eager, index, targets, form, seed), states, (dout,)) for seed in range(3)
    ]
    # As the op has them: the wider dtype of targets is rounded to that of the sums.
    wide = [y.to(acc).double() for y in targets]
    exact_fn = functools.partial(loss_of, wide, rows, form, impl="reference")
    exact = gradients(exact_fn, [x.double() for x in states], (dout.double(),))
    return states, functools.partial(loss_of, targets, rows, form), dout, lows, exact


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_value_and_gradients(case, dtype, impl, device):
    states, fn, dout, lows, exact = budget(case, dtype, device)
    (out,), grads = gradients(functools.partial(fn, impl=impl), states, (dout,))
    names = ("loss", *(f"gradient {i}" for i in range(len(grads))))
    assert_all_within_budget(names, (out, *grads), [sum(x, ()) for x in lows], sum(exact, ()))
    assert out.dtype == dout.dtype and out.shape == ()
    assert [g.dtype for g in grads] == [x.dtype for x in states]


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_the_reference_agrees_with_independent_code(case):
    if "target_dtype" in CASES[case][1]:
        pytest.skip("rounded to other dtypes than fp64")
    *_, lows, exact = budget(case, torch.float64, "cpu")
    for a, b in zip(sum(lows[0], ()), sum(exact, ()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_layers_of_several_dtypes(impl):
    """The result has the widest; each gradient is its layer's own."""
    states, targets = make_inputs(2, columns=(40, 40, 40))
    states = [
        x.to(dtype) for x, dtype in zip(states, (torch.float16, torch.float64, torch.float32), strict=True)
    ]
    rows = torch.tensor([3, 8])
    fn = functools.partial(loss_of, targets, rows, "relative", impl=impl)
    (loss,), grads = gradients(fn, states, (torch.tensor(1.0, dtype=torch.float64),))
    assert loss.dtype == torch.float64
    alone = [loss_of([y], rows, "relative", x, impl=impl) for x, y in zip(states, targets, strict=True)]
    torch.testing.assert_close(loss, sum(x.double() for x in alone) / 3)
    for i, x in enumerate(states):
        one = functools.partial(loss_of, targets[i : i + 1], rows, "relative", impl=impl)
        (expected,) = gradients(one, (x,), (torch.tensor(1 / 3, dtype=alone[i].dtype),))[1]
        torch.testing.assert_close(grads[i], expected)


def test_the_formula_in_numbers(impl):
    x = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[-1.0, 0.0], [7.0, 7.0]]])
    y = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # for rows 1 and 2: d is 1 and 5, s is 59 and 5
    mask = torch.tensor([[False, True], [True, False]])
    second, third = torch.zeros(2, 2, 1), torch.full((2, 1), 2.0)  # d and s are 4 and 4
    expected = {"relative": ((1 / 59 + 1) / 2, 1.0), "mean_square": (1.5, 4.0)}
    for form, losses in expected.items():
        options = {"form": form, "impl": impl}
        for rows in (mask, torch.tensor([1, 2])):
            assert float(alignment_loss([x], [y], rows, **options)) == pytest.approx(losses[0])
        both = alignment_loss((x, second), (y, third), mask, **options)
        assert float(both) == pytest.approx(sum(losses) / 2)
        assert float(alignment_loss([x], [y.flip(0)], torch.tensor([2, 1]), **options)) == pytest.approx(
            losses[0]
        )
    assert float(alignment_loss([x], [y], mask, impl=impl)) == pytest.approx(60 / 118)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(alignment_loss([x], [y], mask, impl=impl), x)
    by_hand = torch.tensor([[[0.0, 0.0], [-3 / 59**2, 1 / 59 - 5 / 59**2]], [[0.0, -2 / 5], [0.0, 0.0]]])
    torch.testing.assert_close(dx, by_hand)


@pytest.mark.parametrize("form", FORMS)
def test_other_rows_and_rows_that_are_none_have_no_part(form, impl):
    """Whatever lies in rows that are not chosen, and in the targets of what is no row, NaN included."""
    rows = torch.tensor([4, -1, 9, 4])
    states, targets = make_inputs(4)
    dout = (torch.tensor(1.0),)
    expected = gradients(functools.partial(loss_of, targets, rows, form, impl=impl), states, dout)
    others = torch.ones(26, dtype=torch.bool).index_fill(0, rows[rows >= 0], False).view(2, 13)
    states = [x.masked_fill(others[..., None], torch.nan) for x in states]
    for y in targets:
        y[1] = torch.nan
    actual = gradients(functools.partial(loss_of, targets, rows, form, impl=impl), states, dout)
    assert all(map(torch.equal, sum(actual, ()), sum(expected, ())))
    assert not any(g[others].any() for g in actual[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ("states", "targets"))
def test_a_chosen_row_that_is_not_finite_is_seen(where, form, impl):
    for value in (torch.nan, torch.inf, -torch.inf):
        states, targets = make_inputs(3)
        (states[1][0, 5] if where == "states" else targets[1][1])[7] = value
        loss, grads = gradients(
            functools.partial(loss_of, targets, torch.tensor([1, 5, 20]), form, impl=impl),
            states,
            (torch.tensor(1.0),),
        )
        assert not loss[0].isfinite()
        assert grads[0].isfinite().all() and not grads[1][0, 5].isfinite().all()


def test_a_row_of_zeros_has_no_loss_but_counts(impl):
    """In the state and in the target, or nearly: squares whose inverse would overflow."""
    rows, dout = torch.tensor([1, 5, 20]), (torch.tensor(1.0),)
    for nearly in (0.0, 1e-20):
        states, targets = make_inputs(3)
        states[1][0, 5], targets[1][1] = nearly, -nearly
        fn = functools.partial(loss_of, targets, rows, "relative", impl=impl)
        (loss,), (_, grad) = gradients(fn, states, dout)
        assert grad.isfinite().all() and not grad[0, 5].any() and grad[0, 1].any()
        first = loss_of(targets[:1], rows, "relative", states[0], impl=impl)
        others = loss_of([targets[1][[0, 2]]], rows[[0, 2]], "relative", states[1], impl=impl)
        torch.testing.assert_close(loss, (first + others * 2 / 3) / 2)
    states[1].zero_(), targets[1].zero_()
    for form in FORMS:
        (loss,), grads = gradients(functools.partial(loss_of, targets, rows, form, impl=impl), states, dout)
        torch.testing.assert_close(loss, loss_of(targets[:1], rows, form, states[0], impl=impl) / 2)
        assert grads[0].any() and not grads[1].any()


def test_one_of_both_is_zero(impl):
    """The loss is 1; a state of zeros is drawn to its target, one whose target is 0 has nowhere to go."""
    x, y = torch.zeros(1, 2, 40), normal(2, 40, dtype=torch.float32)
    x[0, 1], y[1] = y[1], 0
    fn = functools.partial(loss_of, [y], torch.tensor([0, 1]), "relative", impl=impl)
    (loss,), (grad,) = gradients(fn, (x,), (torch.tensor(2.0),))
    torch.testing.assert_close(loss, torch.tensor(1.0))
    torch.testing.assert_close(grad[0], torch.stack([-2 * y[0] / y[0].square().sum(), 0 * y[0]]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bounds(dtype, impl):
    """Exactly 0 where states are the targets, 2 where they are their opposites, neither with a gradient."""
    (y,), rows = make_inputs(4, dtype, columns=(72,))[1], torch.tensor([3, 25, 0, 14])
    fn = functools.partial(loss_of, [y], rows, "relative", impl=impl)
    same, *others = (
        torch.zeros(26, 72, dtype=dtype).index_copy(0, rows, x).view(2, 13, 72)
        for x in (y, -y, -3 * y, y.flip(0), 1000 * y)
    )
    dout = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    (loss,), (grad,) = gradients(fn, (same,), (dout,))
    assert loss == 0 and not grad.any()
    eps = torch.finfo(dout.dtype).eps
    (loss,), (grad,) = gradients(fn, (others[0],), (dout,))
    assert abs(loss - 2) <= 8 * eps and (grad * same).abs().sum() <= 100 * eps
    assert all(0 < fn(x) <= 2 + 8 * eps for x in others)


def test_no_scale_and_batches_that_are_one(impl):
    """Of states and targets times 2^k bit for bit; the mean over batches of as many tokens."""
    rows = torch.tensor([3, 25, 0, 14])
    states, targets = make_inputs(4, columns=(40, 72))
    loss = loss_of(targets, rows, "relative", *states, impl=impl)
    for scale in (2.0**-20, 2.0**20):
        scaled = loss_of(
            [y * scale for y in targets], rows, "relative", *(x * scale for x in states), impl=impl
        )
        assert torch.equal(scaled, loss)
    halves = (loss_of([y[i] for y in targets], rows[i], "relative", *states, impl=impl)
              for i in (slice(2), slice(2, 4)))  # fmt: skip
    torch.testing.assert_close(sum(halves) / 2, loss)


@pytest.mark.parametrize("size", (1e3, 1e4))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_sinks(dtype, size, impl):
    """A state that is a thousand times its target has a loss near 1, and others their gradients.

    Its own gradient is that of an angle: of the size of the target, a difference of two of the size of the
    state, whose roundings are left.
    """
    (x,), (y,) = make_inputs(3, dtype, columns=(72,))
    rows = torch.tensor([4, 0, 13])  # the second and third are sinks
    x[:, 0] = normal(2, 72, dtype=torch.float64, seed=3).to(dtype) * size
    acc = torch.promote_types(dtype, torch.float32)
    fn = functools.partial(loss_of, [y], rows, "relative", impl=impl)
    (loss,), (grad,) = gradients(fn, (x,), (torch.tensor(3.0, dtype=acc),))
    exact_fn = functools.partial(loss_of, [y.double()], rows, "relative", impl="reference")
    (exact,), (wanted,) = gradients(exact_fn, (x.double(),), (torch.tensor(3.0, dtype=torch.float64),))
    eps = torch.finfo(acc).eps
    assert abs(float(loss) / float(exact) - 1) <= 8 * eps
    alone = loss_of([y[:1]], rows[:1], "relative", x, impl=impl)
    assert 3 * float(loss) - float(alone) == pytest.approx(2, abs=0.02)
    s = (x.double().flatten(0, 1)[rows].square() + y.double().square()).sum(1)
    bound = torch.zeros(26, 1, dtype=torch.float64)
    bound[rows] = (8 * eps * 2 / s.sqrt())[:, None]
    own = torch.finfo(dtype)
    bound = bound.view(2, 13, 1) + own.eps * wanted.abs() + own.tiny * own.eps
    assert ((grad.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_a_use_without_gradient_is_left_out(value, operator):
    """A loss that has no part in what is differentiated does not spread what its rows hold."""
    states, targets = make_inputs(2)
    states[0][0, 5] = value
    fn = functools.partial(loss_of, targets, torch.tensor([5, 5]), "mean_square", impl=operator)
    _, grads = gradients(fn, states, (torch.tensor(0.0),))
    assert not any(g.any() for g in grads)


def test_a_mask_is_its_indices(impl):
    """Bit for bit, in any stride; 32-bit and strided indices too."""
    mask = normal(13, 2, dtype=torch.float32).t() > 0
    index = mask.flatten().nonzero()[:, 0]
    states, targets = make_inputs(len(index))
    fn = functools.partial(gradients, inputs=states, douts=(torch.tensor(1.0),))
    expected = sum(fn(functools.partial(loss_of, targets, index, "relative", impl=impl)), ())
    for rows in (mask, mask.contiguous(), index.int(), index.repeat_interleave(2)[::2]):
        actual = sum(fn(functools.partial(loss_of, targets, rows, "relative", impl=impl)), ())
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ((0, 3, 5), (2, 0, 5), (2, 3, 0)))
def test_empty(shape, form, impl):
    states = [torch.zeros(shape)] * 2
    for N in (0, 4):
        fn = functools.partial(loss_of, [torch.ones(N, shape[2])] * 2, torch.full((N,), -1), form, impl=impl)
        (loss,), grads = gradients(fn, states, (torch.tensor(1.0),))
        assert loss == 0 and all(g.shape == shape and not g.any() for g in grads)
    if shape[2] == 0:
        assert loss_of([torch.ones(1, 0)], torch.tensor([1]), form, states[0], impl=impl) == 0


def test_duplicates_are_summed_in_fp32(impl):
    """4096 uses of a row: in halves the sum would stop growing at 2048."""
    if impl == "reference":
        pytest.skip("its gradient is that of autograd")
    states, rows = torch.ones(1, 3, 8, dtype=torch.float16), torch.ones(4096, dtype=torch.long)
    _, (grad,) = gradients(
        functools.partial(loss_of, [torch.zeros(4096, 8)], rows, "mean_square", impl=impl),
        (states,),
        (torch.tensor(4096 * 8 / 2.0),),
    )
    assert torch.equal(grad[0, :, 0], torch.tensor([0.0, 4096.0, 0.0], dtype=torch.float16))


def test_halves_near_their_end(impl):
    """Squares of differences that fp16 does not hold."""
    states = [torch.full((1, 2, 40), 6e4, dtype=torch.float16)]
    fn = functools.partial(loss_of, [-states[0][0]], torch.tensor([0, 1]), "mean_square", impl=impl)
    (loss,), (grad,) = gradients(fn, states, (torch.tensor(1.0),))
    assert float(loss) == pytest.approx(1.2e5**2, rel=1e-3)
    assert float(grad[0, 0, 0]) == pytest.approx(2 * 1.2e5 / 80, rel=1e-3)


def test_rows_are_sorted_for_a_gradient_alone(operator):
    rows, _ = make_rows("duplicates")
    states, targets = make_inputs(len(rows), columns=(40, 40, 40))
    fn = functools.partial(loss_of, targets, rows, "relative", impl=operator)
    with mock.patch.object(torch, "sort", wraps=torch.sort) as sorts:
        fn(*states)
        assert sorts.call_count == 0
        fn(*(x.requires_grad_() for x in states))
        assert sorts.call_count == 1


def test_nothing_large_is_saved_but_the_inputs(operator):
    rows, _ = make_rows("mask")
    states, targets = make_inputs(int(rows.sum()), columns=(1000, 1000))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        loss_of(targets, rows, "relative", *(x.requires_grad_() for x in states), impl=operator)
    given = {x.data_ptr() for x in (*states, *targets)}
    assert given <= {x.data_ptr() for x in saved}
    assert all(x.numel() <= 2 * 26 + 1 for x in saved if x.data_ptr() not in given)


def test_vmap_of_the_reference():
    (x,), targets = make_inputs(2, columns=(40,))
    fn = functools.partial(loss_of, targets, torch.tensor([1, -1]), "relative", impl="reference")
    torch.testing.assert_close(torch.func.vmap(fn)(torch.stack([x, 2 * x])), torch.stack([fn(x), fn(2 * x)]))


@pytest.mark.parametrize("target_dtype", (torch.float16, torch.float32), ids=str)
def test_opcheck(target_dtype, operator):
    rows, _ = make_rows("none")
    (x,), (y,) = make_inputs(
        len(rows), torch.float16, columns=(40,), layout="tokens_first", target_dtype=target_dtype
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.mmicl.alignment_squares_fwd, (x, y, rows, operator), test_utils=tests)
    order = torch.sort(rows, stable=True).indices
    starts = torch.searchsorted(rows[order], torch.arange(27))
    torch.library.opcheck(
        torch.ops.mmicl.alignment_squares_bwd,
        (torch.ones(len(rows)), torch.ones(len(rows)), x, y, order, starts, operator),
        test_utils=tests,
    )


@pytest.mark.parametrize("name", ("mask", "duplicates"))
@pytest.mark.parametrize("form", FORMS)
def test_compile(form, name, operator):
    """First and second call, then another length, without a graph break, forward and backward."""
    if INTERPRETED:
        pytest.skip("the interpreter's kernels are not traced")
    torch.compiler.reset()

    def fn(*states, targets, rows):
        return alignment_loss(states, targets, rows, form=form, impl=operator)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (13, 13, 17):
        rows, index = make_rows(name, T=T)
        states, targets = make_inputs(len(index), T=T)
        results = (
            sum(gradients(functools.partial(f, targets=targets, rows=rows), states, (torch.tensor(1.0),)), ())
            for f in (fn, compiled)
        )
        for plain, other in zip(*results, strict=True):
            assert plain.stride() == other.stride()
            torch.testing.assert_close(other, plain)


def test_a_compiled_mask_of_another_count_is_cut_or_filled_up():
    """Where its rows cannot be counted without waiting, as on CUDA: the first ones, or none at the end."""
    torch.compiler.reset()
    mask, index = make_rows("mask")
    compiled = torch.compile(alignment_loss, fullgraph=True, backend="aot_eager")
    states, targets = make_inputs(5)
    torch.testing.assert_close(compiled(states, targets, mask), alignment_loss(states, targets, index[:5]))
    states, targets = make_inputs(len(index) + 2)
    torch.testing.assert_close(
        compiled(states, targets, mask), alignment_loss(states, targets, F.pad(index, (0, 2), value=-1))
    )


def test_layers_on_several_devices():
    """Nothing but ``[N]`` numbers and the index moves."""
    with FakeTensorMode():
        rows = torch.ones(2, 3, dtype=torch.bool)
        states = [torch.zeros(2, 3, 8, device=f"cuda:{i}") for i in (1, 0, 1)]
        targets = [torch.zeros(6, 8, device=x.device) for x in states]
        for form in FORMS:
            loss = alignment_loss(states, targets, rows, form=form)
            assert loss.device == states[0].device


@pytest.mark.gpu
def test_layers_on_two_devices(impl):
    """As on one, with gradients."""
    if impl == "triton":
        pytest.skip("one of them is the CPU")
    rows, index = make_rows("mask")
    states, targets = make_inputs(len(index))
    results = []
    for devices in (("cpu", "cpu"), ("cuda", "cpu")):
        leaves = [x.to(device).detach().requires_grad_() for x, device in zip(states, devices, strict=True)]
        own = [y.to(device) for y, device in zip(targets, devices, strict=True)]
        loss = alignment_loss(leaves, own, rows, impl=impl)
        assert loss.device == leaves[0].device
        results.append([x.cpu() for x in (loss, *torch.autograd.grad(loss, leaves))])
    torch.testing.assert_close(*results)


@pytest.mark.skipif(INTERPRETED, reason="allocations of the compiled kernels")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bytes(dtype):
    """Beside the gradient of the states no memory but a few numbers a row: nothing gathered, nothing wide."""
    from benchmarks.harness.timing import peak_allocated_bytes
    from mmicl_kernels import _extension

    if not _extension.load():
        pytest.skip("the C++ extension is not built")
    B, T, C, N, L = 2, 64, 4096, 50, 3
    rows = torch.arange(N) * 2
    states, targets = make_inputs(N, dtype, B=B, T=T, columns=(C,) * L)
    cpu = torch.ops.mmicl_cpu
    assert peak_allocated_bytes(lambda: cpu.alignment_squares_fwd(states[0], targets[0], rows)) == 2 * 4 * N
    order, starts = torch.arange(N), torch.searchsorted(rows, torch.arange(B * T + 1))
    uses = (torch.ones(N), torch.ones(N), states[0], targets[0], order, starts)
    assert peak_allocated_bytes(lambda: cpu.alignment_squares_bwd(*uses)) == states[0].nbytes
    fn = functools.partial(loss_of, targets, rows, "relative", impl="composed")
    small = 8 * (12 * L * N + 2 * B * T)
    assert small < states[0].nbytes / 8
    assert peak_allocated_bytes(lambda: fn(*states)) < small
    leaves = [x.requires_grad_() for x in states]
    gradient = L * states[0].nbytes
    assert peak_allocated_bytes(lambda: torch.autograd.grad(fn(*leaves), leaves)) < gradient + small


def changed(**changes):
    states, targets = make_inputs(2, columns=(8, 8))
    return {"states": states, "targets": targets, "rows": torch.tensor([1, 2]), **changes}


def layers(*shape, dtype=torch.float32, **options):
    return [torch.zeros(shape, dtype=dtype, **options)] * 2


MASK = torch.ones(2, 13, dtype=torch.bool)
BAD = {
    "states_type": (changed(states=torch.zeros(2, 2, 13, 8)), TypeError, "states must be a sequence.*Tensor"),
    "targets_type": (changed(targets=torch.zeros(2, 2, 8)), TypeError, "targets must be a sequence.*Tensor"),
    "states_entry": (changed(states=[1, 2]), TypeError, r"states\[0\] must be a tensor, got int"),
    "layers": (changed(states=layers(2, 13, 8)[:1]), ValueError, "states has 1 layers and targets 2"),
    "no_layers": (changed(states=[], targets=[]), ValueError, "states has 0 layers and targets 0"),
    "states_rank": (changed(states=layers(3, 8)), ValueError, r"states\[0\] has shape \[3, 8\].*\[B, T, C\]"),
    "states_dtype": (changed(states=layers(2, 13, 8, dtype=torch.int32)), TypeError, "states.0. has dtype"),
    "states_stride": (changed(states=[torch.zeros(2, 8, 13).mT] * 2), ValueError, "states.0. has strides"),
    "states_length": (changed(states=[torch.zeros(2, T, 8) for T in (13, 12)]), ValueError,
                      r"states\[1\] has shape \[2, 12, 8\].*T = 13"),
    "targets_rank": (changed(targets=layers(2, 1, 8)), ValueError, r"targets\[0\] has shape \[2, 1, 8\]"),
    "targets_rows": (changed(targets=[torch.zeros(N, 8) for N in (2, 3)]), ValueError,
                     r"targets\[1\] has shape \[3, 8\].*N = 2"),
    "targets_columns": (changed(targets=layers(2, 7)), ValueError, r"targets\[0\] has shape \[2, 7\].*C = 8"),
    "targets_dtype": (changed(targets=layers(2, 8, dtype=torch.int8)), TypeError, "targets.0. has dtype"),
    "targets_stride": (changed(targets=[torch.zeros(8, 2).t()] * 2), ValueError, "targets.0. has strides"),
    "targets_device": (changed(targets=layers(2, 8, device="meta")), ValueError,
                       r"targets\[0\] is on meta, expected cpu like states\[0\]"),
    "targets_grad": (changed(targets=layers(2, 8, requires_grad=True)), ValueError,
                     r"targets\[0\] requires grad"),
    "rows_type": (changed(rows=[1, 2]), TypeError, "rows must be a tensor, got list"),
    "rows_dtype": (changed(rows=torch.ones(2)), TypeError, "rows has dtype torch.float32, expected"),
    "rows_rank": (changed(rows=torch.ones(2, 13).long()), ValueError, r"rows has shape \[2, 13\].*\[N\]"),
    "rows_count": (changed(rows=torch.tensor([1])), ValueError, r"rows has shape \[1\].*N = 2"),
    "rows_high": (changed(rows=torch.tensor([0, 26])), ValueError, "rows has values from 0 to 26"),
    "rows_low": (changed(rows=torch.tensor([-2, 3])), ValueError, "rows has values from -2 to 3.* to 25"),
    "mask_shape": (changed(rows=MASK[:, 1:]), ValueError, r"rows has shape \[2, 12\].*T = 13"),
    "mask_count": (changed(rows=MASK), ValueError, "rows has 26 rows, expected the 2 that targets has"),
    "form": (changed(form="layer"), ValueError, "form is 'layer', expected one of 'relative', 'mean"),
    "impl": (changed(impl="fast"), ValueError, "impl is 'fast'"),
    "impl_cuda": (changed(impl="cuda"), NotImplementedError, "alignment_loss has no impl='cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        alignment_loss(**arguments)


@pytest.mark.skipif(INTERPRETED, reason="an environment variable lets the kernels run on CPU tensors")
def test_triton_on_cpu_tensors_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1|pip install triton"):
        alignment_loss(**changed(impl="triton"))
