"""A patched model saved, copied, pickled and exported."""

import copy
import io
from itertools import product

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

import mmicl_kernels as mk
from mmicl_kernels.patch.sites import hf_attention
from mmicl_kernels.store import DemonstrationBank
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.family_oracles import EVERY_METHOD, adapter_of, attached
from tests.patch.spliced_prompts import CHOSEN, PLACEHOLDERS, ordinary_tokens
from tests.support.published import logits, multiply

FAMILIES = ("llava-llama", "idefics2")
OF_EVERY_FAMILY = [
    pytest.param(name, method, marks=[] if name == "idefics2" else [pytest.mark.slow])
    for name, method in product(FAMILIES, EVERY_METHOD)
]


def attach(model, method, adapter):
    """A handle, and inputs on which the adapter acts."""
    inputs = tiny_inputs(model)
    if method not in ("aim", "prompt_tuning"):
        return mk.attach(model, adapter), inputs
    if method == "prompt_tuning":
        handle = mk.attach(model, adapter)
        return handle, handle.splice(inputs)
    tokens = ordinary_tokens(model)
    handle = mk.attach(model, adapter, placeholder_ids=PLACEHOLDERS)
    return handle, handle.splice(inputs, CHOSEN, tokens=tokens)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name, method", OF_EVERY_FAMILY)
def test_a_patched_model_saves_the_plain_one(name, method, tmp_path):
    model = tiny_model(name)
    inputs, state = tiny_inputs(model), dict(model.state_dict(keep_vars=True))
    plain = logits(model, inputs)
    model.save_pretrained(tmp_path / "plain")
    with attached(model, method, adapter_of(model, method)):
        model.save_pretrained(tmp_path / "patched")
        patched_state = dict(model.state_dict(keep_vars=True))
    expected, actual = (files_of(tmp_path / x) for x in ("plain", "patched"))
    assert actual == expected and {"config.json", "model.safetensors"} <= actual.keys()
    assert list(patched_state) == list(state)
    assert all(patched_state[key] is x for key, x in state.items())
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "patched"), inputs), plain)


def pickled(x):
    """By torch.save, and read where nothing of ours was used yet."""
    file = io.BytesIO()
    torch.save(x, file)
    AttentionInterface._global_mapping.pop(hf_attention.NAME, None)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = {"deepcopy": copy.deepcopy, "pickle": pickled}


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_copy_of_a_patched_model_is_patched_by_itself(method, copier):
    """Before its first forward pass: transformers then hangs hooks into a model that cannot be pickled."""
    model = tiny_model("idefics2")
    adapter = adapter_of(model, method)
    handle, inputs = attach(model, method, adapter)
    copied, copied_handle = COPIERS[copier]((model, handle))
    expected, plain = logits(model, inputs), logits(tiny_model("idefics2"), inputs)
    assert copied_handle.model is copied is not model
    assert torch.equal(logits(copied, inputs), expected) and not torch.equal(expected, plain)
    assert vars(copied_handle.adapters["default"].backbone) == vars(adapter.backbone)

    multiply(adapter, 2.0)
    handle.detach()
    assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(copied, inputs), expected)
    copied_handle.disable()
    assert torch.equal(logits(copied, inputs), plain)
    with pytest.raises(ValueError, match="patched already"):
        mk.attach(copied, adapter)
    copied_handle.enable()
    assert torch.equal(logits(copied, inputs), expected)
    copied_handle.detach()
    assert torch.equal(logits(copied, inputs), plain)
    mk.attach(copied, adapter).detach()


@pytest.mark.parametrize("name, method", OF_EVERY_FAMILY)
def test_a_copy_of_a_detached_model_is_plain(name, method):
    model = tiny_model(name)
    inputs = tiny_inputs(model)
    plain = logits(model, inputs)
    adapter = adapter_of(model, method)
    with attached(model, method, adapter) as prompts:
        logits(model, prompts(inputs))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, inputs), plain)
    assert not [x for x in vars(copied.config) if x.startswith("mmicl")]
    with attached(model, method, adapter) as prompts:
        expected = logits(model, prompts(inputs))
    with attached(copied, method, adapter) as prompts:
        assert torch.equal(logits(copied, prompts(inputs)), expected)


@pytest.mark.parametrize("copier", COPIERS)
def test_a_copied_handle_reads_the_same_bank(copier, tmp_path):
    model = tiny_model("idefics2")
    adapters = {"aim": adapter_of(model, "aim"), "mimic": adapter_of(model, "mimic")}
    bank = DemonstrationBank.create(tmp_path / "bank", adapters["aim"])
    copied = COPIERS[copier](mk.attach(model, adapters, bank=bank))
    assert copied.bank is not bank and copied.bank.folder == bank.folder
    assert copied.bank.digest == bank.digest == copied.adapters["aim"].digest()


@pytest.mark.parametrize("method, copier", product(EVERY_METHOD, COPIERS))
def test_adapters_are_copied(method, copier):
    adapter = adapter_of(tiny_model("llava-llama"), method)
    copied = COPIERS[copier](adapter)
    assert (copied.config, copied.backbone) == (adapter.config, adapter.backbone)
    state = copied.state_dict()
    assert state.keys() == adapter.state_dict().keys()
    for key, x in adapter.state_dict().items():
        assert torch.equal(state[key], x) and state[key].data_ptr() != x.data_ptr()


class Logits(nn.Module):
    """What is exported; ``adapter`` is among its parameters, for ``strict``."""

    def __init__(self, model, adapter):
        super().__init__()
        self.model, self.adapter = model, adapter

    def forward(self, **inputs):
        return self.model(**inputs, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("name", FAMILIES)
def test_exported_program(name, method, strict):
    model = tiny_model(name).requires_grad_(False)
    adapter = adapter_of(model, method)
    handle, inputs = attach(model, method, adapter)
    module = Logits(model, adapter)
    with torch.no_grad():
        expected = module(**inputs)
        program = torch.export.export(module, (), dict(inputs), strict=strict)
        handle.detach()
        assert not torch.equal(module(**inputs), expected)
        assert torch.equal(program.module()(**inputs), expected)
    if method == "aim":  # its tokens are constants of the program, for that prompt alone
        other = {**inputs, "input_ids": inputs["input_ids"].where(inputs["input_ids"] != 9, 10)}
        other["input_ids"][:, -1] = PLACEHOLDERS[0]
        with pytest.raises(RuntimeError, match="not those that the last splice"):
            program.module()(**other)
