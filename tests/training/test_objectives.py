"""MimIC's loss against its definition, and a student and a teacher in one model that never meet."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.methods.mimic.objective import MimICObjective
from mmicl_kernels.methods.record import record_outputs
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.testing.tiny_models import ALL_MODELS, TINY_MODELS, is_available, tiny_inputs, tiny_model
from tests.support.episode_inputs import episode
from tests.support.published import in_double, logits, published, random_adapter

SITES = {"mlp": r"\.mlp", "self_attn": r"\.self_attn", "layer": ""}


def states_and_logits(model, site, inputs):
    """``[L, B, T, C]`` of a site of every decoder layer, and the logits."""
    pattern = re.compile(r"^model\.(?:text_model\.|language_model\.)?layers\.\d+" + SITES[site] + "$")
    recorded = []
    hooks = [
        module.register_forward_hook(
            lambda m, a, out: recorded.append(out if torch.is_tensor(out) else out[0])
        )
        for name, module in model.named_modules()
        if pattern.match(name)
    ]
    output = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return torch.stack(recorded), output


def written_out(model, adapter, batch, site, form="relative", ce_weight=0.5, align_weight=1.0):
    """The loss token by token, the student through the published formulation."""
    with torch.no_grad():
        teacher, _ = states_and_logits(model, site, batch.teacher)
    with published(model, adapter):
        student, logits_ = states_and_logits(model, site, batch.student)
    apart, nll = [], []
    for row in range(len(batch.labels)):
        mine = batch.student_query[row].nonzero()[:, 0].tolist()
        theirs = batch.teacher_query[row].nonzero()[:, 0].tolist()
        for i, j in zip(mine, theirs, strict=True):
            x, y = student[:, row, i], teacher[:, row, j]
            square = ((x - y) ** 2).sum(-1)
            apart.append(square / ((x**2).sum(-1) + (y**2).sum(-1) if form == "relative" else x.shape[-1]))
        for t in range(1, batch.labels.shape[1]):
            label = int(batch.labels[row, t])
            if label != -100:
                nll.append(-torch.log_softmax(logits_[row, t - 1], -1)[label])
    align, ce = torch.stack(apart).mean(), torch.stack(nll).mean()
    return align_weight * align + ce_weight * ce, align, ce


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("site, form", [*((site, "relative") for site in SITES), ("mlp", "mean_square")])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_loss_and_gradient(name, site, form, padding):
    model = in_double(tiny_model(name))
    adapter = random_adapter(model, align=site, alignment=form).double()
    batch = episode(model, padding=padding)
    expected, align, ce = written_out(model, adapter, batch, site, form)
    with mk.attach(model, adapter) as handle:
        losses = MimICObjective(handle)(batch)
    align, ce = align.detach(), ce.detach()
    assert align > 1e-6 and ce > 0.1
    # Some dozens of fp64 roundings; a wrong token or weight is off by far more than 1e-6.
    tolerance = 1024 * torch.finfo(torch.float64).eps
    for actual, wanted in (
        (losses.total, expected),
        (losses.parts["align"], align),
        (losses.parts["ce"], ce),
    ):
        assert abs(actual.item() - wanted.item()) <= tolerance * wanted.item()
    assert not any(part.requires_grad for part in losses.parts.values())
    grads = torch.autograd.grad(losses.total, list(adapter.parameters()), allow_unused=True)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[: 3 if site == "mlp" else 2])


def test_weights():
    model = in_double(tiny_model("llava-llama"))
    batch = episode(model)
    adapter = random_adapter(model, align_weight=0.25, ce_weight=3.0).double()
    expected, *_ = written_out(model, adapter, batch, "mlp", ce_weight=3.0, align_weight=0.25)
    with mk.attach(model, adapter) as handle:
        total = MimICObjective(handle)(batch).total
    assert abs((total - expected).item()) <= 1024 * torch.finfo(torch.float64).eps * expected.item()


@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize("impl", ["composed", "reference"])
def test_gradient_equals_that_of_the_published_form(impl, normalizer):
    """The op's backward inside a model, against autograd of the loss written out."""

    def gradient(dtype, impl=None):
        model = tiny_model("qwen2_5_vl")
        model = in_double(model) if dtype == torch.float64 else model
        adapter = random_adapter(model, normalizer=normalizer).to(dtype)
        batch = episode(model, padding="left")
        if impl is None:
            loss = written_out(model, adapter, batch, "mlp")[0]
            grads = torch.autograd.grad(loss, list(adapter.parameters()))
        else:
            with mk.attach(model, adapter, impl=impl) as handle:
                loss = MimICObjective(handle)(batch).total
                grads = torch.autograd.grad(loss, list(adapter.parameters()))
        return torch.cat([grad.flatten() for grad in grads]).double()

    # Two forms, each at most twice as far from the exact gradient as the written-out one is in fp32.
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    exact = gradient(torch.float64)
    low_error, error = ((x - exact).norm() for x in (gradient(torch.float32), gradient(torch.float64, impl)))
    assert error <= 4 * scale * low_error


def test_teacher_states_are_constants():
    """The gradient of the alignment is that of the student's states alone."""
    model = in_double(tiny_model("llava-llama"))
    adapter = random_adapter(model, ce_weight=0.0).double()
    batch = episode(model)
    with mk.attach(model, adapter) as handle:
        (grad,) = torch.autograd.grad(MimICObjective(handle)(batch).total, [adapter.layers["1"].shift])
        step = 1e-6
        shift = adapter.layers["1"].shift
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                shift[2, 3] += sign * step
                values.append(float(MimICObjective(handle)(batch).total))
                shift[2, 3] -= sign * step
    numeric = (values[0] - values[1]) / (2 * step)
    # Central differences: O(step^2) of the third derivative, and rounding / step.
    assert abs(numeric - float(grad[2, 3])) <= 1e-4 * float(grad.norm())


@pytest.mark.parametrize("fails", ["teacher", "student", "during"])
def test_hooks_and_state_after_an_error(fails):
    model = tiny_model("llava-llama")
    batch = episode(model)
    logits(model, batch.student)
    with mk.attach(model, random_adapter(model)) as handle:
        objective = MimICObjective(handle)
        hooks = count_hooks(model)
        shifted = logits(model, batch.student)
        if fails == "during":
            broken = batch
            hook = handle.anchors[1].mlp.register_forward_pre_hook(raise_error)
        else:
            inputs = {**getattr(batch, fails), "input_ids": torch.full((2, 12), 10**6)}
            broken = copy.copy(batch)
            object.__setattr__(broken, fails, inputs)
        with pytest.raises((IndexError, ZeroDivisionError, ValueError)):
            objective(broken)
        if fails == "during":
            hook.remove()
        assert count_hooks(model) == hooks
        assert handle.enabled
        assert torch.equal(logits(model, batch.student), shifted)


def raise_error(*_):
    raise ZeroDivisionError


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_record_outputs():
    first, second = torch.nn.Linear(3, 3), torch.nn.Identity()
    tokens = torch.tensor([[True, False, True], [False, False, True]])
    x = torch.randn(2, 3, 3)
    with record_outputs([second, first], tokens) as states:
        y = first(x)
        second((y, "more"))
    assert [tuple(s.shape) for s in states] == [(3, 3), (3, 3)]
    for state in states:
        assert torch.equal(state, torch.stack([y[0, 0], y[0, 2], y[1, 2]]))
    assert states[0].requires_grad
    first(x)
    assert len(states) == 2, "still recording"
    with record_outputs([first], tokens, whole=True) as states:
        y = first(x.flatten(0, 1))  # as some MLPs return them
    assert states[0].shape == (2, 3, 3) and states[0].data_ptr() == y.data_ptr()


@pytest.mark.parametrize("whole", [False, True])
def test_outputs_that_change_in_place_are_not_taken_for_what_they_were(whole):
    """As in a layer that adds its residual to what its MLP returned."""
    module, tokens, x = torch.nn.Linear(3, 3), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 3, 3)
    refused = pytest.raises(RuntimeError, match=r"outputs of modules \[0\] in place")
    with refused if whole else nullcontext(), record_outputs([module], tokens, whole=whole) as states:
        y = module(x)
        expected = y.detach().clone()
        y += x
    if not whole:
        assert torch.equal(states[0], expected.flatten(0, 1))


def test_objective_needs_a_single_adapter():
    model = tiny_model("llava-llama")
    two = {"a": random_adapter(model), "b": random_adapter(model, seed=1)}
    with mk.attach(model, two) as handle, pytest.raises(ValueError, match=r"\['a', 'b'\], expected a single"):
        MimICObjective(handle)


@pytest.mark.parametrize("site", SITES)
def test_checkpointing_hides_what_is_inside_a_layer(site):
    """Alignment inside a checkpointed layer is refused; at its output the gradient is the same as without."""
    model = tiny_model("llava-llama").train()
    adapter = mk.MimICAdapter(mk.MimICConfig(align=site, ce_weight=0.0), random_adapter(model).backbone)
    batch = episode(model)

    def gradient():
        adapter.zero_grad()
        MimICObjective(handle)(batch).total.backward()
        return torch.cat([x.grad.flatten() for x in adapter.parameters()])

    with mk.attach(model, adapter) as handle:
        plain = gradient()
        model.gradient_checkpointing_enable()
        if type(handle.anchors[0].layer).__call__ is not nn.Module.__call__ and site == "layer":
            with pytest.raises(ValueError, match="runs the hooks of layers within it"):
                gradient()
        elif site == "layer":
            assert plain.any() and torch.equal(gradient(), plain)
        else:
            with pytest.raises(ValueError, match=f"align is '{site}' and gradient checkpointing"):
                gradient()


@pytest.mark.parametrize("name", filter(is_available, ALL_MODELS))
def test_what_is_compared_are_the_querys_states(name):
    """Some MLPs return all tokens in one row: they are the same tokens there."""
    model = tiny_model(name).requires_grad_(False)
    inputs, anchors = tiny_inputs(model), find_anchors(model)
    query = inputs["attention_mask"].bool().clone()
    query[:, :-4] = False
    whole = {}
    hooks = [
        anchor.mlp.register_forward_hook(lambda m, args, out, i=anchor.index: whole.update({i: out}))
        for anchor in anchors
    ]
    with torch.no_grad(), record_outputs([anchor.mlp for anchor in anchors], query) as states:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    for anchor, x in zip(anchors, states, strict=True):
        out = whole[anchor.index]
        out = out[0] if isinstance(out, tuple) else out
        expected = out.flatten(0, -2)[query.flatten()]
        assert x.shape == (int(query.sum()), model.config.get_text_config().hidden_size)
        assert torch.equal(x, expected)


def test_layers_that_were_compiled_by_themselves_are_refused():
    """Their graphs do not see the hooks that record: nothing would be aligned."""
    model = tiny_model("llava-llama").requires_grad_(False)
    batch = episode(model)
    with mk.attach(model, random_adapter(model)) as handle:
        for anchor in handle.anchors:
            anchor.mlp.compile(backend="eager")
        model(**batch.student)
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
            try:
                losses = MimICObjective(handle)(batch)
            except RuntimeError as error:
                assert "outputs of" in str(error) and "compiled" in str(error)
            else:
                assert losses.parts["align"] > 0
    torch._dynamo.reset()
