"""Prompt tuning's parameters: how they start, how many there are, their files; what no config may have."""

import dataclasses
import json
import math

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.base import CONFIG_FILE
from mmicl_kernels.methods.sites import EmbeddingSite
from mmicl_kernels.store import read_adapter
from tests.methods.test_m2iv_live_adapters import DTYPES, backbone
from tests.store.vectors import assert_same


def adapter_of(hidden_size=64, **config):
    return mk.PromptTuningAdapter(
        mk.PromptTuningConfig(**config), backbone({i: (4, 16) for i in range(3)}, hidden_size)
    )


def test_parameters():
    with torch.device("meta"):
        assert adapter_of(4096).num_parameters() == 81_920
    adapter = adapter_of(num_tokens=7)
    assert not adapter.layers and adapter.learned_tokens() is adapter.tokens
    assert adapter.tensor_shapes(adapter.config, adapter.backbone) == {"tokens": (7, 64)}
    assert adapter.tokens.shape == (7, 64) and adapter.tokens.dtype == torch.float32


def test_initialisation():
    """Mean, standard deviation and fourth moment of N(0, std) within five standard errors."""
    for std in (0.02, 3.0):
        values = adapter_of(4096, std=std).tokens.detach().double() / std
        n = values.numel()
        assert abs(float(values.mean())) < 5 / math.sqrt(n)
        assert abs(float(values.std()) - 1) < 5 / math.sqrt(2 * n)
        assert abs(float(values.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert not adapter_of(std=0).tokens.any()


def test_where_it_acts():
    adapter = adapter_of()
    assert adapter.embedding_site == EmbeddingSite(positions=None)
    assert adapter.attention_site is None and adapter.residual_sites == ()
    assert not adapter.fuses and not adapter.has_strength
    assert mk.AIMAdapter(mk.AIMConfig(), adapter.backbone).fuses
    assert not mk.LIVEAdapter(mk.LIVEConfig(), adapter.backbone).fuses


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load_bit_for_bit(tmp_path, dtype):
    adapter = adapter_of(num_tokens=3, std=0.5).to(dtype)
    adapter.save_pretrained(tmp_path)
    for loaded in (mk.PromptTuningAdapter.from_pretrained(tmp_path), read_adapter(tmp_path)):
        assert_same(loaded, adapter)
        assert loaded.tokens.requires_grad
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert description["method"] == "prompt_tuning"
    assert description["config"] == {"num_tokens": 3, "std": 0.5}


def test_in_a_library(tmp_path):
    library = mk.VLibrary(tmp_path)
    for name in "ab":
        library.put(name, adapter_of())
    assert library.entry("a").method == "prompt_tuning"
    with pytest.raises(ValueError, match=r"prompt_tuning cannot be combined.*\['tokens'\]"):
        library.combine({"a": 1.0, "b": 1.0})


def test_defaults():
    assert dataclasses.asdict(mk.PromptTuningConfig()) == {"num_tokens": 20, "std": 0.02}
    with pytest.raises(dataclasses.FrozenInstanceError):
        mk.PromptTuningConfig().num_tokens = 2


BAD = [
    ({"num_tokens": 0}, ValueError, "num_tokens is 0, expected at least 1"),
    ({"num_tokens": -3}, ValueError, "num_tokens is -3, expected at least 1"),
    ({"num_tokens": True}, TypeError, "num_tokens is True, expected an int"),
    ({"num_tokens": 2.0}, TypeError, r"num_tokens is 2\.0, expected an int"),
    ({"num_tokens": "2"}, TypeError, "num_tokens is '2', expected an int"),
    ({"num_tokens": None}, TypeError, "num_tokens is None, expected an int"),
    ({"std": -0.5}, ValueError, r"std is -0\.5, expected a finite number of at least 0"),
    ({"std": math.nan}, ValueError, "std is nan"),
    ({"std": math.inf}, ValueError, "std is inf"),
    ({"std": "1"}, TypeError, "std is '1', expected a number"),
]


@pytest.mark.parametrize("given, error, message", BAD)
def test_bad_configs(given, error, message, tmp_path):
    """Refused where they are made and where they are read."""
    with pytest.raises(error, match=message):
        mk.PromptTuningConfig(**given)
    edit(tmp_path, given)
    with pytest.raises(mk.CheckpointError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("given", [{"num_tokens": 2**60}, {"num_tokens": 19}])
def test_a_file_of_another_size_is_refused(given, tmp_path):
    """Before anything of that size is made."""
    edit(tmp_path, given)
    with pytest.raises(mk.CheckpointError, match=r"tokens has shape \[20, 64\], expected"):
        read_adapter(tmp_path)


def edit(folder, given):
    adapter_of().save_pretrained(folder)
    description = json.loads((folder / CONFIG_FILE).read_text())
    description["config"].update(given)
    (folder / CONFIG_FILE).write_text(json.dumps(description))
