"""Handles that were dropped: found, ended, and replaced; and models with one adapter in a dict."""

import copy
import gc
import pickle

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.family_oracles import EVERY_METHOD, adapter_of
from tests.patch.snapshots import assert_same_objects, snapshot, used_model
from tests.support.published import logits, random_adapter


def attach_and_drop(model, adapter, **options):
    mk.attach(model, adapter, **options)
    gc.collect()


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_dropped_handle_is_found_and_ended(method):
    model = used_model("llava-llama")
    adapter, before = adapter_of(model, method), snapshot(model)
    assert mk.handle_of(model) is None
    mk.detach(model)  # a plain one stays as it is
    attach_and_drop(model, adapter)
    handle = mk.handle_of(model)
    assert handle.adapters == {"default": adapter} and handle.enabled and handle.model is model
    assert mk.handle_of(model) is handle
    handle.disable()
    assert mk.handle_of(model) is handle
    handle.enable()
    mk.detach(model)
    assert mk.handle_of(model) is None and not handle.enabled
    assert_same_objects(snapshot(model), before)
    with pytest.raises(RuntimeError, match="the handle is detached"):
        handle.enable()


def test_it_is_the_one_that_attach_returned():
    model = tiny_model("llava-llama")
    with mk.attach(model, random_adapter(model)) as handle:
        assert mk.handle_of(model) is handle
    adapted = mk.AdaptedModel(model, random_adapter(model))
    assert mk.handle_of(adapted) is mk.handle_of(model) is adapted.handle
    mk.detach(adapted)
    assert mk.handle_of(model) is None


def test_a_dropped_handle_keeps_acting():
    model = tiny_model("llava-llama")
    inputs, adapter = tiny_inputs(model), random_adapter(model)
    with mk.attach(model, adapter):
        expected = logits(model, inputs)
    attach_and_drop(model, adapter)
    assert torch.equal(logits(model, inputs), expected)
    assert mk.handle_of(model).rows(None)  # and is as good as the first one
    mk.detach(model)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_cell_that_runs_twice(method):
    """Nobody has the first handle: it makes way, and the model is plain after the second."""
    model = used_model("llava-llama")
    before, inputs = snapshot(model), tiny_inputs(model)
    attach_and_drop(model, adapter_of(model, method))
    with pytest.warns(UserWarning, match=r"\['default'\] made way for \['new'\]"):
        handle = mk.attach(model, {"new": random_adapter(model)})
    actual = logits(model, inputs)
    handle.detach()
    assert_same_objects(snapshot(model), before)
    with mk.attach(model, random_adapter(model)):
        assert torch.equal(logits(model, inputs), actual)


def test_a_dropped_handle_stays_where_the_next_is_refused():
    model = tiny_model("llava-llama")
    inputs = tiny_inputs(model)
    attach_and_drop(model, random_adapter(model))
    expected, before = logits(model, inputs), snapshot(model)
    other = random_adapter(tiny_model("llava-qwen2"))
    with pytest.raises(mk.CheckpointError):
        mk.attach(model, other)
    assert_same_objects(snapshot(model), before)
    assert torch.equal(logits(model, inputs), expected)
    mk.detach(model)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_copy_has_a_handle_too(method, copier):
    model = tiny_model("idefics2")
    handle = mk.attach(model, adapter_of(model, method))
    copied = copier(model)
    with pytest.raises(ValueError, match="a deepcopy of a patched model is patched too"):
        mk.attach(copied, adapter_of(model, method))
    other = mk.handle_of(copied)
    assert other is not handle and other.model is copied and mk.handle_of(model) is handle
    mk.detach(copied)
    assert handle.enabled and not other.enabled
    inputs = tiny_inputs(model)
    assert torch.equal(logits(copied, inputs), logits(tiny_model("idefics2"), inputs))


def test_unknown_models():
    for call in (mk.handle_of, mk.detach):
        with pytest.raises(mk.UnsupportedModelError, match="Linear"):
            call(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_dict_of_one_adapter_acts_on_all_rows(method):
    model = tiny_model("llava-llama")
    inputs, adapter = tiny_inputs(model), adapter_of(model, method)
    with mk.attach(model, adapter) as handle:
        assert handle.single is adapter
        expected = logits(model, inputs)
    with mk.attach(model, {"only": adapter}) as handle:
        assert handle.single is adapter
        assert torch.equal(logits(model, inputs), expected)
    if adapter.embedding_site is not None:  # a model has one
        return
    with mk.attach(model, {"only": adapter, "other": adapter_of(model, method)}) as handle:
        with pytest.raises(RuntimeError, match="several adapters are attached"):
            model(**inputs)
        handle.remove("other")
        assert torch.equal(logits(model, inputs), expected)
        handle.add("more", adapter_of(model, method))
        with pytest.raises(RuntimeError, match="several adapters are attached"):
            model(**inputs)


def test_models_whose_layers_were_cut_or_replaced():
    """What is left of the patched layers tells whose they are."""
    for change in (lambda layers: layers[1:], lambda layers: torch.nn.ModuleList([layers[1], layers[0]])):
        model = tiny_model("llava-llama")
        handle = mk.attach(model, random_adapter(model))
        whole = model.model.language_model.layers
        model.model.language_model.layers = change(whole)
        assert mk.handle_of(model) is handle
        mk.detach(model)
        assert not [x for x in whole.modules() if hasattr(x, "mmicl_layer")] and mk.handle_of(model) is None


def test_rows_under_another_default_device():
    model = tiny_model("llava-llama")
    inputs, adapters = tiny_inputs(model), {"a": random_adapter(model), "b": adapter_of(model, "m2iv")}
    with mk.attach(model, adapters) as handle, handle.rows(["a", "b"]):
        expected = logits(model, inputs)
    with torch.device("meta"):
        handle = mk.attach(model, adapters)
        block = handle.rows(["a", "b"])
        block.__enter__()
    assert torch.equal(logits(model, inputs), expected)
    block.__exit__(None, None, None)
    handle.detach()
