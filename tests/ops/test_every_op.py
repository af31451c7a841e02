"""What every op promises by every impl; test_shifted_attention_triton.py runs this file interpreted."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmicl_kernels.ops import attention_shift, residual_shift, residual_shift_rms_norm, shifted_attention
from mmicl_kernels.ops.prefix_splice.api import prefix_splice_
from mmicl_kernels.testing.inputs import (
    attention_shift_inputs,
    normal,
    residual_shift_inputs,
    shifted_attention_inputs,
    token_ids,
)
from tests.ops import test_alignment_loss as alignment
from tests.ops import test_prefix_splice as splice
from tests.ops import test_prefix_splice_in_place as in_place
from tests.ops import test_row_projection as projection
from tests.ops.triton_process import INTERPRETED, assert_passes_interpreted, compiles

IDS = torch.tensor([1, -1], dtype=torch.int32)
ENTRIES = torch.tensor([[1, 0], [-1, 1]])


class Given(NamedTuple):
    """``call(*inputs, impl=impl)``, with gradients of all ``inputs``; it is given ``others`` too."""

    inputs: tuple[Tensor, ...]
    call: Callable
    others: tuple[Tensor, ...]


def attention(adapters, T, C, dtype, device):
    inputs = shifted_attention_inputs(2, 2, 1, T, T, C, adapters=adapters, dtype=dtype, device=device)
    ids = None if adapters is None else IDS.to(device)
    return Given(
        inputs, partial(shifted_attention, causal=True, adapter_ids=ids), () if ids is None else (ids,)
    )


def shift(adapters, T, C, dtype, device):
    inputs = attention_shift_inputs(2, 2, T, C, adapters=adapters, dtype=dtype, device=device)
    ids = None if adapters is None else IDS.to(device)
    return Given(inputs, partial(attention_shift, adapter_ids=ids), () if ids is None else (ids,))


def residual_alone(preserve_norm, T, C, dtype, device):
    inputs = residual_shift_inputs(2, T, C, dtype=dtype, device=device)
    return Given(inputs, partial(residual_shift, preserve_norm=preserve_norm), ())


def residual(preserve_norm, T, C, dtype, device):
    inputs = residual_shift_inputs(2, T, C, adapters=2, dtype=dtype, device=device)
    strengths, ids = normal(2, 2, dtype=inputs[1].dtype, device=device, seed=5), ENTRIES.to(device)

    def call(x, vector, scale, strengths, impl):
        options = {"strengths": strengths, "preserve_norm": preserve_norm, "impl": impl}
        return residual_shift(x, vector, scale, adapter_ids=ids, **options)

    return Given((*inputs, strengths), call, (ids,))


def residual_tokens(preserve_norm, T, C, dtype, device):
    inputs = residual_shift_inputs(2, T, C, adapters=2, dtype=dtype, device=device)
    ids = token_ids(2, T, 2, adapters=2, device=device)
    strengths = normal(*ids.shape, dtype=inputs[1].dtype, device=device, seed=5)

    def call(x, vector, scale, strengths, impl):
        options = {"strengths": strengths, "preserve_norm": preserve_norm, "impl": impl}
        return residual_shift(x, vector, scale, adapter_ids=ids, **options)

    return Given((*inputs, strengths), call, (ids,))


def residual_own(preserve_norm, T, C, dtype, device):
    inputs = residual_shift_inputs(2, T, C, adapters=2, dtype=dtype, device=device)
    return Given(inputs, partial(residual_shift, preserve_norm=preserve_norm), ())


def norm(weight_offset, adapters, T, C, dtype, device):
    x, vector, scale = residual_shift_inputs(2, T, C, adapters=adapters, dtype=dtype, device=device)
    skip = normal(*x.shape, dtype=dtype, device=device, seed=6)
    weight = normal(C, dtype=vector.dtype, device=device, seed=7)
    ids = None if adapters is None else IDS.to(device)
    call = partial(residual_shift_rms_norm, eps=1e-5, weight_offset=weight_offset, adapter_ids=ids)
    return Given((x, skip, vector, scale, weight), call, () if ids is None else (ids,))


def norm_tokens(T, C, dtype, device):
    inputs, call, _ = norm(0.0, 2, T, C, dtype, device)
    ids = token_ids(2, T, 2, adapters=2, device=device)
    strengths = normal(*ids.shape, dtype=inputs[2].dtype, device=device, seed=5)

    def with_strengths(*inputs, impl):
        return call(*inputs[:5], strengths=inputs[5], adapter_ids=ids, impl=impl)

    return Given((*inputs, strengths), with_strengths, (ids,))


def spliced(layout, T, C, dtype, device):
    requests = ((0, 1, 1), (1, 0)) * (1 + T // 8)
    case = {"sizes": (2, 1), "requests": requests, "T": T, "C": C, "max_length": T + 3}
    inputs, arguments = splice.make_inputs(case, dtype, device, layout)
    tensors = tuple(x for x in arguments.values() if isinstance(x, Tensor))
    return Given(inputs, lambda *x, impl: splice.call(*x, **arguments, impl=impl).embeddings, tensors)


def placed(T, C, dtype, device):
    case = {"sizes": (2, 1), "requests": ((0, 1, 1), (1, 0)), "starts": (0, 1), "L": T, "C": C}
    inputs, arguments = in_place.make_inputs(case, dtype, device)

    def call(embeddings, bank, impl):
        return prefix_splice_(embeddings * 1, bank, **arguments, impl=impl)

    return Given(inputs, call, tuple(arguments.values()))


def rows_of(T, device):
    """Of 2 T rows, some many times, and -1."""
    return torch.arange(4 * T, device=device) ** 2 % (2 * T + 1) - 1


def projected(form, T, C, dtype, device):
    hidden, weight, named = projection.make_inputs(form, dtype, device, T=T, C=C, D=C + 1)
    rows = rows_of(T, device)
    return Given((hidden, weight, *named.values()), partial(projection.op, rows, None, tuple(named)), (rows,))


def aligned(form, T, C, dtype, device):
    rows = rows_of(T, device)
    states, targets = alignment.make_inputs(len(rows), dtype, device, T=T, columns=(C, C + 1))
    return Given(tuple(states), partial(alignment.loss_of, targets, rows, form), (*targets, rows))


# By the op's name, and what there is several of.
OPS = {
    "shifted_attention-alone": partial(attention, None),
    "shifted_attention-rows": partial(attention, 2),
    "attention_shift-alone": partial(shift, None),
    "attention_shift-rows": partial(shift, 2),
    **{
        f"residual_shift-added{x}": partial(f, False) for x, f in (("", residual), ("-alone", residual_alone))
    },
    **{f"residual_shift-norm{x}": partial(f, True) for x, f in (("", residual), ("-alone", residual_alone))},
    "residual_shift-added-tokens": partial(residual_tokens, False),
    "residual_shift-norm-tokens": partial(residual_tokens, True),
    "residual_shift-norm-own": partial(residual_own, True),
    "residual_shift_rms_norm-llama": partial(norm, 0.0, 2),
    "residual_shift_rms_norm-gemma": partial(norm, 1.0, 2),
    "residual_shift_rms_norm-alone": partial(norm, 0.0, None),
    "residual_shift_rms_norm-tokens": norm_tokens,
    **{f"prefix_splice-{layout}": partial(spliced, layout) for layout in splice.LAYOUTS},
    "prefix_splice_": placed,
    **{f"row_projection-{form}": partial(projected, form) for form in projection.FORMS},
    **{f"alignment_loss-{form}": partial(aligned, form) for form in alignment.FORMS},
}
every_op = pytest.mark.parametrize("name", OPS)


def made(name, T=13, C=40, dtype=torch.float32, device="cpu"):
    return OPS[name](T, C, dtype, device)


def evaluate(call, inputs, impl):
    """Outputs, and gradients of those inputs that require them."""
    outputs = call(*inputs, impl=impl)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    device = outputs[0].device
    douts = [normal(*y.shape, dtype=y.dtype, device=device, seed=20 + i) for i, y in enumerate(outputs)]
    leaves = [x for x in inputs if x.requires_grad]
    return [y.detach() for y in outputs], torch.autograd.grad(outputs, leaves, douts)


def leaves_of(inputs):
    return [x.detach().requires_grad_() for x in inputs]


@every_op
def test_bit_equal_twice(name, impl):
    inputs, call, _ = made(name, T=67, C=72)
    first, second = (evaluate(call, leaves_of(inputs), impl) for _ in range(2))
    assert all(map(torch.equal, (*first[0], *first[1]), (*second[0], *second[1])))


@every_op
def test_what_is_given_is_not_written_to(name, impl):
    inputs, call, others = made(name)
    before = [x.clone() for x in (*inputs, *others)]
    evaluate(call, leaves_of(inputs), impl)
    assert all(map(torch.equal, (*inputs, *others), before))


@every_op
def test_autocast_changes_nothing(name, impl):
    if name.startswith("shifted_attention"):
        pytest.skip("it does as PyTorch's attention does: test_shifted_attention.py")
    if name.startswith("row_projection") and impl == "reference":
        pytest.skip("it is PyTorch's own product")
    inputs, call, _ = made(name)
    plain = evaluate(call, leaves_of(inputs), impl)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(call, leaves_of(inputs), impl)
    assert all(map(torch.equal, (*plain[0], *plain[1]), (*cast[0], *cast[1])))


@every_op
def test_only_what_is_needed_is_computed(name, operator, device):
    """A gradient is the same whichever others are asked for."""
    inputs, call, _ = made(name, device=device)
    _, full = evaluate(call, leaves_of(inputs), operator)
    for count in (1,) if INTERPRETED else range(1, len(inputs)):
        for needed in itertools.combinations(range(len(inputs)), count):
            leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
            _, grads = evaluate(call, leaves, operator)
            for i, grad in zip(needed, grads, strict=True):
                assert torch.equal(grad, full[i]), (needed, i)


@every_op
def test_gradcheck(name, impl):
    if impl == "triton" and name.startswith("shifted_attention"):
        pytest.skip("triton has no fp64")
    inputs, call, _ = made(name, T=3, C=4, dtype=torch.float64)
    leaves = leaves_of(inputs)
    assert torch.autograd.gradcheck(partial(call, impl=impl), leaves)
    if impl == "reference":
        assert torch.autograd.gradgradcheck(partial(call, impl=impl), leaves)


@every_op
@pytest.mark.parametrize("constant", (True, False), ids=("constant_dout", "dout_with_grad"))
def test_double_backward_is_refused(constant, name, operator, device):
    if constant and name.startswith("prefix_splice"):
        pytest.skip("it is linear: the gradient is constant as well")
    inputs, call, _ = made(name, device=device)
    leaves = leaves_of(inputs)
    outputs = call(*leaves, impl=operator)
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    dout = torch.ones_like(out).requires_grad_(not constant)
    for grad in torch.autograd.grad(out, leaves, dout, create_graph=True):
        with pytest.raises(RuntimeError, match=f"{name.split('-')[0]} cannot be differentiated twice"):
            grad.sum().backward(retain_graph=True)


@every_op
def test_vmap_is_refused(name, operator, device):
    inputs, call, _ = made(name, device=device)
    for mapped in ({*range(len(inputs))}, *({i} for i in range(len(inputs)))):
        given = [x[None] if i in mapped else x for i, x in enumerate(inputs)]
        where = tuple(0 if i in mapped else None for i in range(len(inputs)))
        with pytest.raises(NotImplementedError, match=f"{name.split('-')[0]} .*vmap.*impl='reference'"):
            torch.func.vmap(partial(call, impl=operator), where)(*given)


@compiles
@pytest.mark.slow
def test_in_the_interpreter():
    """What depends on the kernels."""
    assert_passes_interpreted(
        "not vmap and not double_backward and not (gradcheck and alone)", "every_op", at_least=90
    )
