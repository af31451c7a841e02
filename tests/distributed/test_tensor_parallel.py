"""Tensor parallelism of transformers: every process has some of the heads, or all of them."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed import DistributedConfig

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.models.parallel import local_heads
from mmicl_kernels.patch.sites.attention import PatchedLayer
from mmicl_kernels.testing.tiny_models import is_available, tiny_inputs, tiny_model
from tests.distributed.short_training import (
    adapter_of,
    assert_same_gradients,
    assert_same_logits,
    gradients,
    loss_of,
)
from tests.distributed.two_processes import WORLD_SIZE, two_processes
from tests.support.published import random_adapter

METHODS = ("mimic", "ffn_shift", "hificl", "stave", "m2iv", "live")
H, D = 4, 8
# Heads that an attention sees. Phi4 gathers what its one projection to queries, keys and values returns.
HEADS = {"llava-llama": 2, "idefics2": 2, "qwen2_vl": 2, "qwen2_5_vl": 2, "phi4_multimodal": 4}
FAST = ("llava-llama", "phi4_multimodal")
FAMILIES = [pytest.param(x, marks=[] if x in FAST else pytest.mark.slow) for x in HEADS if is_available(x)]


def tensor_parallel(model):
    """``model`` as ``from_pretrained(distributed_config=...)`` makes it, which needs accelerate."""
    config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=WORLD_SIZE))
    return type(model).maybe_distribute_model(copy.deepcopy(model), config, mesh)


def recorded_heads():
    """The heads of every call of a patched attention from now on."""
    seen, original = [], PatchedLayer.virtual_keys

    def virtual_keys(self, query):
        seen.append(query.shape[1])
        return original(self, query)

    PatchedLayer.virtual_keys = virtual_keys
    return seen


def with_swapped_shares(adapter):
    """As if each process took the other's heads."""
    swapped = copy.deepcopy(adapter)
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.copy_(parameter.roll(H // 2, 0))
    return swapped


@torch.no_grad()
def outputs(model, adapter, inputs):
    with mk.attach(model, adapter):
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)


def check_inference(family, whole, model, inputs):
    with torch.no_grad():
        plain = whole(**inputs).logits
    for method in METHODS:
        adapter = adapter_of(whole, method)
        expected, tokens = outputs(whole, adapter, inputs)
        seen = recorded_heads()
        actual, generated = outputs(model, adapter, inputs)
        assert set(seen) == ({HEADS[family]} if method in ("mimic", "ffn_shift", "hificl") else set())
        assert_same_logits(actual, expected)
        assert torch.equal(generated, tokens)
        assert (expected - plain).norm() > 0.01 * plain.norm()
        if method == "mimic":
            wrong, _ = outputs(whole, with_swapped_shares(adapter), inputs)
            assert (wrong - expected).norm() > 0.01 * expected.norm()
    with torch.no_grad():
        assert_same_logits(model(**inputs).logits, plain)


def check_gradients(whole, model, inputs):
    for method in METHODS:
        adapter = adapter_of(whole, method)
        found = []
        for one in (model, whole):
            adapter.zero_grad()
            with mk.attach(one, adapter) as handle:
                loss_of(one, handle, inputs).backward()
            found.append(gradients(adapter))
        assert_same_gradients(*found)


def assert_sharded(model):
    projections = [anchor.projection.weight for anchor in find_anchors(model)]
    for weight in projections:
        assert isinstance(weight, DTensor)
        assert weight.to_local().shape[1] == weight.shape[1] // WORLD_SIZE


@pytest.mark.parametrize("family", FAMILIES)
@two_processes
def test_logits_tokens_and_gradients(rank, family):
    whole = tiny_model(family).requires_grad_(False)
    inputs = tiny_inputs(whole, padding="left")
    model = tensor_parallel(whole)
    assert_sharded(model)
    check_inference(family, whole, model, inputs)
    check_gradients(whole, model, inputs)


@two_processes
def test_rows(rank):
    whole = tiny_model("llava-llama").requires_grad_(False)
    inputs = tiny_inputs(whole, batch=4, length=16, padding="left")
    adapters = {method: adapter_of(whole, method) for method in METHODS}
    adapters["b"] = random_adapter(whole, seed=1)
    rows = ["mimic", None, ("m2iv", "live"), {"b": 1.0, "m2iv": -0.5}]
    model = tensor_parallel(whole)
    found = []
    for one in (model, whole):
        with mk.attach(one, adapters) as handle, handle.rows(rows):
            with torch.no_grad():
                frozen = one(**inputs).logits
            logits = one(**inputs).logits
            logits.square().sum().backward()
        found.append((frozen, logits, gradients(adapters["b"])))
        adapters["b"].zero_grad()
    assert_same_logits(found[0][0], found[1][0])
    assert_same_logits(found[0][1], found[1][1])
    assert_same_gradients(found[0][2], found[1][2])


@two_processes
def test_fused_tokens(rank):
    whole = tiny_model("llava-llama").requires_grad_(False)
    inputs = tiny_inputs(whole, padding="left")
    adapter, model = adapter_of(whole, "aim"), tensor_parallel(whole)
    tokens = FusedTokens(torch.randn(5, whole.config.text_config.hidden_size), torch.tensor([0, 2, 5]), None)
    found = []
    for one in (model, whole):
        with torch.no_grad(), mk.attach(one, adapter) as handle:
            fused = torch.cat(handle.aggregate(inputs))
            found.append((fused, one(**handle.splice(inputs, [[0], [1, 0]], tokens=tokens)).logits))
    for actual, expected in zip(*found, strict=True):
        assert_same_logits(actual, expected)


def projection_on(mesh, placements):
    projection = nn.Linear(H * D, 3, bias=False)
    projection.weight = nn.Parameter(distribute_tensor(projection.weight, mesh, placements))
    return projection


@two_processes
def test_local_heads(rank):
    shift = torch.arange(5.0 * H * D).view(5, H, D)
    parameters = [shift, shift[..., 0], -shift]
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    mine = slice(2 * rank, 2 * rank + 2)
    for mesh, placements in ((line, [Shard(1)]), (square, [Replicate(), Shard(1)])):
        projection = projection_on(mesh, placements)
        for gradient in (False, True):
            with torch.set_grad_enabled(gradient):
                weight, bias, negative = local_heads(parameters, 1, 2, H, projection)
            assert type(weight) is torch.Tensor
            assert torch.equal(weight, shift[:, mine])
            assert torch.equal(bias, shift[:, mine, 0])
            assert torch.equal(negative, -shift[:, mine])
        with pytest.raises(NotImplementedError, match="1 of its 4 heads, expected 4 / 2"):
            local_heads(parameters, 1, 1, H, projection)


def test_all_heads_need_no_projection():
    parameters = [torch.ones(H, D), torch.ones(H), torch.ones(H, D)]
    assert local_heads(parameters, 0, H, H, nn.Identity()) is parameters
    with pytest.raises(NotImplementedError, match="2 of its 4 heads.*is a Parameter, expected a DTensor"):
        local_heads(parameters, 0, 2, H, nn.Linear(H * D, 3))
