"""Reentrant gradient checkpointing: right where it can be, refused where it cannot."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.patch.sites.residual import ResidualHook
from mmicl_kernels.testing.tiny_models import ALL_MODELS, is_available, tiny_inputs, tiny_model
from tests.patch.family_oracles import adapter_of
from tests.patch.test_support_matrix import base_of, model_of
from tests.support.published import relative_error
from tests.support.residuals import random_shift

FAMILIES = ("llava-llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen2_vl", "idefics2")))
METHODS = ("mimic", "m2iv")
QUICK = ("gemma4", "llava-llama")


def training_model(name, *, reentrant, inputs_require_grads=True, frozen=True):
    model = tiny_model(name, attn_implementation=base_of(name)).requires_grad_(not frozen)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # Reentrant checkpointing is by itself with it in new versions of transformers.
    model.disable_input_require_grads()
    if inputs_require_grads:
        model.enable_input_require_grads()
    return model.train()


def loss_of(model):
    return model(**tiny_inputs(model)).logits.square().mean()


def gradients(name, method, reentrant, rows=None, **options):
    model = training_model(name, reentrant=reentrant, **options)
    adapter, calls = adapter_of(model_of(name), method), []
    with mk.attach(model, {"x": adapter}) as handle, handle.rows(rows or "x"):
        hook = handle.anchors[0].mlp.register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        loss_of(model).backward()
        hook.remove()
    assert calls == [not reentrant, True]  # computed again
    return torch.cat([x.grad.flatten() for x in adapter.parameters()])


@pytest.mark.parametrize("rows", [None, ["x", None]], ids=["", "rows"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_non_reentrant_checkpointing(name, method, rows):
    expected = gradients(name, method, False, rows)
    assert torch.equal(gradients(name, method, True, rows), expected) and expected.norm() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_embedding_needs_nothing_more(method):
    options = {"frozen": False, "inputs_require_grads": False}
    expected = gradients("llava-llama", method, False, **options)
    assert torch.equal(gradients("llava-llama", method, True, **options), expected)


def refusal_cases():
    for name in filter(is_available, ALL_MODELS):
        for method in METHODS:
            yield pytest.param(name, method, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("name, method", refusal_cases())
def test_refused_where_gradients_would_be_wrong(name, method):
    model = training_model(name, reentrant=True, inputs_require_grads=False)
    with mk.attach(model, adapter_of(model, method)):
        with pytest.raises(RuntimeError, match="use_reentrant=True, expected"):
            loss_of(model)
        if name.startswith("gemma4"):
            model.enable_input_require_grads()
            with pytest.raises(RuntimeError, match="use_reentrant=True, expected"):
                loss_of(model)


@pytest.mark.parametrize("site", ["mixer", "layer"])
def test_refused_in_the_pass_without_gradients(site):
    """In which reentrant checkpointing runs a layer first, and on older transformers all of its hooks."""
    model = training_model("llava-llama", reentrant=True, inputs_require_grads=False)
    with mk.attach(model, adapter_of(model, "m2iv")) as handle, torch.no_grad():
        module = getattr(handle.anchors[0], site)
        (hook,) = [x for x in module._forward_hooks.values() if isinstance(x, ResidualHook)]
        with pytest.raises(RuntimeError, match="use_reentrant=True, expected"):
            hook(module, (), torch.randn(1, 3, 32))
        model.eval()
        hook(module, (), torch.randn(1, 3, 32))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
class TestStateOfTheRecomputation:
    def attached(self, method, reentrant):
        model = training_model("llava-llama", reentrant=reentrant)
        adapters = {"a": adapter_of(model, method), "b": adapter_of(model, method)}
        return model, adapters, mk.attach(model, adapters)

    def test_another_one_is_an_error(self, method, reentrant):
        model, _, handle = self.attached(method, reentrant)
        with handle.rows("a"):
            loss = loss_of(model)
        with handle.rows("b"), pytest.raises(RuntimeError, match="as at the last forward pass"):
            loss.backward()

    def test_what_came_before_does_not_matter(self, method, reentrant):
        model, adapters, handle = self.attached(method, reentrant)
        with handle.rows(["a", None]):
            model.eval()
            loss_of(model)  # with gradients and without checkpointing
        with handle.rows("b"):
            model.train()
            loss_of(model).backward()
        expected = gradients("llava-llama", method, reentrant)
        assert torch.equal(torch.cat([x.grad.flatten() for x in adapters["b"].parameters()]), expected)

    def test_an_evaluation_between_does_not_matter(self, method, reentrant):
        model, adapters, handle = self.attached(method, reentrant)
        with handle.rows("b"):
            loss = loss_of(model)
            model.eval()
            with torch.no_grad(), handle.rows(["a", None]):
                loss_of(model)
            model.train()
            loss.backward()
        expected = gradients("llava-llama", method, reentrant)
        assert torch.equal(torch.cat([x.grad.flatten() for x in adapters["b"].parameters()]), expected)


def stave_gradients(model, adapter, passes):
    adapter.zero_grad()
    with mk.attach(model, adapter):
        losses = [model(**inputs).logits[:, -1].square().mean() for inputs in passes]
        sum(losses).backward()
    return next(adapter.parameters()).grad.clone()


@pytest.mark.parametrize("form", ["plain", "shared", "reentrant"])
def test_slots_of_a_repeated_layer(form):
    """Passes of other prompts: the gradients without checkpointing, or a clear refusal."""
    reentrant = form == "reentrant"
    model = training_model("llava-llama", reentrant=reentrant, inputs_require_grads=reentrant)
    adapter = random_shift(model, mk.STAVEConfig(readout=2))
    embeddings = model.get_input_embeddings()(torch.arange(2, 14).view(2, 6)).detach()
    masks = torch.ones(2, 6, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    own = [embeddings.requires_grad_(reentrant)] * 2
    if form != "shared":
        own = [x.detach().clone().requires_grad_(reentrant) for x in own]
    passes = [{"inputs_embeds": x, "attention_mask": mask} for x, mask in zip(own, masks, strict=True)]
    model.eval()
    expected = stave_gradients(model, adapter, passes)
    model.train()
    try:
        actual = stave_gradients(model, adapter, passes)
    except RuntimeError as error:
        assert form != "plain" and "which tokens it reads is not known" in str(error)
    else:
        assert relative_error(actual, expected) <= 256 * torch.finfo(torch.float32).eps
