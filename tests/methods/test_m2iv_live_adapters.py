"""M2IV's and LIVE's parameters: how they start, how many there are, and their files, bit for bit."""

import dataclasses
import json
import math

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods import ResidualSite
from mmicl_kernels.methods.base import CONFIG_FILE, TENSORS_FILE, Backbone
from mmicl_kernels.store import read_adapter
from mmicl_kernels.testing.tiny_models import tiny_model
from tests.store.vectors import assert_same

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CASES = {"m2iv": (mk.M2IVAdapter, mk.M2IVConfig), "live": (mk.LIVEAdapter, mk.LIVEConfig)}
CHANGED = {
    "m2iv": {"mimicry_weight": 0.25, "synergy_weight": 1 / 3, "ce_weight": 0.0, "temperature": 2.0,
             "synergy_of": "token", "gamma": 5e-4, "scale_learning_rate": 0.1},
    "live": {"site": "layer", "kl_weight": 0.5, "ce_weight": 1 / 3, "temperature": 0.5,
             "scale_learning_rate": 0.1},
}  # fmt: skip


def backbone(layers, hidden_size):
    return Backbone("Llava", "llava", "llama", hidden_size, "some/model", "abc", layers, (0.5, -1.25))


def adapter_of(method, *, layers=(0, 2, 5), hidden_size=64, **config):
    adapter, config_class = CASES[method]
    return adapter(config_class(**config), backbone({i: (4, 16) for i in layers}, hidden_size))


@pytest.fixture(params=list(CASES))
def method(request):
    return request.param


def vectors_and_scales(method, layer):
    shifts = (layer.attn, layer.mlp) if method == "m2iv" else (layer,)
    return [shift.vector for shift in shifts], [shift.scale for shift in shifts]


@pytest.mark.parametrize("name, count", [("m2iv", 262_208), ("live", 131_104)])
def test_parameter_count_is_the_papers(name, count):
    with torch.device("meta"):
        adapter = adapter_of(name, layers=range(32), hidden_size=4096)
    assert adapter.num_parameters() == count


def test_shapes(method):
    adapter = adapter_of(method)
    assert list(adapter.layers) == ["0", "2", "5"]
    for layer in adapter.layers.values():
        vectors, scales = vectors_and_scales(method, layer)
        assert {tuple(x.shape) for x in vectors} == {(64,)} and {tuple(x.shape) for x in scales} == {()}
        assert len(list(layer.parameters())) == len(vectors) + len(scales)
    assert all(x.dtype == torch.float32 and x.requires_grad for x in adapter.parameters())
    shapes = adapter.tensor_shapes(adapter.config, adapter.backbone)
    assert shapes == {name: tuple(x.shape) for name, x in adapter.state_dict().items()}


def test_initialisation(method):
    """Mean, standard deviation and fourth moment of N(0, 0.01) within five standard errors; scales 0.1."""
    adapter = adapter_of(method, layers=range(8), hidden_size=4096)
    parts = [vectors_and_scales(method, layer) for layer in adapter.layers.values()]
    values = torch.cat([x.detach() for vectors, _ in parts for x in vectors]).double()
    n = values.numel()
    assert abs(float(values.mean())) < 5 * 0.01 / math.sqrt(n)
    assert abs(float(values.std()) / 0.01 - 1) < 5 / math.sqrt(2 * n)
    assert abs(float((values / 0.01).pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert {x.item() for _, scales in parts for x in scales} == {torch.tensor(0.1).item()}
    assert len({float(x[0]) for vectors, _ in parts for x in vectors}) == n // 4096, "vectors are copies"


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load_bit_for_bit(tmp_path, method, dtype):
    adapter = adapter_of(method, **CHANGED[method]).to(dtype)
    adapter.save_pretrained(tmp_path)
    for loaded in (CASES[method][0].from_pretrained(tmp_path), read_adapter(tmp_path)):
        assert_same(loaded, adapter)
        assert list(loaded.state_dict()) == list(adapter.state_dict())
        assert all(x.requires_grad for x in loaded.parameters())
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert description["method"] == method
    assert description["config"] == CHANGED[method]


def test_another_methods_folder_is_refused(tmp_path, method):
    adapter_of(method).save_pretrained(tmp_path)
    other = {"m2iv": mk.LIVEAdapter, "live": mk.M2IVAdapter}[method]
    with pytest.raises(mk.CheckpointError, match=f"method '{method}', expected '{other.method}'"):
        other.from_pretrained(tmp_path)


@pytest.mark.parametrize("edit", [{"hidden_size": 32}, {"hidden_size": 2**70}])
def test_another_width_is_refused(tmp_path, method, edit):
    adapter_of(method).save_pretrained(tmp_path)
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    description["backbone"].update(edit)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(description))
    with pytest.raises(mk.CheckpointError, match=r"vector has shape \[64\], expected"):
        mk.load(tmp_path, tiny_model("llava-llama"))
    assert (tmp_path / TENSORS_FILE).is_file()


def test_defaults_are_those_of_the_design():
    assert dataclasses.asdict(mk.M2IVConfig()) == {
        "mimicry_weight": 1.0,
        "synergy_weight": 1.0,
        "synergy_of": "channel",
        "ce_weight": 0.5,
        "temperature": 1.0,
        "gamma": 1e-3,
        "scale_learning_rate": 1e-2,
    }
    assert dataclasses.asdict(mk.LIVEConfig()) == {
        "site": "mlp",
        "kl_weight": 1.0,
        "ce_weight": 0.5,
        "temperature": 1.0,
        "scale_learning_rate": 1e-2,
    }


@pytest.mark.parametrize("value", [True, "1", None])
def test_weights_are_numbers(value):
    for config in (mk.MimICConfig, mk.M2IVConfig, mk.LIVEConfig):
        with pytest.raises(TypeError, match=f"ce_weight is {value!r}, expected a number"):
            config(ce_weight=value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["mimicry_weight", "synergy_weight", "ce_weight", "gamma", "kl_weight"])
def test_bad_weights(name, value):
    for _, config in CASES.values():
        if name in {field.name for field in dataclasses.fields(config)}:
            with pytest.raises(
                ValueError, match=f"{name} is {value}, expected a finite number of at least 0"
            ):
                config(**{name: value})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("temperature", 0.0, r"temperature is 0\.0, expected a finite number above 0"),
        ("temperature", math.nan, "temperature is nan"),
        ("scale_learning_rate", -1e-2, r"scale_learning_rate is -0\.01"),
        ("scale_learning_rate", math.inf, "scale_learning_rate is inf"),
    ],
)
def test_bad_fields(method, name, value, message):
    with pytest.raises(ValueError, match=message):
        CASES[method][1](**{name: value})


def test_bad_words():
    with pytest.raises(ValueError, match=r"synergy_of is 'row', expected one of \('channel', 'token'\)"):
        mk.M2IVConfig(synergy_of="row")
    with pytest.raises(ValueError, match="site is 'self_attn', expected one of"):
        mk.LIVEConfig(site="self_attn")


@pytest.mark.parametrize("config", [mk.MimICConfig, mk.M2IVConfig, mk.LIVEConfig])
def test_configs_are_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().ce_weight = 2.0


def test_where_they_act():
    m2iv, live = adapter_of("m2iv"), adapter_of("live")
    after_attention, after_mlp = m2iv.residual_sites
    assert after_attention == ResidualSite("after_attention", False)
    assert after_mlp == ResidualSite("layer", False)
    layer = m2iv.layers["2"]
    assert m2iv.residual_shift(after_attention, "2") == (layer.attn.vector, layer.attn.scale)
    assert m2iv.residual_shift(after_mlp, "2") == (layer.mlp.vector, layer.mlp.scale)
    assert live.residual_sites == (ResidualSite("mlp", True),)
    assert adapter_of("live", site="layer").residual_sites == (ResidualSite("layer", True),)
    of = live.layers["5"]
    assert live.residual_shift(live.residual_sites[0], "5") == (of.vector, of.scale)
