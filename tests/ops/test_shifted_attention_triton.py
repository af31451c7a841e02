"""The Triton kernels of ``shifted_attention``: launches that the grid at its small sizes does not reach.

``test_values_in_the_interpreter`` starts two processes, on the grid and on this file. What runs on a GPU
alone is in test_shifted_attention_gpu.py.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from mmicl_kernels.ops import shifted_attention  # noqa: E402
from mmicl_kernels.ops.shifted_attention._triton import launch  # noqa: E402
from mmicl_kernels.ops.shifted_attention._triton.launch import LaunchConfig  # noqa: E402
from mmicl_kernels.ops.shifted_attention.options import Options  # noqa: E402
from mmicl_kernels.testing.inputs import output_gradients, shifted_attention_inputs  # noqa: E402
from tests.ops.shifted_attention_grid import (  # noqa: E402
    GRID,
    TYPICAL,
    assert_forward,
    assert_same_bits,
    assert_values,
    budget,
    ints,
    run,
)
from tests.ops.shifted_attention_launches import (  # noqa: E402
    COMBINE,
    DELTA,
    DKDV,
    DQ,
    FORWARD,
    KEYS_DELTA,
    names,
    note_launches,
    split,
    use,
)
from tests.ops.test_compiled_ops import BACKWARD_CHECKS, OPS, op_arguments, same_when_compiled  # noqa: E402
from tests.ops.triton_process import (  # noqa: E402
    INTERPRETED,
    assert_all_pass,
    compiles,
    far_rows,
    interpreted,
    on_device,
    on_gpu_alone,
)

FP32 = torch.float32


# ---- starting the interpreter ----


GRID_TESTS = Path(__file__).with_name("test_shifted_attention.py")
SHARED = ("extremes", "adapter_stacks", "far_numbers", "large_shifts", "overlapping_rows")


@compiles
def test_values_in_the_interpreter():
    """The grid in fp32 with what all implementations share, and this file, beside each other."""
    shared = [Path(__file__).with_name(f"test_{name}.py") for name in SHARED]
    selection = ("-m", "not slow and not gpu", "-k", "not independent_code")
    both = interpreted(*selection, GRID_TESTS, *shared), interpreted(*selection, __file__)
    assert_all_pass(*both, at_least=50)


@compiles
@pytest.mark.slow
def test_slow_values_in_the_interpreter():
    """The grid in fp16 and its larger sizes, in halves; what is slow of this file."""
    shared = [Path(__file__).with_name(f"test_{name}.py") for name in SHARED]
    selection = ("-m", "slow and not gpu", GRID_TESTS, __file__, *shared)
    half = "mask or bias or hide or all_keys or packed or long"
    halves = (interpreted(*selection, "-k", which) for which in (half, f"not ({half})"))
    assert_all_pass(*halves, at_least=50)


# ---- what was launched, and how ----


@pytest.fixture
def launches(monkeypatch):
    return note_launches(monkeypatch)


# ---- tiles, TMA, heads ----

# The gradient of lse passes a prefix by in a second pass.
LAUNCHED = {"keys_8": (KEYS_DELTA, 1), "prefix_5": (KEYS_DELTA, 2), "keys_of_queries": (KEYS_DELTA, 2)}
WIDE, TALL = LaunchConfig(32, 16, 4, 1), LaunchConfig(16, 64, 4, 1)
SQUARE_TMA = LaunchConfig(32, 32, 4, 1, TMA=True)


@on_device
@pytest.mark.parametrize(
    ("config", "name"),
    # The interpreter takes them in turns.
    [
        (tile, name)
        for i, tile in enumerate((WIDE, TALL))
        for name in (TYPICAL[i::2] if INTERPRETED else TYPICAL)
    ],
    ids=lambda x: f"{x.BM}_{x.BN}" if isinstance(x, LaunchConfig) else x,
)
def test_tiles(config, name, device, monkeypatch, launches):
    use(monkeypatch, config)
    assert_values(name, FP32, "triton", device, True)
    delta, passes = LAUNCHED.get(name, (DELTA, 1))
    assert names(launches) == [FORWARD, *delta, *([DQ, DKDV] * passes)]
    for one in launches[0], *launches[-2:]:
        assert (one.arguments["BM"], one.arguments["BN"]) == (config.BM, config.BN)


@on_device
@pytest.mark.parametrize(
    "name",
    ("gqa_3", "head_dim_40", "kv_end", "all_keys_window", "packed_window", "mask_bounds"),
)
def test_descriptors(name, device, monkeypatch, launches):
    use(monkeypatch, SQUARE_TMA)
    assert_values(name, FP32, "triton", device, True)
    assert [x.arguments["TMA"] for x in launches if x.name not in DELTA] == [True] * 3


@on_device
@pytest.mark.parametrize("name", ("sliced", "expanded", "head_dim_1"))
def test_no_descriptors_of_rows_that_the_copy_engine_refuses(name, device, monkeypatch, launches):
    use(monkeypatch, SQUARE_TMA)
    assert_forward(budget(name, FP32, device))
    assert [x.arguments["TMA"] for x in launches] == [False]


@on_device
@pytest.mark.parametrize("name", ("causal", "gqa_3", "decode_7", "packed_all_keys"))
def test_a_program_per_query_head(name, device, monkeypatch, launches):
    """Where key heads are too few for the device, dk and dv are summed over parts of each query head."""
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 10**6)
    monkeypatch.setattr(launch, "splits", lambda *_: 1)
    assert_values(name, FP32, "triton", device, True)
    dkdv = launches[-1]
    assert dkdv.name == DKDV and dkdv.arguments["HEADS"] == 1 < dkdv.arguments["GROUP"]
    assert dkdv.arguments["dk"].shape[2] == GRID[name].sizes.get("H", 4)


@on_device
def test_a_program_per_key_head(device, monkeypatch, launches):
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 1)
    assert_values("gqa_3", FP32, "triton", device, True)
    assert launches[-1].arguments["HEADS"] == launches[-1].arguments["GROUP"] == 3


# ---- decode ----

DECODES = (
    "decode", "decode_7", "decode_16", "decode_short", "chunk_all", "kv_end_causal", "q_start_rows",
    "window_rows", "bias_cut", "all_keys_kv_end", "all_keys_q_start", "packed_ids", "packed_window",
    "packed_all_keys",
)  # fmt: skip
# Of 37 queries each, so that a tile begins and ends within a group; with a mask or a softcap.
CHUNKS = ("all_keys_bias", "ids_blind")
SLOW_CHUNKS = (
    "gqa_3", "mask", "mqa", "mask_queries", "hide_inf", "hide_finite", "bias_transposed", "all_keys_mask",
    "scale_negative", "softcap", "kv_crossed", "no_keys", "head_dim_1",
)  # fmt: skip


@on_device
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *((name, 3) for name in DECODES + CHUNKS),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in SLOW_CHUNKS),
        *((name, 2) for name in ("decode", "packed_ids")),
        ("decode_short", 64),
    ],
)
def test_splits(name, parts, device, monkeypatch, launches):
    """Of 64 parts most have no key."""
    split(monkeypatch, parts, rows=256)
    assert_forward(budget(name, FP32, device))
    assert names(launches) == [FORWARD, COMBINE]
    forward = launches[0].arguments
    assert forward["SPLITS"] == parts and forward["PACK"] == forward["GROUP"]
    assert launches[0].programs % parts == 0


@on_device
@pytest.mark.parametrize("name", DECODES)
def test_one_launch_where_one_part_is_enough(name, device, monkeypatch, launches):
    split(monkeypatch, 1)
    assert_forward(budget(name, FP32, device))
    assert names(launches) == [FORWARD]
    assert launches[0].arguments["PACK"] == launches[0].arguments["GROUP"]


@on_device
@pytest.mark.parametrize("name", ("decode_7", "all_keys_q_start", "bias_cut"))
def test_gradients_after_a_split(name, device, monkeypatch, launches):
    split(monkeypatch, 3)
    assert_values(name, FP32, "triton", device, True)
    assert names(launches) == [FORWARD, COMBINE, *DELTA, DQ, DKDV]


@on_device
@pytest.mark.parametrize("T", (2, 5, 16))
def test_causal_decode_of_several_tokens(T, device, monkeypatch, launches):
    """Each token as if it came alone."""
    split(monkeypatch, 2)
    q, k, v, *parameters = shifted_attention_inputs(T=T, S=70, H=6, device=device)
    out, lse = shifted_attention(q, k, v, *parameters, causal=True, return_lse=True, impl="triton")
    for t in range(T):
        end = 70 - T + t + 1
        alone = shifted_attention(
            q[:, :, t : t + 1], k[:, :, :end], v[:, :, :end], *parameters, return_lse=True, impl="reference"
        )
        torch.testing.assert_close(out[:, :, t : t + 1], alone[0])
        torch.testing.assert_close(lse[:, :, t : t + 1], alone[1])
    assert launches[0].arguments["PACK"] == 3


@pytest.mark.parametrize(
    ("programs", "S", "processors", "expected"),
    (
        (1, 255, 132, 1),
        (1, 512, 132, 2),
        (1, 10**6, 132, 64),
        (8, 10**6, 132, 33),
        (264, 10**6, 132, 1),
        (10**4, 10**6, 132, 1),
        (4, 0, 132, 1),
    ),
)
def test_how_far_keys_are_split(programs, S, processors, expected, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda _: processors)
    assert launch.splits(programs, S, torch.device("cpu")) == expected


class Operators(TorchDispatchMode):
    """Notes what PyTorch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ("decode", "kv_end_causal", "q_start_rows", "window_rows", "mask", "packed"))
def test_a_call_computes_nothing_before_its_launch(name):
    """Each operation on a bound would be a launch of its own, as long as that of a short decode."""
    q, k, *_ = GRID[name].inputs(FP32, "cpu")
    arguments = GRID[name].arguments(FP32, "cpu")
    if isinstance(arguments.get("q_start"), torch.Tensor):
        arguments["q_starts"] = arguments.pop("q_start")
    options = Options(**{"scale": 0.25, **arguments})
    with Operators() as operators:
        launch.Problem.of(q, k, options)
    assert set(operators.names) <= {"aten.expand.default", "aten.view.dtype", "aten.detach.default"}


# ---- values that must not matter, values that must ----


def every_launch(call, monkeypatch):
    """Results of ``call`` by pointers, by descriptors and split in three, each with a name."""
    for name, config, parts in (("pointers", TALL, 1), ("TMA", SQUARE_TMA, 1), ("split", TALL, 3)):
        with monkeypatch.context() as patch:
            use(patch, config)
            split(patch, parts)
            yield name, call()


@on_gpu_alone
@pytest.mark.parametrize("name", ("decode_7", "all_keys_kv_end"))
def test_bit_equal_twice(name, monkeypatch):
    """The interpreter has one order."""
    inputs, arguments, douts, _, _ = budget(name, FP32, "cuda")
    first, second = (
        list(every_launch(lambda: run(inputs, arguments, douts, "triton"), monkeypatch)) for _ in range(2)
    )
    for (way, one), (_, other) in zip(first, second, strict=True):
        assert_same_bits(one, other, way)


def garbage(device, T, softcap=None):
    """A call whose keys from 11 on are beyond kv_end, and the same with another content there."""
    q, k, v, *parameters = shifted_attention_inputs(T=T, S=37, H=2, device=device)
    dirty = [x.clone() for x in (k, v)]
    dirty[0][:, :, 11:], dirty[1][:, :, 11:] = 1e30, -1e30
    options = {"kv_end": ints(11, 11).to(device), "softcap": softcap}
    douts = output_gradients(*q.shape, dtype=FP32, device=device)
    return [(run([q, *kv, *parameters], options, douts, "triton")) for kv in ((k, v), dirty)]


@on_device
@pytest.mark.parametrize(("T", "softcap"), ((3, None), (20, 5.0)))
def test_finite_rows_beyond_kv_end_mean_nothing(T, softcap, device, monkeypatch):
    """In the last partial tile too, whichever way it is loaded; bit for bit. NaN there is no contract."""
    for way, (clean, dirty) in every_launch(lambda: garbage(device, T, softcap), monkeypatch):
        assert_same_bits(clean, dirty, way)
        dk, dv = dirty[1][1:3]
        assert not dk[:, :, 11:].any() and not dv[:, :, 11:].any(), way


@on_device
@pytest.mark.parametrize("normalizer", ("visible", "all_keys"))
@pytest.mark.parametrize("T", (3, 20))
def test_nan_is_not_hidden(T, normalizer, device, monkeypatch):
    """A key of NaN reaches the queries that see it, and under all_keys the gate of the others."""
    q, k, v, *parameters = shifted_attention_inputs(T=T, S=37, device=device)
    k[0, 1, 35] = torch.nan
    sees = torch.zeros(q.shape[:3], dtype=torch.bool, device=device)
    sees[0, 2:, -2:] = True  # heads 2 and 3 share key head 1
    spoilt = sees.clone()
    spoilt[0, 2:] |= normalizer == "all_keys"

    def call():
        return shifted_attention(
            q, k, v, *parameters, causal=True, normalizer=normalizer, return_lse=True, impl="triton"
        )

    for way, (out, lse) in every_launch(call, monkeypatch):
        assert torch.equal(lse.isnan(), sees), way
        assert torch.equal(out.isnan().any(-1), spoilt), way
        assert torch.equal(out.isnan().all(-1), spoilt), way


def strided(x):
    """The same numbers with zeros between them."""
    return torch.stack((x, torch.zeros_like(x)), -1).flatten()[::2]


@on_device
@pytest.mark.parametrize("T", (3, 20))
@pytest.mark.parametrize(
    "options",
    (
        {"adapter_ids": ints(1, -1)},
        {"adapter_ids": ints(1, -1).long()},
        {"kv_start": ints(3, 0), "kv_end": ints(30, 9)},
        {"q_start": ints(3, 7), "causal": True},
        {"kv_end": ints(30, 9).long(), "causal": True},
    ),
    ids=("ids", "ids_int64", "bounds", "q_start", "kv_end_int64"),
)
def test_strided_rows_of_options(options, T, device, monkeypatch):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    adapters = 2 if "adapter_ids" in options else None
    inputs = shifted_attention_inputs(H=2, T=T, S=37, adapters=adapters, device=device)
    douts = output_gradients(*inputs[0].shape, dtype=FP32, device=device)
    apart = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    use(monkeypatch, TALL)
    assert_same_bits(run(inputs, options, douts, "triton"), run(inputs, apart, douts, "triton"))


@on_device
def test_strided_cu_seqlens(device):
    inputs, arguments, douts, _, _ = budget("packed_ids", FP32, device)
    apart = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert_same_bits(run(inputs, arguments, douts, "triton"), run(inputs, apart, douts, "triton"))


# ---- offsets past 2^31 elements ----


@on_device
@pytest.mark.parametrize("config", (TALL, LaunchConfig(16, 64, 4, 1, TMA=True)), ids=("pointers", "TMA"))
@pytest.mark.parametrize("moved", ("q", "k", "v", "dout", "mask"))
def test_offsets_past_two_to_the_31(moved, config, device, monkeypatch):
    use(monkeypatch, config)
    half = torch.float16
    q, k, v, *parameters = shifted_attention_inputs(1, 1, 1, 5, 5, 16, dtype=half, device=device)
    dout, dlse = output_gradients(*q.shape, dtype=half, device=device)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool, device=device).tril()
    near = {"q": q, "k": k, "v": v, "dout": dout, "mask": mask}
    far = {**near, moved: far_rows(near[moved])}

    def call(x):
        inputs = [x["q"], x["k"], x["v"], *parameters]
        return run(inputs, {"mask": x["mask"]}, (x["dout"], dlse), "triton")

    assert_same_bits(call(near), call(far))


# ---- registration ----


@on_device
@pytest.mark.parametrize("name", ("plain", "bias", "bounds", "ids", "all_keys", "packed"))
def test_opcheck(name, device):
    inputs, options = op_arguments(name, FP32, "triton")
    inputs = [x.to(device) for x in inputs]
    options = [x.to(device) if isinstance(x, torch.Tensor) else x for x in options]
    torch.library.opcheck(OPS.shifted_attention_fwd, (*inputs, *options), test_utils=BACKWARD_CHECKS)
    out, lse, gate_lse, lse_low, a = OPS.shifted_attention_fwd(*inputs, *options)
    saved = (torch.ones_like(out), torch.ones_like(lse), a, lse, gate_lse, lse_low, True)
    torch.library.opcheck(OPS.shifted_attention_bwd, (*saved, *inputs, *options), test_utils=BACKWARD_CHECKS)


@on_device
def test_compile(device):
    """Two calls and another length, forward and backward, without a graph break."""

    def fn(*x):
        return shifted_attention(*x, causal=True, return_lse=True, impl="triton")

    calls = []
    for T in (31, 31, 47) if INTERPRETED else (127, 127, 193):
        inputs = shifted_attention_inputs(1, 2, 1, T, T, 16, device=device)
        calls.append((inputs, output_gradients(*inputs[0].shape, dtype=FP32, device=device)))
    same_when_compiled(fn, calls, backend="aot_eager", dynamic=True)
