"""HiFICL: its parameters, its formula in a patched model, rows beside MimIC's, official checkpoints."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from transformers import AttentionInterface

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.support.published import additive_mask, random_adapter, whole_logits

SAME = {"rtol": 32 * torch.finfo(torch.float32).eps, "atol": 32 * torch.finfo(torch.float32).eps}


@pytest.fixture
def model():
    return tiny_model("llava-llama")


def hificl(model, seed=0, **config):
    """One whose values are not 0."""
    torch.manual_seed(seed)
    adapter = mk.create(model, mk.HiFICLConfig(**config))
    for layer in adapter.layers.values():
        layer["key_b"].data *= 30
        layer["value_b"].data.normal_()
    return adapter


@contextmanager
def written_out(model, adapter):
    """The model with HiFICL as section 3.2 has it, in an attention function of its own."""
    config = adapter.config

    def attention(self, query, key, value, attention_mask, scaling, **_):
        own = adapter.layers[str(self.layer_idx)]
        K, V = own["key_a"] @ own["key_b"], own["value_a"] @ own["value_b"]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = query @ key.mT * scaling
        masked = scores + additive_mask(attention_mask, scores)
        blind = (masked == -torch.inf).all(-1, keepdim=True)
        t = (query @ K.mT * K.shape[-1] ** -0.5).exp()
        z2 = (scores if config.normalizer == "all_keys" else masked.masked_fill(blind, 0)).exp()
        z1, z2 = t.sum(-1, keepdim=True), z2.sum(-1, keepdim=True)
        attended = torch.softmax(masked.masked_fill(blind, 0.0), -1) @ value
        kept = z2 / (z1 + z2) if config.prefix else 1
        out = (kept * attended + t / (z1 + z2) @ V).masked_fill(blind, 0.0)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("written_out", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation({"text_config": "written_out"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


@pytest.mark.parametrize("normalizer", ("visible", "all_keys"))
@pytest.mark.parametrize("prefix", (True, False))
def test_a_patched_model_is_the_formula(model, prefix, normalizer):
    adapter, inputs = hificl(model, num_keys=3, prefix=prefix, normalizer=normalizer), tiny_inputs(model)
    attended = inputs["attention_mask"].bool()
    plain = whole_logits(model, inputs)
    with torch.no_grad(), written_out(model, adapter):
        expected = whole_logits(model, inputs)
    with mk.attach(model, adapter):
        actual = whole_logits(model, inputs)
    torch.testing.assert_close(actual[attended], expected[attended], **SAME)
    assert not torch.equal(actual, plain)


def test_parameters(model):
    adapter = mk.create(model, mk.HiFICLConfig(num_keys=5, rank=2))
    heads, dim = next(iter(adapter.backbone.attention_layers.values()))
    for layer in adapter.layers.values():
        assert layer["key_a"].shape == layer["value_a"].shape == (heads, 5, 2)
        assert layer["key_b"].shape == layer["value_b"].shape == (heads, 2, dim)
        assert not layer["value_b"].any() and 0.005 < layer["key_b"].std() < 0.02
    assert {name: tuple(x.shape) for name, x in adapter.state_dict().items()} == adapter.tensor_shapes(
        adapter.config, adapter.backbone
    )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_keys": 0}, ValueError, "num_keys is 0, expected at least 1"),
        ({"rank": 2.0}, TypeError, "rank is 2.0, expected an int"),
        ({"prefix": 1}, TypeError, "prefix is 1, expected True or False"),
        ({"normalizer": "some"}, ValueError, "normalizer is 'some'"),
    ],
)
def test_bad_configs(fields, error, message):
    with pytest.raises(error, match=message):
        mk.HiFICLConfig(**fields)


def test_rows_beside_other_methods(model):
    """Slots of one virtual key, of three and of five, prefixes and shifts, in one batch."""
    adapters = {
        "shift": random_adapter(model),
        "three": hificl(model, num_keys=3),
        "one": hificl(model, seed=2, num_keys=1),
        "five": hificl(model, seed=1, num_keys=5, prefix=False),
    }
    inputs = tiny_inputs(model)
    inputs = {name: torch.cat((x, x)) for name, x in inputs.items()}
    names, attended = ["five", "one", "three", "shift"], inputs["attention_mask"].bool()
    alone = {None: whole_logits(model, inputs)}
    for name, adapter in adapters.items():
        with mk.attach(model, adapter):
            alone[name] = whole_logits(model, inputs)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    with mk.attach(model, adapters, slots=4) as handle, handle.rows(names):
        actual = whole_logits(model, inputs)
        torch.testing.assert_close(actual[attended], expected[attended], **SAME)
        handle.rows(["shift"] * 4)
        torch.testing.assert_close(whole_logits(model, inputs)[attended], alone["shift"][attended], **SAME)


def test_an_adapter_of_more_keys_joins(model):
    inputs = tiny_inputs(model)
    first, second = hificl(model, num_keys=2), hificl(model, seed=1, num_keys=6)
    with mk.attach(model, second):
        expected = whole_logits(model, inputs)
    with mk.attach(model, {"first": first}, slots=2) as handle:
        handle.rows("first").close()
        handle.add("second", second)
        with handle.rows("second"):
            actual = whole_logits(model, inputs)
    attended = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[attended], expected[attended], **SAME)


@pytest.mark.parametrize("in_rows", (False, True))
def test_changes_are_seen(model, in_rows):
    """Those that torch does not count, too: by a fused optimizer after a step, through ``.data`` at once."""
    adapter, inputs = hificl(model), tiny_inputs(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    attended = inputs["attention_mask"].bool()
    found = []
    with mk.attach(model, adapter) as handle:
        if in_rows:
            handle.rows("default")
        found.append(whole_logits(model, inputs)[attended])
        model(**inputs).logits.square().sum().backward()
        optimizer.step()
        found.append(whole_logits(model, inputs)[attended])
        alone = copy.deepcopy(adapter)
        adapter.layers["0"]["value_b"].data.mul_(2)
        found.append(whole_logits(model, inputs)[attended])
    for expected, same in ((found[1], alone), (found[2], copy.deepcopy(adapter))):
        with mk.attach(model, same):
            torch.testing.assert_close(whole_logits(model, inputs)[attended], expected, **SAME)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_autocast_does_not_reach_the_factors(model):
    adapter = hificl(model).bfloat16().float()
    expected = adapter.attention_shift("0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = adapter.attention_shift("0")
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_factors_of_other_dtypes(model):
    adapter = hificl(model)
    adapter.layers["0"]["value_a"].data = adapter.layers["0"]["value_a"].data.half()
    assert [x.dtype for x in adapter.attention_shift("0")] == [torch.float32] * 3


def test_gradients_reach_all_factors(model):
    adapter = hificl(model)
    with mk.attach(model, adapter):
        model(**tiny_inputs(model)).logits.square().sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in adapter.parameters())


def test_official_checkpoints(model, tmp_path):
    adapter = hificl(model, num_keys=3, rank=2, normalizer="all_keys")
    path = tmp_path / "encoder.pth"
    mk.save_official(adapter, path)
    encoder = torch.load(path, weights_only=True)
    layers, (heads, dim) = adapter.backbone.layers, next(iter(adapter.backbone.layers.values()))
    assert {name: tuple(x.shape) for name, x in encoder.items()} == {
        "K_learn_A": (len(layers), heads, 3, 2),
        "K_learn_B": (len(layers), heads, 2, dim),
        "V_learn_A": (len(layers), heads, 3, 2),
        "V_learn_B": (len(layers), heads, 2, dim),
    }
    read = mk.load_official(path, model)
    assert read.config == adapter.config
    for name, x in adapter.state_dict().items():
        assert torch.equal(read.state_dict()[name], x)

    with pytest.raises(ValueError, match="expected normalizer='all_keys'"):
        mk.save_official(hificl(model), path)
    for wrong, message in (
        ({**encoder, "other": encoder["K_learn_A"]}, re.escape("has ['other']")),
        ({"K_learn_A": encoder["K_learn_A"]}, "lacks"),
        ({**encoder, "K_learn_A": encoder["K_learn_A"][:, :, :0]}, "K_learn_A has shape .*expected keys"),
        ({**encoder, "K_learn_A": encoder["K_learn_A"][0]}, "K_learn_A has shape"),
        ({**encoder, "V_learn_B": encoder["V_learn_B"][..., 1:]}, "V_learn_B has shape"),
        ({**encoder, "V_learn_B": encoder["V_learn_B"] / 0}, "V_learn_B is not a tensor of finite"),
    ):
        torch.save(wrong, path)
        with pytest.raises(mk.CheckpointError, match=message):
            mk.load_official(path, model)


def test_one_virtual_key_beside_a_shift(model):
    """Neither form is the other's shape, though both have one key."""
    inputs = tiny_inputs(model)
    adapters = {"shift": random_adapter(model), "one": hificl(model, num_keys=1)}
    expected = []
    for row, adapter in enumerate(adapters.values()):
        with mk.attach(model, adapter):
            expected.append(whole_logits(model, inputs)[row])
    with mk.attach(model, adapters) as handle, handle.rows(list(adapters)):
        actual = whole_logits(model, inputs)
    attended = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[attended], torch.stack(expected)[attended], **SAME)
