"""The Triton kernels of ``shifted_attention`` at the sizes of models: on a GPU, or compiled for one.

Every shape is a test of its own, so that the first run on a GPU says which kernel fails at which; without a
GPU ``test_launches_compile`` (slow) compiles all that they would launch.
"""

import functools
import importlib

import pytest
import torch

pytest.importorskip("triton")

from torch.profiler import ProfilerActivity  # noqa: E402

from mmicl_kernels.ops import shifted_attention  # noqa: E402
from mmicl_kernels.ops.attention_shift._triton import bwd as shift_kernels  # noqa: E402
from mmicl_kernels.ops.shifted_attention._triton import bwd, fwd, launch  # noqa: E402
from mmicl_kernels.testing.cross_compile import SHARED_MEMORY, compiling_for  # noqa: E402
from mmicl_kernels.testing.inputs import normal, output_gradients, shifted_attention_inputs  # noqa: E402
from tests.ops.shifted_attention_grid import (  # noqa: E402
    NAMES,
    assert_forward,
    assert_same_bits,
    assert_within,
    budget_of,
    case,
    ints,
    keep,
    run,
)
from tests.ops.shifted_attention_launches import COMBINE, DELTA, DKDV, DQ, FORWARD, names, note_launches  # noqa: E402
from tests.ops.test_compiled_ops import same_when_compiled  # noqa: E402
from tests.ops.triton_process import assert_no_synchronisation, captured, compiles  # noqa: E402

# By name: as attributes of mmicl_kernels.ops, packages give way to the ops they hold.
api = importlib.import_module("mmicl_kernels.ops.shifted_attention.api")
pytestmark = compiles
gpu = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
HALF = (BF16, FP16)
CUDA = "cuda"

RAGGED = {
    "cu_seqlens_q": ints(0, 300, 301, 301, 1301, 1500), "cu_seqlens_k": ints(0, 300, 800, 812, 1812, 2100),
    "max_seqlen_q": 1000, "max_seqlen_k": 1000, "causal": True,
}  # fmt: skip
PACKED_DECODE = {
    "cu_seqlens_q": ints(0, 1, 2, 4), "cu_seqlens_k": ints(0, 1000, 1007, 5000), "max_seqlen_q": 2,
    "max_seqlen_k": 3993, "causal": True, "adapter_ids": ints(1, -1, 0),
}  # fmt: skip
IDEFICS2 = {"H": 32, "G": 8, "D": 128, "layout": "heads_last"}
PREFILLS = {
    "idefics2": case("Idefics2-8B", {"causal": True}, B=1, T=1000, S=1000, **IDEFICS2),
    "idefics2_4k": case("a 32-shot prompt", {"causal": True}, B=1, H=8, G=2, T=4097, S=4097, D=128),
    "idefics": case("Idefics-9B", {"causal": True}, B=1, H=32, G=32, T=500, S=500, D=128),
    "qwen": case("groups of seven", {"causal": True}, B=1, H=28, G=4, T=1000, S=1000, D=128),
    "d64": case("SmolVLM", {"causal": True}, B=2, H=9, G=3, T=1000, S=1000, D=64),
    "d64_all_keys": case("cross attention", {}, B=1, H=8, G=8, T=500, S=1000, D=64),
    "d80": case("padded head dim", {"causal": True}, B=1, H=8, G=8, T=500, S=500, D=80),
    "d96": case("padded head dim", {"causal": True}, B=1, H=32, G=32, T=500, S=500, D=96),
    "d256": case("Gemma", {"causal": True}, B=1, H=8, G=4, T=1000, S=1000, D=256),
    "left_padded": case("a batch", {"causal": True, "kv_start": ints(0, 301)},
                        B=2, T=1000, S=1000, **IDEFICS2),
    "static_cache": case("its prefill", {"causal": True, "q_start": 0, "kv_end": ints(500, 377)},
                         B=2, T=500, S=1500, **IDEFICS2),
    "window": case("Mistral", {"causal": True, "window": 256}, B=1, T=1000, S=1000, **IDEFICS2),
    "softcap": case("Gemma 2", {"causal": True, "softcap": 50.0}, B=1, H=8, G=4, T=500, S=500, D=256),
    "mask": case("any pattern", {"mask": keep(1, 1, 500, 500)}, B=1, T=500, S=500, **IDEFICS2),
    "bias": case("ALiBi", {"mask": lambda dtype: normal(1, 8, 500, 500, dtype=dtype), "causal": True},
                 B=1, H=8, G=8, T=500, S=500, D=128),
    "all_keys": case("the official gate", {"causal": True, "normalizer": "all_keys"},
                     B=1, T=500, S=500, **IDEFICS2),
    "ids": case("mixed adapters", {"causal": True, "adapter_ids": ints(1, -1, 0)}, adapters=2,
                B=3, T=500, S=500, **IDEFICS2),
    "packed": case("ragged, one without queries", RAGGED, B=1, H=32, G=8, T=1500, S=2100, D=128),
    "unaligned": case("rows that TMA refuses", {"causal": True}, B=1, H=8, G=2, T=500, S=500, D=128,
                      layout="sliced"),
}  # fmt: skip
LONG = {"causal": True, "kv_end": ints(5000, 4999)}
DECODES = {
    "idefics2": case("split keys", LONG, B=2, T=1, S=5000, **IDEFICS2),
    "idefics": case("one head per key head", LONG, B=2, H=32, G=32, T=1, S=5000, D=128),
    "qwen": case("groups of seven", LONG, B=2, H=28, G=4, T=1, S=5000, D=128),
    "short_of_a_long_cache": case("parts without keys", {"causal": True, "kv_end": ints(70, 3)},
                                  B=2, T=1, S=5000, **IDEFICS2),
    "batch": case("enough programs without a split", {"causal": True}, B=64, T=1, S=500, **IDEFICS2),
    "short": case("too few keys to split", {"causal": True}, B=1, T=1, S=200, **IDEFICS2),
    "speculated": case("eight tokens", LONG, B=2, T=8, S=5000, **IDEFICS2),
    "speculated_16": case("a full tile", LONG, B=2, T=16, S=5000, **IDEFICS2),
    "d64": case("SmolVLM", LONG, B=2, H=9, G=3, T=1, S=5000, D=64),
    "d96": case("padded head dim", LONG, B=2, H=32, G=32, T=1, S=5000, D=96),
    "d256": case("Gemma", LONG, B=2, H=8, G=4, T=1, S=5000, D=256),
    "window": case("Mistral", {**LONG, "window": 4096}, B=2, T=1, S=5000, **IDEFICS2),
    "softcap": case("Gemma 2", {**LONG, "softcap": 50.0}, B=2, H=8, G=4, T=1, S=5000, D=256),
    "all_keys": case("the official gate", {**LONG, "normalizer": "all_keys"}, B=2, T=4, S=5000, **IDEFICS2),
    "bias": case("a mask of floats", {"mask": lambda dtype: normal(2, 1, 1, 5000, dtype=dtype)},
                 B=2, T=1, S=5000, **IDEFICS2),
    "ids": case("mixed adapters", {**LONG, "adapter_ids": ints(1, -1)}, adapters=2,
                B=2, T=1, S=5000, **IDEFICS2),
    "packed": case("mixed lengths", PACKED_DECODE, adapters=2, B=1, H=32, G=8, T=4, S=5000, D=128),
}  # fmt: skip

prefills = pytest.mark.parametrize("name", PREFILLS)
decodes = pytest.mark.parametrize("name", DECODES)
halves = pytest.mark.parametrize("dtype", HALF, ids=("bf16", "fp16"))


@pytest.fixture
def launches(monkeypatch):
    return note_launches(monkeypatch)


def arguments_of(given, dtype=BF16, device=CUDA):
    """Inputs, options and the gradients of the outputs of one of the above."""
    inputs = given.inputs(dtype, device)
    douts = output_gradients(*inputs[0].shape, dtype=dtype, device=device)
    return inputs, given.arguments(dtype, device), douts


# ---- values ----


@gpu
@halves
@prefills
def test_prefill(name, dtype, launches):
    """Forward and backward, through lse too."""
    assert_within(budget_of(PREFILLS[name], dtype, CUDA, ways=(True,)), "triton", True)
    assert names(launches) == [FORWARD, *DELTA, DQ, DKDV]


@gpu
@halves
@decodes
def test_decode(name, dtype, launches):
    assert_forward(budget_of(DECODES[name], dtype, CUDA, ways=(False,)))
    is_split = launches[0].arguments["SPLITS"] > 1
    assert names(launches) == [FORWARD, *[COMBINE] * is_split]
    assert not (is_split and name in ("batch", "short"))


@gpu
@halves
@pytest.mark.parametrize("name", ("idefics2", "d64", "d256", "all_keys"))
def test_descriptors_and_pointers_agree(name, dtype, launches):
    """The same products in the same order, whichever way tiles arrive: the same bits."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA on this device")
    inputs, arguments, douts = arguments_of(PREFILLS[name], dtype)
    q, k, v, *parameters = inputs
    unaligned = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (q, k, v)]
    first, second = (run([*qkv, *parameters], arguments, douts, "triton") for qkv in ((q, k, v), unaligned))
    used = [x.arguments["TMA"] for x in launches if x.name not in DELTA]
    assert used == [True] * 3 + [False] * 3
    assert_same_bits(first, second)


@gpu
@pytest.mark.parametrize("name", ("idefics2", "qwen", "d64", "mask", "all_keys", "packed"))
def test_bit_equal_twice(name):
    inputs, arguments, douts = arguments_of(PREFILLS[name])
    first, *others = (run(inputs, arguments, douts, "triton") for _ in range(3))
    for other in others:
        assert_same_bits(first, other)


@gpu
@pytest.mark.parametrize("name", ("idefics2", "qwen", "all_keys", "packed"))
def test_decode_is_bit_equal_twice(name):
    inputs, arguments, _ = arguments_of(DECODES[name])
    first, *others = (shifted_attention(*inputs, **arguments, impl="triton") for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


# ---- graphs, synchronisation, launches, memory ----


@gpu
@pytest.mark.parametrize("name", ("idefics2", "left_padded", "packed"))
def test_graph_replay_of_forward_and_backward(name):
    inputs, arguments, douts = arguments_of(PREFILLS[name])
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step():
        outputs = shifted_attention(*leaves, **arguments, return_lse=True, impl="triton")
        return *outputs, *torch.autograd.grad(outputs, leaves, douts)

    graph, replayed = captured(step)
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    for label, x, y in zip(NAMES, replayed, step(), strict=True):
        assert torch.equal(x, y), label


@gpu
@pytest.mark.parametrize("impl", ("triton", "auto"))
@pytest.mark.parametrize("name", ("idefics2", "window", "all_keys", "ids"))
def test_graph_replay_of_a_decode_as_the_cache_fills(name, impl):
    inputs, arguments, _ = arguments_of(DECODES[name])
    kv_end = arguments["kv_end"]

    def step():
        return shifted_attention(*inputs, **arguments, impl=impl)

    graph, replayed = captured(step)
    for ends in ((5000, 1), (4, 700), (2048, 4096)):
        kv_end.copy_(ints(*ends))
        graph.replay()
        assert torch.equal(replayed, step()), ends


@gpu
@pytest.mark.parametrize(
    ("impl", "name"),
    [
        *(
            ("triton", name)
            for name in ("idefics2", "left_padded", "window", "mask", "all_keys", "ids", "packed")
        ),
        *(("composed", name) for name in ("idefics2", "left_padded", "mask", "all_keys", "ids")),
        *(("auto", name) for name in ("idefics2", "left_padded", "packed")),
    ],
)
def test_no_host_synchronisation(impl, name):
    inputs, arguments, douts = arguments_of(PREFILLS[name])
    assert_no_synchronisation(lambda: run(inputs, arguments, douts, impl))


@gpu
@pytest.mark.parametrize("impl", ("triton", "auto"))
@pytest.mark.parametrize("name", ("idefics2", "batch", "packed"))
def test_no_host_synchronisation_of_a_decode(name, impl):
    inputs, arguments, _ = arguments_of(DECODES[name])
    assert_no_synchronisation(lambda: shifted_attention(*inputs, **arguments, impl=impl))


@gpu
@pytest.mark.parametrize("impl", ("triton", "auto"))
@pytest.mark.parametrize(("name", "kernels"), (("short", [FORWARD]), ("idefics2", [FORWARD, COMBINE])))
def test_a_decode_is_nothing_but_its_kernels(name, kernels, impl):
    """Not even a conversion of kv_end."""
    torch.use_deterministic_algorithms(False)  # which fills new tensors, by a kernel
    inputs, arguments, _ = arguments_of(DECODES[name])

    def step():
        return shifted_attention(*inputs, **arguments, impl=impl)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    ran = [x.name for x in profile.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(ran) == sorted(kernels)


def peak_bytes(step):
    """What ``step`` allocates at most beyond what there was."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


def rounded(*tensors_bytes):
    """The allocator hands out multiples of 512 bytes."""
    return sum(-(-n // 512) * 512 for n in tensors_bytes)


@gpu
@pytest.mark.parametrize("name", ("idefics2_4k", "d64", "window", "mask"))
def test_memory_of_a_forward(name):
    """out and lse, and not a byte more."""
    inputs, arguments, _ = arguments_of(PREFILLS[name])
    q = inputs[0]
    expected = rounded(q.numel() * q.element_size(), q[..., 0].numel() * 4)
    assert peak_bytes(lambda: shifted_attention(*inputs, **arguments, impl="triton")) == expected


@gpu
@pytest.mark.parametrize("name", ("idefics2", "all_keys"))
def test_memory_of_a_decode(name, launches):
    """out and the normalisers, and what the parts of the keys leave."""
    inputs, arguments, _ = arguments_of(DECODES[name])
    q = inputs[0]
    peak = peak_bytes(lambda: shifted_attention(*inputs, **arguments, impl="triton"))
    parts = launches[0].arguments
    rows, all_keys = q[..., 0].numel(), arguments.get("normalizer") == "all_keys"
    norms = rows * 4 * parts["SPLITS"] * (4 if all_keys else 2)
    sizes = q.numel() * q.element_size(), *[rows * 4] * (1 + all_keys), q.numel() * 4 * parts["SPLITS"], norms
    assert peak == rounded(*sizes)


@gpu
def test_memory_of_a_backward(launches):
    """Less than one [T, S] matrix of one head: gradients, two numbers per row, partial sums."""
    inputs, arguments, douts = arguments_of(case("", {"causal": True}, B=1, H=2, G=1, T=8192, S=8192, D=64))
    q, k = inputs[:2]
    gradients = 2 * (q.numel() + 2 * k.numel())
    peak = peak_bytes(lambda: run(inputs, arguments, douts, "triton"))
    assert gradients < peak < 8192 * 8192 * 2


# ---- torch.compile ----


@gpu
@pytest.mark.parametrize("impl", ("triton", "auto", "composed"))
@pytest.mark.parametrize(
    "options", ({"causal": True}, {"kv_start": ints(0, 9), "window": 50}), ids=("causal", "bounds")
)
def test_inductor(options, impl):
    """Forward and backward in one graph, with work before and after, then another length."""
    options = {k: v.to(CUDA) if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def fn(q, k, v, *parameters):
        return shifted_attention(2 * q, k, v, *parameters, **options, impl=impl).tanh()

    calls = []
    for T in (127, 127, 193):
        inputs = shifted_attention_inputs(2, 8, 2, T, T, 64, dtype=BF16, device=CUDA)
        calls.append((inputs, output_gradients(*inputs[0].shape, dtype=BF16, device=CUDA)))
    same_when_compiled(fn, calls, dynamic=True)


# ---- machine code of all of these, without a GPU ----


KERNELS = (
    fwd.shifted_attention_fwd_kernel,
    fwd.shifted_attention_combine_kernel,
    bwd.shifted_attention_dq_kernel,
    bwd.shifted_attention_dkdv_kernel,
)
ALL_CASES = {
    **{f"prefill-{name}": given for name, given in PREFILLS.items()},
    **{f"decode-{name}": given for name, given in DECODES.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_CASES)
def test_launches_compile(name, monkeypatch):
    """For an H200, in bf16, the lengths that 16 does not divide included; spills are the register table's."""
    monkeypatch.setattr(launch, "generation", lambda _: launch.SM_90)
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(api, "require_triton", lambda _: None)
    inputs, arguments, douts = arguments_of(ALL_CASES[name], device="cpu")
    call = functools.partial(shifted_attention, *inputs, **arguments, return_lse=True, impl="triton")
    skipped = [getattr(shift_kernels, kernel) for kernel in DELTA]
    with compiling_for(90, KERNELS, skipped) as compiled:
        if name.startswith("prefill"):
            run(inputs, arguments, douts, "triton")
        else:
            call()
    assert compiled
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY[90], kernel.name
