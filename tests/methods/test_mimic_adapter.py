"""MimIC's parameters: how they start, how many there are, and their two files, bit for bit."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import mmicl_kernels as mk
from mmicl_kernels.methods import base
from mmicl_kernels.methods.base import CONFIG_FILE, TENSORS_FILE, Backbone
from tests.store.vectors import assert_same, bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def backbone(layers, hidden_size=64, **fields):
    values = {
        "model_class": "LlavaForConditionalGeneration",
        "model_type": "llava",
        "text_model_type": "llama",
        "hidden_size": hidden_size,
        "name": "some/model",
        "revision": "abc",
        "layers": layers,
        "fingerprint": (0.5, -1.25, 3e-9),
    }
    return Backbone(**{**values, **fields})


UNEVEN = {0: (4, 16), 2: (8, 32), 5: (1, 40)}


def adapter_of(layers=UNEVEN, **config):
    return mk.MimICAdapter(mk.MimICConfig(**config), backbone(layers))


def test_parameter_count_is_the_papers():
    with torch.device("meta"):
        adapter = adapter_of({i: (32, 128) for i in range(32)})
    assert adapter.num_parameters() == 263_168


def test_layers_may_differ():
    adapter = adapter_of()
    assert list(adapter.layers) == ["0", "2", "5"]
    for index, (heads, dim) in UNEVEN.items():
        layer = adapter.layers[str(index)]
        assert isinstance(layer, mk.AttentionShift)
        assert [tuple(x.shape) for x in (layer.weight, layer.bias, layer.shift)] == [
            (heads, dim),
            (heads,),
            (heads, dim),
        ]
    assert all(x.dtype == torch.float32 and x.requires_grad for x in adapter.parameters())


@pytest.mark.parametrize("name, std", [("weight", 0.02), ("shift", 0.001)])
def test_initialisation(name, std):
    """Mean and standard deviation within five standard errors, and of the right shape (fourth moment)."""
    adapter = adapter_of({i: (32, 128) for i in range(8)})
    values = torch.cat([getattr(x, name).detach().flatten() for x in adapter.layers.values()]).double()
    n = values.numel()
    assert abs(float(values.mean())) < 5 * std / math.sqrt(n)
    assert abs(float(values.std()) / std - 1) < 5 / math.sqrt(2 * n)
    assert abs(float((values / std).pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert all(not x.bias.any() for x in adapter.layers.values())


def test_initialisation_follows_the_seed():
    torch.manual_seed(3)
    first = adapter_of()
    torch.manual_seed(3)
    assert_same(adapter_of(), first)
    assert not torch.equal(adapter_of().layers["0"].weight, first.layers["0"].weight)


def test_tensor_shapes_are_those_of_the_state_dict():
    for ffn_shift in (False, True):
        adapter = adapter_of(ffn_shift=ffn_shift)
        shapes = adapter.tensor_shapes(adapter.config, adapter.backbone)
        assert shapes == {name: tuple(x.shape) for name, x in adapter.state_dict().items()}
    assert shapes["ffn_shift"] == (3, 64)
    assert "ffn_shift" not in adapter_of().state_dict()


@pytest.mark.parametrize("ffn_shift", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load_bit_for_bit(tmp_path, dtype, ffn_shift):
    config = {"normalizer": "all_keys", "align": "layer", "align_weight": 0.1, "ce_weight": 1 / 3}
    adapter = adapter_of(ffn_shift=ffn_shift, **config).to(dtype)
    adapter.save_pretrained(tmp_path / "new" / "folder")
    loaded = mk.MimICAdapter.from_pretrained(tmp_path / "new" / "folder")
    assert_same(loaded, adapter)
    assert list(loaded.state_dict()) == list(adapter.state_dict())
    assert all(isinstance(x, torch.nn.Parameter) and x.requires_grad for x in loaded.parameters())
    assert sorted(x.name for x in (tmp_path / "new" / "folder").iterdir()) == [CONFIG_FILE, TENSORS_FILE]


def test_files_are_plain(tmp_path):
    adapter = adapter_of()
    adapter.layers["2"].shift.requires_grad_(False)
    adapter.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS_FILE)
    assert list(tensors) == sorted(adapter.state_dict())
    for name, x in adapter.state_dict().items():
        assert tensors[name].dtype == x.dtype and torch.equal(bits(tensors[name]), bits(x)), name
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert description == {
        "format_version": 1,
        "method": "mimic",
        "config": {
            "normalizer": "visible",
            "align": "mlp",
            "alignment": "relative",
            "align_weight": 1.0,
            "ce_weight": 0.5,
            "ffn_shift": False,
        },
        "backbone": {
            "model_class": "LlavaForConditionalGeneration",
            "model_type": "llava",
            "text_model_type": "llama",
            "hidden_size": 64,
            "name": "some/model",
            "revision": "abc",
            "layers": {"0": [4, 16], "2": [8, 32], "5": [1, 40]},
            "fingerprint": [0.5, -1.25, 3e-9],
        },
    }


def test_a_file_older_than_a_field_has_what_was_done_then(tmp_path):
    """It says how the adapter was trained, which today's default would not."""
    adapter_of().save_pretrained(tmp_path)
    file = tmp_path / CONFIG_FILE
    description = json.loads(file.read_text())
    del description["config"]["alignment"]
    file.write_text(json.dumps(description))
    assert mk.MimICAdapter.from_pretrained(tmp_path).config.alignment == "mean_square"


def test_saving_over_an_adapter(tmp_path):
    adapter_of().save_pretrained(tmp_path)
    second = adapter_of({0: (2, 8)}, normalizer="all_keys")
    second.save_pretrained(tmp_path)
    assert_same(mk.MimICAdapter.from_pretrained(tmp_path), second)


@pytest.mark.parametrize("fails", ["tensors", "json", "replace"])
def test_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch, fails):
    old = adapter_of()
    old.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*args, **kwargs):
        if fails == "tensors":
            (tmp_path / args[1]).write_bytes(b"half of i")
        raise KeyboardInterrupt

    if fails == "tensors":
        monkeypatch.setattr(base, "save_file", interrupted)
    elif fails == "json":
        monkeypatch.setattr(base.json, "dumps", interrupted)
    else:
        monkeypatch.setattr(base.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter_of({0: (2, 8)}, normalizer="all_keys").save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert_same(mk.MimICAdapter.from_pretrained(tmp_path), old)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("normalizer", "seen", "normalizer is 'seen', expected one of"),
        ("align", "attention", "align is 'attention', expected one of"),
        ("alignment", None, "alignment is None, expected one of"),
        ("align_weight", -1.0, r"align_weight is -1\.0"),
        ("align_weight", math.inf, "align_weight is inf"),
        ("ce_weight", math.nan, "ce_weight is nan"),
    ],
)
def test_bad_config(field, value, message):
    with pytest.raises(ValueError, match=message):
        mk.MimICConfig(**{field: value})


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "idefics2"}, ["model_type", "idefics2"]),
        ({"text_model_type": "qwen2"}, ["text_model_type", "qwen2"]),
        ({"hidden_size": 128}, ["hidden_size", "128"]),
        ({"layers": {0: (4, 16)}}, ["layers"]),
        ({"fingerprint": (0.5, -1.25, 1.0)}, ["weights", "some/model"]),
        ({"fingerprint": (0.5, -1.25)}, ["weights"]),
        ({"fingerprint": (math.nan, -1.25, 3e-9)}, ["weights"]),
    ],
)
def test_backbones_that_differ(fields, words):
    (difference,) = backbone(UNEVEN).differences(backbone(**{"layers": UNEVEN, **fields}))
    assert [word for word in words if word not in difference] == []
    (difference,) = backbone(**{"layers": UNEVEN, **fields}).differences(backbone(UNEVEN))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "a/copy", "revision": "def"},
        {"fingerprint": ()},
        {"fingerprint": (0.5 * (1 + 2**-9), -1.25, 3e-9)},  # a bf16 copy
    ],
)
def test_backbones_that_are_the_same(fields):
    assert backbone(UNEVEN).differences(backbone(UNEVEN, **fields)) == []
