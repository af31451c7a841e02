"""No logits but the answers': whose they are, what they cost, and that loss and gradients stay the same."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import mmicl_kernels as mk
from mmicl_kernels.methods.answers import answer_cross_entropy, answer_logits, answer_loss, rows_before
from mmicl_kernels.testing.tiny_models import TINY_MODELS, tiny_model
from tests.support.episode_inputs import aggregation, episode, many_shot, objective_of
from tests.support.published import in_double, random_adapter
from tests.support.residuals import random_shift
from tests.training.watching import Largest

METHODS = ("mimic", "live", "m2iv", "aim", "prompt_tuning")
# Some hundreds of fp64 roundings one after another; a wrong row or label is off by far more.
TOLERANCE = 1024 * torch.finfo(torch.float64).eps


def adapter_and_batch(model, method):
    if method == "mimic":
        return random_adapter(model), episode(model, padding="left")
    if method == "aim":
        return mk.create(model, mk.AIMConfig()), aggregation(model)
    if method == "prompt_tuning":
        return mk.create(model, mk.PromptTuningConfig()), many_shot(model, padding="left")
    config = mk.LIVEConfig() if method == "live" else mk.M2IVConfig()
    return random_shift(model, config), many_shot(model, padding="left")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_logits_but_the_answers(name, method):
    """No result of V columns has more rows than answer tokens: in the teacher, forward and backward."""
    model = tiny_model(name).requires_grad_(False)
    adapter, batch = adapter_and_batch(model, method)
    prompts = batch.queries if method == "aim" else batch.student
    V = model(**prompts).logits.shape[-1]
    weights = {tuple(x.shape) for x in model.parameters()}
    transposed = {(x[1], x[0]) for x in weights if len(x) == 2}

    def of(shape):
        return (
            bool(shape)
            and shape[-1] in (V, model.config.get_text_config().vocab_size)
            and (shape not in weights | transposed)
        )

    with Largest(of) as full:
        model(**prompts)
    assert full.most == batch.labels.numel() * V, "the counter sees what it should"
    with mk.attach(model, adapter) as handle, Largest(of) as cut:
        objective_of(handle)(batch).total.backward()
    assert cut.most == int((batch.labels != -100).sum()) * V


@pytest.mark.parametrize("method", METHODS)
def test_what_the_head_is_asked_for(method):
    """Each student's answer; the teacher's, or of a teacher whose logits nobody reads one row."""
    model = tiny_model("llava-llama").requires_grad_(False)
    adapter, batch = adapter_and_batch(model, method)
    asked = []
    with mk.attach(model, adapter) as handle:
        objective = objective_of(handle)
        model.lm_head.register_forward_hook(lambda head, args, out: asked.append(out.shape[:-1].numel()))
        objective(batch)
    n = int((batch.labels != -100).sum())
    assert asked == {"mimic": [1, n], "aim": [n], "prompt_tuning": [n]}.get(method, [n] * 4)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_loss_and_gradient_are_those_of_all_logits(name, padding):
    model = in_double(tiny_model(name)).requires_grad_(True)
    batch = episode(model, padding=padding)
    scores = model(**batch.student).logits[:, :-1]
    labels = batch.labels[:, 1:]
    expected = F.cross_entropy(scores[labels != -100], labels[labels != -100])
    actual = answer_loss(model, batch.student, batch.labels)
    assert abs(actual - expected) <= TOLERANCE * expected
    parameters = list(model.get_output_embeddings().parameters()) + [model.get_input_embeddings().weight]
    for x, y in zip(*(torch.autograd.grad(loss, parameters) for loss in (actual, expected)), strict=True):
        assert (x - y).norm() <= TOLERANCE * y.norm() and y.any()


@pytest.mark.parametrize("method", ["mimic", "live", "m2iv"])
def test_the_teacher_has_no_dropout(method):
    """A Trainer puts all in training mode."""
    model = tiny_model("llava-llama").requires_grad_(False)
    adapter, batch = adapter_and_batch(model, method)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: F.dropout(out, 0.5, module.training)
    )
    seen = []
    with mk.attach(model, adapter) as handle:
        objective = objective_of(handle)
        head = model.lm_head.register_forward_hook(
            lambda module, args, out: None if torch.is_grad_enabled() else seen.append(args[0])
        )
        objective(batch)
        model.train()
        model.model.vision_tower.eval()
        modes = {name: module.training for name, module in model.named_modules()}
        objective(batch)
        head.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes
    calm, trained = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(calm) > 0 and all(torch.equal(x, y) for x, y in zip(calm, trained, strict=True))


def test_cross_entropy_ignores_what_has_no_label():
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[5, -100, 3, -100], [-100, 1, -100, 2]])
    terms = [(0, 1, 3), (1, 0, 1), (1, 2, 2)]  # the label at t is predicted at t - 1; 5 at 0 by nothing
    expected = sum(-F.log_softmax(logits[row, t], -1)[label] for row, t, label in terms) / 3
    rows = torch.stack([logits[row, t] for row, t, _ in terms])
    torch.testing.assert_close(answer_cross_entropy(rows, labels), expected)
    assert answer_cross_entropy(rows.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_is_needed(method):
    model = tiny_model("llava-llama")
    adapter, batch = adapter_and_batch(model, method)
    with mk.attach(model, adapter, placeholder_ids=(59, 58)) as handle:
        objective = objective_of(handle)
        with pytest.raises(ValueError, match="labels marks no token to predict, expected at least one"):
            objective(replace(batch, labels=torch.full_like(batch.labels, -100)))
        if method in ("mimic", "aim"):  # the others' labels must be the query's
            padded = batch.labels.clone()
            prompts = batch.queries if method == "aim" else batch.student
            first = int(prompts["attention_mask"][1].argmax())
            assert first > 0
            padded[1, first] = prompts["input_ids"][1, first]
            if method == "aim":
                batch = replace(batch, chosen=[[0], []])  # fused tokens would be before it
            with pytest.raises(ValueError, match=r"labels marks \[0, 1\] answer tokens per row right after"):
                objective(replace(batch, labels=padded))
        # What was spliced is forgotten after an error too: else a placeholder's id would be refused.
        model(input_ids=torch.tensor([[1, 59, 58, 5]]))


def test_mimics_answer_may_be_outside_of_what_is_aligned():
    model = tiny_model("llava-llama")
    adapter, batch = adapter_and_batch(model, "mimic")
    mine, theirs = batch.student_query.clone(), batch.teacher_query.clone()
    mine[:, -3:] = theirs[:, -3:] = False
    with mk.attach(model, adapter) as handle:
        whole, part = (
            objective_of(handle)(x) for x in (batch, replace(batch, student_query=mine, teacher_query=theirs))
        )
    assert torch.equal(whole.parts["ce"], part.parts["ce"])
    assert not torch.equal(whole.parts["align"], part.parts["align"])


def test_a_head_that_is_not_cut_is_an_error(monkeypatch):
    """As of a model that was compiled before the hook came."""
    model = tiny_model("llava-llama")
    batch = episode(model)
    rows = batch.labels != -100
    assert torch.equal(answer_logits(model, batch.student, rows), model(**batch.student).logits[rows])
    hooks = sum(len(x._forward_pre_hooks) for x in model.modules())
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Identity())
    with pytest.raises(RuntimeError, match=r"logits have shape \[2, 12, 64\], expected \[1, 6, V\]"):
        answer_logits(model, batch.student, rows)
    monkeypatch.undo()
    with pytest.raises(IndexError):
        answer_logits(model, {**batch.student, "input_ids": torch.full((2, 12), 10**6)}, rows)
    assert sum(len(x._forward_pre_hooks) for x in model.modules()) == hooks


def test_padding_between_tokens_predicts_nothing():
    """The last token before it does; where there is none the answer cannot be predicted."""
    tokens = torch.zeros(3, 8, dtype=torch.bool)
    tokens[0, 4:6] = tokens[1, 6:] = tokens[2, 5] = True
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, 3] = mask[1, 3:6] = mask[2, :2] = 0
    expected = torch.zeros_like(tokens)
    expected[0, [2, 4]] = expected[1, [2, 6]] = expected[2, 4] = True
    assert torch.equal(rows_before("labels", tokens, {"attention_mask": mask}), expected)
    shifted = F.pad(tokens[:, 1:], (0, 1))
    assert torch.equal(rows_before("labels", tokens, {"attention_mask": torch.ones_like(mask)}), shifted)
    assert torch.equal(rows_before("labels", tokens, {}), shifted)
    for places, count in ((slice(0, 5), "0, 0, 1"), (slice(0, 4), "1, 0, 0")):
        hidden = mask.clone()
        hidden[2 if count[-1] == "1" else 0, places] = 0
        with pytest.raises(ValueError, match=rf"labels marks \[{count}\] answer tokens per row right after"):
            rows_before("labels", tokens, {"attention_mask": hidden})


def test_the_loss_after_padding_is_that_without_it():
    model = tiny_model("llava-llama").double()
    batch = episode(model, batch=2)
    inputs, labels = batch.student, batch.labels
    cut = int((labels[0] != -100).nonzero()[0])

    def padded(x, value):
        return torch.cat([x[:, :cut], torch.full_like(x[:, :1], value), x[:, cut:]], 1)

    ids, mask = padded(inputs["input_ids"], 0), padded(inputs["attention_mask"], 0)
    positions = mask.cumsum(-1) - 1  # the same places for all that is seen
    wide = {**inputs, "input_ids": ids, "attention_mask": mask, "position_ids": positions}
    loss, expected = answer_loss(model, wide, padded(labels, -100)), answer_loss(model, inputs, labels)
    assert abs(loss - expected) <= TOLERANCE * expected
