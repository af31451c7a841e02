"""Adapters as they are made: in fp32, on the model's devices, whatever torch's defaults; whose they are."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.models.anchors import known_type
from mmicl_kernels.testing.tiny_models import is_available, tiny_inputs, tiny_model
from tests.patch.family_oracles import EVERY_METHOD
from tests.support.published import logits, random_adapter
from tests.support.residuals import random_shift

CONFIGS = {
    "mimic": mk.MimICConfig(ffn_shift=True),
    "m2iv": mk.M2IVConfig(),
    "live": mk.LIVEConfig(),
    "aim": mk.AIMConfig(layer_norm=True),
    "prompt_tuning": mk.PromptTuningConfig(),
    "hificl": mk.HiFICLConfig(),
    "stave": mk.STAVEConfig(),
}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp16": lambda: default_dtype(torch.float16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_defaults_do_not_matter(method, default, tmp_path):
    model = tiny_model("llava-llama")
    made = []
    for context in (nullcontext, DEFAULTS[default]):
        torch.manual_seed(0)
        with context():
            made.append(mk.create(model, CONFIGS[method]))
    expected, actual = (dict(x.named_parameters()) for x in made)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert x.dtype == torch.float32 and x.device.type == "cpu" and x.requires_grad
        assert torch.equal(x, expected[name]), name
    made[1].save_pretrained(tmp_path)
    with DEFAULTS[default]():
        loaded = mk.load(tmp_path, model)
    for name, x in loaded.named_parameters():
        assert x.dtype == torch.float32 and torch.equal(x, expected[name]), name


@pytest.mark.parametrize("default", DEFAULTS)
def test_official_files_under_other_defaults(default, tmp_path):
    model = tiny_model("llava-llama")
    adapter = random_adapter(model, normalizer="all_keys")
    mk.save_official(adapter, tmp_path / "encoder.pth")
    with DEFAULTS[default]():
        loaded = mk.load_official(tmp_path / "encoder.pth", model)
    for (name, x), y in zip(loaded.named_parameters(), adapter.parameters(), strict=True):
        assert x.device.type == "cpu" and torch.equal(x, y), name


def test_an_adapter_of_a_model_on_meta_is_there_too():
    with torch.device("meta"):
        model = type(tiny_model("llava-llama"))(tiny_model("llava-llama").config)
    adapter = mk.create(model, mk.MimICConfig())
    assert {x.device.type for x in adapter.parameters()} == {"meta"}
    assert adapter.backbone.fingerprint == ()


HEADLESS = [
    name
    for name in ("llava-llama", "idefics2", "qwen2_5_vl", "gemma3", "llama", "mllama")
    if is_available(name)
]


def saved(model, adapter, folder):
    adapter.save_pretrained(folder)
    with mk.attach(model, adapter):
        return logits(model, tiny_inputs(model))


@pytest.mark.parametrize("method", ["mimic", "m2iv"])
def test_a_subclass_loads_its_parents_adapters(method, tmp_path):
    model = tiny_model("llava-llama")
    adapter = {"mimic": random_adapter, "m2iv": random_shift}[method](model)
    expected = saved(model, adapter, tmp_path)

    class Mine(type(model)):
        pass

    class MyOwn(Mine):
        pass

    for subclass in (Mine, MyOwn):
        mine = subclass(model.config).eval()
        mine.load_state_dict(model.state_dict())
        with mk.attach(mine, mk.load(tmp_path, mine)):
            assert torch.equal(logits(mine, tiny_inputs(model)), expected)
        back = mk.create(mine, mk.M2IVConfig())
        assert back.backbone.differences(adapter.backbone) == []
    other = Mine(model.config)  # other weights
    with pytest.raises(mk.CheckpointError, match="weights are not those the adapter was trained on"):
        mk.load(tmp_path, other)


@pytest.mark.parametrize("method", ["mimic", "m2iv", "live", "aim"])
@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_without_its_head(name, method, tmp_path):
    """What returns hidden states alone has the same decoder."""
    model = tiny_model(name).requires_grad_(False)
    make = {"mimic": random_adapter, "m2iv": random_shift, "live": lambda m: random_shift(m, mk.LIVEConfig())}
    adapter = make.get(method, lambda m: mk.create(m, mk.AIMConfig()))(model)
    adapter.save_pretrained(tmp_path)
    headless, inputs = model.base_model, tiny_inputs(model)
    assert headless is not model
    loaded = mk.load(tmp_path, headless)
    assert loaded.backbone.layers == mk.create(headless, adapter.config).backbone.layers
    with torch.no_grad():
        if method == "aim":
            with mk.attach(model, adapter) as handle:
                expected = handle.aggregate(inputs)
            with mk.attach(headless, loaded) as handle:
                actual = handle.aggregate(inputs)
            assert all(map(torch.equal, actual, expected)) and len(actual) == 2
            return
        with mk.attach(model, adapter):
            expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
        plain = headless(**inputs).last_hidden_state
        with mk.attach(headless, loaded):
            actual = headless(**inputs).last_hidden_state
    assert torch.equal(actual, expected) and not torch.allclose(actual, plain)


def test_a_users_own_config_class(tmp_path):
    """Its family is that of what it was made from; transformers' own classes are looked up by themselves."""
    model = tiny_model("llava-llama")
    adapter = random_adapter(model)
    expected = saved(model, adapter, tmp_path)

    class Config(type(model.config)):
        model_type = "my_llava"

    class Further(Config):
        pass

    class Mine(type(model)):
        config_class = Further

    described = {key: x for key, x in model.config.to_dict().items() if key != "model_type"}
    mine = Mine(Further(**described)).eval()
    mine.load_state_dict(model.state_dict())
    assert mine.config.model_type == "my_llava"
    with mk.attach(mine, mk.load(tmp_path, mine)):
        assert torch.equal(logits(mine, tiny_inputs(model)), expected)
    assert known_type(model.config, {"my_llava": None}) == "llava"
    theirs = type(
        "Theirs", (type(model.config),), {"model_type": "new", "__module__": "transformers.models.new"}
    )
    assert known_type(theirs(), {"llava": None}) == "new"
