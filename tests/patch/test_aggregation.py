"""Demonstrations become fused tokens: whose hidden states, through which projection, with which gradients."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.aim.objective import AIMObjective
from mmicl_kernels.models.tokens import text_positions
from mmicl_kernels.testing.tiny_models import IMAGE_ID, TINY_MODELS, tiny_inputs, tiny_model
from mmicl_kernels.training import AggregationBatch, TrainingConfig, train, trainable
from tests.support.published import random_adapter

BOS, EOS = 1, 2
VISUAL = range(IMAGE_ID, 64)  # image tokens and those around them; no text of the tiny inputs has them


def demonstrations(model, batch=3):
    """Padded prompts with an image; one ends with the end of a text."""
    inputs = tiny_inputs(model, batch=batch, padding="right")
    inputs["input_ids"][0, -1] = EOS
    return inputs


def random_aim(model, **options):
    torch.manual_seed(3)
    adapter = mk.create(model, mk.AIMConfig(**options))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return adapter


@pytest.mark.parametrize("name", TINY_MODELS)
def test_text_positions(name):
    model = tiny_model(name)
    inputs = demonstrations(model)
    if name == "idefics":  # the image is not among the tokens, but its marker may be
        inputs["input_ids"][:, 1] = model.config.vocab_size + 1
    chosen = text_positions(model, inputs)
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], chosen, strict=True):
        last = max(i for i, token in enumerate(ids.tolist()) if token in VISUAL or token >= 64)
        expected = [i > last and bool(mask[i]) for i in range(len(ids))]
        assert row.tolist() == expected
        assert row.any()


def test_text_positions_without_an_image():
    model = tiny_model("llava-llama")
    ids = torch.tensor([[BOS, 5, 6, EOS]])
    assert text_positions(model, {"input_ids": ids}).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_tokens_are_projected_last_states(name, layer_norm):
    model = tiny_model(name)
    inputs, adapter = demonstrations(model), random_aim(model, layer_norm=layer_norm)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    with mk.attach(model, adapter) as handle:
        fused = handle.aggregate(inputs)
        assert handle.enabled
    positions = text_positions(model, inputs)
    fuser = adapter.fuser
    for tokens, row, chosen in zip(fused, states, positions, strict=True):
        expected = torch.nn.functional.linear(row[chosen], fuser.weight, fuser.bias)
        if layer_norm:
            expected = torch.nn.functional.layer_norm(expected, [32], fuser.norm_weight, fuser.norm_bias)
        torch.testing.assert_close(tokens, expected)


def test_demonstrations_are_read_alone_and_by_the_plain_model():
    model = tiny_model("llava-llama")
    inputs, adapter = demonstrations(model), random_aim(model)
    with mk.attach(model, adapter) as handle:
        together = handle.aggregate(inputs)
        alone = handle.aggregate({name: x[:1] for name, x in inputs.items()})
    torch.testing.assert_close(together[0], alone[0])
    with mk.attach(model, {"aim": adapter, "mimic": random_adapter(model)}) as handle, handle.rows("mimic"):
        for beside, expected in zip(handle.aggregate(inputs), together, strict=True):
            assert torch.equal(beside, expected)


@pytest.mark.parametrize("positions", ["answer", "answer_end"])
def test_answers_must_be_pointed_out(positions):
    model = tiny_model("llava-llama")
    inputs, adapter = demonstrations(model), random_aim(model, positions=positions)
    answers = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answers[:, 6:8] = True
    with mk.attach(model, adapter) as handle:
        assert [len(x) for x in handle.aggregate(inputs, answers)] == [2, 2, 2]
        with pytest.raises(ValueError, match=f"positions is None, .* fuses, '{positions}'"):
            handle.aggregate(inputs)
        for wrong in (answers[:, :-1], answers.int()):
            with pytest.raises(ValueError, match="positions is torch"):
                handle.aggregate(inputs, wrong)


def batch(model):
    queries = tiny_inputs(model, batch=2, padding="left")
    labels = torch.full_like(queries["input_ids"], -100)
    labels[:, -2:] = queries["input_ids"][:, -2:]
    return AggregationBatch(demonstrations(model), None, queries, labels, [[0, 2], [1, 1, 0]])


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_objective_and_its_gradients(name, checkpointing):
    """Against prompts whose embeddings are put together by hand."""
    model = tiny_model(name).requires_grad_(False)
    given, adapter = batch(model), random_aim(model)
    with mk.attach(model, adapter, placeholder_ids=(59, 58)) as handle:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        losses = AIMObjective(handle)(given)
        losses.total.backward()
    found = {name: x.grad.clone() for name, x in trainable(adapter).items()}
    adapter.zero_grad()
    model.eval()
    expected = by_hand(model, adapter, given)
    expected.backward()
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-6)
    for key, parameter in trainable(adapter).items():
        scale = float(parameter.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-4 * scale)


def by_hand(model, adapter, given):
    with torch.no_grad():
        states = model(**given.demonstrations, output_hidden_states=True).hidden_states[-1]
    positions = text_positions(model, given.demonstrations)
    fused = [
        torch.nn.functional.linear(row[chosen], adapter.fuser.weight, adapter.fuser.bias)
        for row, chosen in zip(states, positions, strict=True)
    ]
    total = []
    for r, chosen in enumerate(given.chosen):
        own = given.queries["attention_mask"][r].bool()
        prefix = torch.cat([fused[d] for d in chosen])
        inputs = {}
        for name, x in given.queries.items():
            if name == "pixel_values" or name == "image_grid_thw":
                rows = len(x) // 2  # Qwen's patches of both images lie in one dimension
                inputs[name] = x[r * rows : (r + 1) * rows]
            else:
                fill = {"input_ids": 5, "attention_mask": 1}.get(name, 0)
                before = torch.full((1, len(prefix), *x.shape[2:]), fill, dtype=x.dtype)
                inputs[name] = torch.cat([before, x[r : r + 1, own]], 1)

        def put(module, args, output, prefix=prefix):
            return torch.cat([prefix[None].to(output.dtype), output[:, len(prefix) :]], 1)

        hook = model.get_input_embeddings().register_forward_hook(put)
        logits = model(**inputs).logits
        hook.remove()
        labels = given.labels[r, own]
        scores = logits[0, len(prefix) :][:-1].float()
        kept = labels[1:] != -100
        total.append(torch.nn.functional.cross_entropy(scores[kept], labels[1:][kept], reduction="sum"))
    return sum(total) / sum(int((row[1:] != -100).sum()) for row in given.labels)


def test_training_moves_the_projection_alone():
    model = tiny_model("llava-llama")
    given, adapter = batch(model), mk.create(model, mk.AIMConfig())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with mk.attach(model, adapter) as handle:
        log = train(
            AIMObjective(handle), trainable(adapter), [given] * 60, 60, model=model,
            config=TrainingConfig(learning_rate=5e-2), progress=False,
        )  # fmt: skip
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_other_adapters_are_refused():
    model = tiny_model("llava-llama")
    with mk.attach(model, random_adapter(model)) as handle:
        with pytest.raises(ValueError, match="expected a single adapter of method 'aim'"):
            AIMObjective(handle)
        with pytest.raises(ValueError, match="none of the adapters .* fuses"):
            handle.aggregate(demonstrations(model))


def test_gradients_of_aggregation_reach_the_projection_alone():
    model = tiny_model("llava-llama").requires_grad_(True)
    adapter = random_aim(model)
    with mk.attach(model, adapter) as handle:
        torch.cat(handle.aggregate(demonstrations(model))).square().sum().backward()
    assert all(x.grad is None for x in model.parameters())
    assert all(x.grad is not None for x in adapter.parameters())


def test_demonstrations_are_read_in_eval_mode():
    model = tiny_model("llava-llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    adapter = random_aim(model)
    with mk.attach(model, adapter) as handle:
        expected = handle.aggregate(demonstrations(model))
        model.train()
        model.model.vision_tower.eval()
        modes = {name: module.training for name, module in model.named_modules()}
        for tokens, plain in zip(handle.aggregate(demonstrations(model)), expected, strict=True):
            assert torch.equal(tokens, plain)
        assert {name: module.training for name, module in model.named_modules()} == modes


def test_padding_cannot_be_fused():
    model = tiny_model("llava-llama")
    inputs = demonstrations(model)
    with mk.attach(model, random_aim(model)) as handle, pytest.raises(ValueError, match="marks padding"):
        handle.aggregate(inputs, torch.ones_like(inputs["input_ids"], dtype=torch.bool))
