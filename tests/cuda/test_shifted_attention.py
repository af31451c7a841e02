"""csrc/cuda's ``shifted_attention`` on the emulated device, whatever the order of its threads and copies."""

import functools
import itertools

import pytest
import torch

from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.testing.inputs import ints
from tests.cuda import emulated
from tests.ops.shifted_attention_grid import (
    assert_forward,
    assert_same_bits,
    assert_within,
    budget_of,
    case,
    ids_of,
    run,
)

HALF = (torch.float16, torch.bfloat16)
CAUSAL = {"causal": True}

# Blocks have 192 queries of D = 64, 128 of D = 128, and tiles 128 keys, which end at the block's last key.
GRID = {
    **{
        f"{name}_{D}": case(why, options, **{"H": 2, "G": 1, **sizes, "D": D})
        for D in (64, 128)
        for name, why, options, sizes in (
            ("plain", "less than a tile", {}, {}),
            ("causal", "the prompt of a decoder", CAUSAL, {}),
            ("tiles", "several tiles, two blocks, tails of both", CAUSAL, {"B": 1, "T": 201, "S": 333}),
            ("all", "the same without a mask", {}, {"B": 1, "T": 201, "S": 333}),
            ("exact", "no tails", CAUSAL, {"B": 1, "T": 384, "S": 384}),
            ("decode", "one query, the whole cache", CAUSAL, {"T": 1, "S": 263}),
            ("mha", "as many key heads as query heads", CAUSAL, {"H": 3, "G": 3, "T": 65, "S": 129}),
            ("gqa_7", "groups of seven", CAUSAL, {"B": 1, "H": 7, "G": 1, "T": 9}),
            ("keys", "five virtual keys of shared heads", CAUSAL, {"H": 4, "G": 2, "virtual": (2, 5)}),
            ("ids", "an adapter of each query, prefixes beside shifts",
             {**CAUSAL, "adapter_ids": ids_of(2, 37), "prefix": torch.tensor([True, False, True])},
             {"adapters": 3, "virtual": (2, 2)}),
            ("bounds", "rows of a cache", {**CAUSAL, "kv_start": ints(0, 140), "kv_end": ints(150, 300)},
             {"T": 5, "S": 300}),
            ("sliced", "odd offsets, which the tensor memory accelerator cannot map", CAUSAL,
             {"layout": "sliced", "T": 21}),
        )
    },
    **{
        name: case(why, options, **{"H": 2, "G": 1, "D": 64, **sizes})
        for name, why, options, sizes in (
            ("long", "blocks of unequal length, the stages many times over", CAUSAL,
             {"B": 1, "T": 450, "S": 900}),
            ("chunk", "aligned to the last key", CAUSAL, {"T": 5}),
            ("one", "softmax is 1", CAUSAL, {"T": 1, "S": 1}),
            ("more_queries", "more queries than keys", {}, {"T": 141, "S": 20}),
            ("more_queries_causal", "the first 270 see no key", CAUSAL, {"T": 290, "S": 20}),
            ("q_start_0", "static cache: keys after T are unused", {**CAUSAL, "q_start": 0}, {"T": 9}),
            ("q_start_7", "a chunk within the cache", {**CAUSAL, "q_start": 7}, {"T": 9, "S": 200}),
            ("q_start_negative", "five queries see no key", {**CAUSAL, "q_start": -5}, {}),
            ("q_start_far_left", "no query sees a key", {**CAUSAL, "q_start": -(2**29)}, {}),
            ("q_start_far_right", "causal hides nothing", {**CAUSAL, "q_start": 2**29}, {}),
            ("q_start_rows", "one position per row", {**CAUSAL, "q_start": ints(-4, 121).long()},
             {"T": 9, "S": 140}),
            ("q_start_ignored", "means nothing without causal", {"q_start": 3}, {}),
            ("kv_start", "left padding: blind queries", {**CAUSAL, "kv_start": ints(0, 9)}, {}),
            ("kv_end", "right padding", {"kv_end": ints(200, 20)}, {"S": 200}),
            ("kv_end_0", "an unused row", {**CAUSAL, "kv_end": ints(0, 37)}, {}),
            ("kv_crossed", "start after end: nothing", {"kv_start": ints(9, 0), "kv_end": ints(5, 30)}, {}),
            ("no_keys", "an empty cache", CAUSAL, {"S": 0}),
            ("no_batch", "an empty batch", {}, {"B": 0}),
            ("heads_last", "as q_proj leaves it", CAUSAL, {"layout": "heads_last"}),
            ("expanded", "one row for all beams: stride 0", CAUSAL, {"layout": "expanded"}),
            ("half_parameters", "parameters in bf16", {}, {"parameter_dtype": torch.bfloat16}),
            ("scale", "not the default", {**CAUSAL, "scale": 0.7}, {}),
            ("scale_large", "saturated softmax and gates", {**CAUSAL, "scale": 30.0}, {"T": 9, "S": 150}),
            ("ids_rows", "one per row", {"adapter_ids": ints(1, -1, 0)}, {"B": 3, "adapters": 2}),
            ("ids_none", "all off", {"adapter_ids": ints(-1, -1).long()}, {"adapters": 2}),
            ("ids_blind", "with queries that see no key",
             {**CAUSAL, "adapter_ids": ints(1, 0), "q_start": -5}, {"adapters": 2}),
            ("prefix_1", "one key of each head", {**CAUSAL, "prefix": True}, {}),
            ("prefix_33", "many, beside blind queries", {**CAUSAL, "prefix": True, "kv_start": ints(0, 9)},
             {"virtual": (1, 33)}),
        )
    },
}  # fmt: skip
TRAINED = ("tiles_128", "ids_64", "kv_start", "q_start_rows", "sliced_128", "prefix_33", "no_keys")


@functools.cache
def budget(name, dtype):
    return budget_of(GRID[name], dtype, "cpu", ways=(False, True) if name in TRAINED else (False,))


@pytest.fixture
def emulate():
    """Sets how the launches after it are run."""
    emulated.load()
    yield torch.ops.mmicl_cuda.emulate
    torch.ops.mmicl_cuda.emulate(0, "random")


@pytest.mark.parametrize("policy", emulated.POLICIES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", GRID)
def test_forward(name, dtype, policy, emulate):
    emulate(1, policy)
    assert_forward(budget(name, dtype), impl="cuda")


@pytest.mark.parametrize("through_lse", (False, True))
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name, dtype, through_lse, emulate):
    emulate(2, "random")
    assert_within(budget(name, dtype), "cuda", through_lse)


def test_every_order_gives_the_same_bits(emulate):
    inputs, arguments, douts, *_ = budget("tiles_128", torch.bfloat16)
    results = []
    for policy, seed in itertools.product(emulated.POLICIES, range(3)):
        emulate(seed, policy)
        results.append(run(inputs, arguments, douts, "cuda"))
    for result in results[1:]:
        assert_same_bits(results[0], result)


def test_what_lies_in_memory_after_the_keys_changes_nothing(emulate):
    """Copies of whole tiles read past a row's bounds: numbers of the next row, and zeros past the end."""
    case = GRID["bounds_64"]
    q, k, v, *parameters = case.inputs(torch.float16, "cpu")
    options = case.arguments(torch.float16, "cpu")
    expected = shifted_attention(q, k, v, *parameters, **options, impl="cuda")
    for b in range(2):
        for x in (k, v):
            x[b, :, : options["kv_start"][b]] = 60000
            x[b, :, options["kv_end"][b] :] = -60000
    assert torch.equal(shifted_attention(q, k, v, *parameters, **options, impl="cuda"), expected)


def test_compiled(emulate):
    inputs, arguments, *_ = budget("causal_64", torch.float16)

    def attend(*inputs):
        return shifted_attention(*inputs, **arguments, impl="cuda")

    assert torch.equal(torch.compile(attend, backend="eager", fullgraph=True)(*inputs), attend(*inputs))
