"""STAVE: its parameters, where it acts, its loss written out, and what it is not trained with."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import ResidualSite
from mmicl_kernels.methods.stave.objective import STAVEObjective
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.testing.tiny_models import tiny_model
from tests.methods.test_m2iv_live_adapters import backbone
from tests.patch.test_prompt_slots import by_hand
from tests.support.episode_inputs import episode, many_shot
from tests.support.published import relative_error
from tests.support.residuals import random_shift

EPS = torch.finfo(torch.float32).eps


def adapter_of(hidden_size=64, **config):
    return mk.STAVEAdapter(mk.STAVEConfig(**config), backbone({i: (4, 16) for i in range(1, 4)}, hidden_size))


def test_parameters():
    adapter = adapter_of(4096, readout=3)
    assert adapter.num_parameters() == 8_192 and not adapter.layers["1"]["vector"].any()
    shapes = {name: x.shape for name, x in adapter.state_dict().items()}
    assert shapes == adapter.tensor_shapes(adapter.config, adapter.backbone)
    assert adapter.residual_sites == (ResidualSite("input", preserve_norm=False, readout=3),)
    assert adapter.attention_site is None and adapter.embedding_site is None and adapter.has_strength


@pytest.mark.parametrize("site", [("input", 0), ("mlp", 2)])
def test_sites_with_a_readout_elsewhere(site):
    with pytest.raises(ValueError, match="expected some at 'input' alone"):
        ResidualSite(site[0], preserve_norm=False, readout=site[1])


def loss_by_hand(model, adapter, inputs, query, labels):
    """Cross-entropy after rows added by hand to the query's tokens before the answer."""
    vector, readout = adapter.layers["0"]["vector"], adapter.config.readout
    weights = torch.zeros(*query.shape, 2)
    losses = []
    for row, own in enumerate(query):
        answer = (labels[row] != -100).nonzero().flatten()
        columns = own[: answer[0]].nonzero().flatten()
        weights[row, columns[-readout:], 0] = len(columns[-readout:]) ** -0.5
        weights[row, columns[:-readout], 1] = max(len(columns[:-readout]), 1) ** -0.5
    with by_hand(model, weights @ vector):
        logits = model(**inputs).logits
    for row in range(len(query)):
        answer = (labels[row] != -100).nonzero().flatten()
        losses.append(-logits[row, answer - 1].log_softmax(-1).gather(1, labels[row, answer][:, None]))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("readout", [1, 2])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_loss(weights, readout):
    model = tiny_model("llava-llama").requires_grad_(False)
    config = mk.STAVEConfig(readout=readout, ce_weight=weights[0], demonstrations_weight=weights[1])
    adapter, batch = random_shift(model, config), many_shot(model, padding="left")
    parameter = next(adapter.parameters())
    with mk.attach(model, adapter) as handle:
        losses = STAVEObjective(handle)(batch)
        losses.total.backward()
        assert handle._state.selection.tokens is None
    actual, parameter.grad = parameter.grad, None
    own = batch.student["attention_mask"].bool()
    terms = [loss_by_hand(model, adapter, batch.student, own, batch.labels)]
    passes = [(batch.teacher, batch.teacher_query), *batch.further]
    after = []
    for inputs, query in passes:
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[query] = batch.labels[batch.student_query]
        after.append(loss_by_hand(model, adapter, inputs, query, labels))
    assert len(after) > 1
    terms.append(torch.stack(after).mean())
    expected = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    expected.backward()
    assert relative_error(losses.total.detach(), expected.detach()) <= 64 * EPS
    assert relative_error(actual, parameter.grad) <= 512 * EPS
    for name, weight, term in zip(("ce", "ce_demonstrations"), weights, terms, strict=True):
        assert (name in losses.parts) == (weight > 0)
        if weight:
            assert relative_error(losses.parts[name], term.detach()) <= 64 * EPS


def test_checkpointing():
    """Layers of both prompts are run again, when neither's tokens are chosen any more."""
    model = tiny_model("llava-llama").requires_grad_(False).train()
    batch, found, runs = episode(model), [], []
    layer = find_anchors(model)[0].layer
    layer.mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    for weight in (0.0, 1.0):
        adapter = random_shift(model, mk.STAVEConfig(demonstrations_weight=weight))
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
            adapter.zero_grad()
            runs.clear()
            with mk.attach(model, adapter) as handle:
                STAVEObjective(handle)(batch).total.backward()
            assert len(runs) == (1 + (weight > 0)) * (1 + checkpointed)
            found.append(next(adapter.parameters()).grad.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])


def test_a_library_adds_them_up(tmp_path):
    model = tiny_model("llava-llama")
    adapters = {
        name: random_shift(model, mk.STAVEConfig(readout=2), seed=seed) for seed, name in enumerate("ab")
    }
    library = mk.VLibrary(tmp_path)
    for name, adapter in adapters.items():
        library.put(name, adapter)
    combined = library.combine({"a": 0.5, "b": -2.0})
    one, other = (next(x.parameters()) for x in adapters.values())
    assert torch.equal(next(combined.parameters()), 0.5 * one - 2.0 * other)
    assert combined.config == mk.STAVEConfig(readout=2)
