"""What ``impl="auto"`` of ``shifted_attention`` takes, without a device: fake CUDA tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.ops.shifted_attention import _op, dispatch
from mmicl_kernels.ops.shifted_attention.options import Options
from mmicl_kernels.testing.inputs import shifted_attention_inputs

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A function that says what the device is, first called for an H200."""

    def become(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    become(9, 0)
    return become


def chosen(training=False, *, dtype=BF16, D=128, T=100_000, S=None, device="cuda", **options):
    """For a call that a stock kernel could do, but for ``options``; by default longer than any break-even."""
    S = T if S is None else S
    with FakeTensorMode():
        q = torch.empty(2, 4, T, D, dtype=dtype, device=device)
        k = torch.empty(2, 2, S, D, dtype=dtype, device=device)
        tensors = {name: make() if callable(make) else make for name, make in options.items()}
        return dispatch.choose(q, k, Options(scale=0.1, training=training, **tensors))


def row_ints():
    return torch.empty(2, dtype=torch.int32, device="cuda")


training = pytest.mark.parametrize("training", (False, True), ids=("inference", "training"))


@training
@pytest.mark.parametrize(
    ("dtype", "D", "device"),
    ((FP64, 128, "cuda"), (FP32, 64, "cuda"), (BF16, 257, "cuda"), (FP16, 320, "cuda"), (BF16, 64, "cpu")),
)
@pytest.mark.parametrize("T", (1, 100_000))
def test_stock_kernels_where_triton_has_nothing_faster(T, dtype, D, device, training):
    assert chosen(training, dtype=dtype, D=D, T=T, device=device) == "composed"
    assert chosen(training, dtype=dtype, D=D, T=T, device=device, softcap=2.0) == "composed"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert chosen(T=1) == "composed"


# Of 300 queries unless said otherwise: a head dim of 256, for which stock kernels win at every length.
NEEDS_TRITON = {
    "mask": {"mask": lambda: torch.empty(2, 1, 1, 300, dtype=torch.bool, device="cuda")},
    "bias": {"mask": lambda: torch.empty(1, 1, 300, 300, dtype=BF16, device="cuda")},
    "window": {"window": 100},
    "window_causal": {"window": 100, "causal": True},
    "softcap": {"softcap": 50.0},
    "all_keys": {"all_keys": True, "causal": True},
    "kv_start": {"kv_start": row_ints},
    "kv_end": {"kv_end": row_ints},
    "kv_end_causal": {"kv_end": row_ints, "causal": True},
    "q_starts": {"q_starts": row_ints, "causal": True},
    "chunk": {"causal": True, "S": 4000},
    "static_cache": {"causal": True, "q_start": 0, "S": 200},
    "packed": {
        "cu_seqlens_q": row_ints, "cu_seqlens_k": row_ints, "max_seqlen_q": 300, "max_seqlen_k": 300,
    },
}  # fmt: skip


@training
@pytest.mark.parametrize("name", NEEDS_TRITON)
def test_triton_where_stock_kernels_need_more_than_themselves(name, training):
    assert chosen(training, D=256, **{"T": 300, **NEEDS_TRITON[name]}) == "triton"


STOCK = {
    "plain": {},
    "causal": {"causal": True},
    "causal_from_0": {"causal": True, "q_start": 0},
    "cross": {"S": 4000},
    "window_that_hides_nothing": {"window": 300, "causal": True},
    "causal_that_hides_nothing": {"causal": True, "q_start": 300},
    "top_left_of_a_cache": {"causal": True, "q_start": 0, "S": 4000},
    "ids": {"adapter_ids": row_ints},
}


@training
@pytest.mark.parametrize("name", STOCK)
def test_stock_kernels_where_they_win_and_need_nothing_else(name, training):
    assert chosen(training, D=256, **{"T": 300, **STOCK[name]}) == "composed"


@pytest.mark.parametrize("T", (1, 2, dispatch.DECODE_QUERIES))
@pytest.mark.parametrize(
    "options",
    ({}, {"causal": True}, {"kv_end": row_ints, "causal": True}),
    ids=("plain", "causal", "kv_end"),
)
def test_triton_for_a_decode(options, T):
    assert chosen(D=256, T=T, S=4000, **options) == "triton"


def test_no_decode_beyond_its_tile():
    assert chosen(D=256, T=dispatch.DECODE_QUERIES + 1, S=4000) == "composed"


def test_no_decode_in_training():
    assert chosen(training=True, D=256, T=1, S=4000) == "composed"


@pytest.mark.parametrize(
    ("capability", "row"), (((8, 0), 8), ((8, 9), 8), ((9, 0), 9), ((10, 0), 9), ((12, 0), 9))
)
@pytest.mark.parametrize(("D", "low"), ((40, 0), (64, 0), (80, 65), (128, 65), (192, 129), (256, 129)))
@training
def test_break_even(training, D, low, capability, row, hopper):
    """The longest T of the table is fused, the next is not."""
    hopper(*capability)
    longest = dispatch.LONGEST_FUSED[row, low, training]
    fused = {
        T: chosen(training, D=D, T=T) == "triton"
        for T in (longest, longest + 1, 2 * longest, 40, 10**6)
        if dispatch.DECODE_QUERIES < T < dispatch.ALWAYS
    }
    assert fused == {T: longest >= T for T in fused}


@training
@pytest.mark.parametrize("T", (100, 10**5))
def test_stock_kernels_on_devices_before_ampere(T, training, hopper):
    hopper(7, 5)
    assert chosen(training, T=T, D=64) == "composed"


@pytest.fixture
def choices(monkeypatch):
    """What the operators asked of ``choose``, and were answered."""
    noted = []

    def choose(q, k, options):
        answer = dispatch.choose(q, k, options)
        noted.append(
            (answer, options.training, q.shape, k.shape, options.causal, options.adapter_ids is not None)
        )
        return answer

    monkeypatch.setattr(_op, "choose", choose)
    return noted


def test_forward_and_backward_of_a_training_call_take_the_same(choices):
    """A limit between inference's and training's would hand one set's results to the other's backward."""
    *inputs, shift = shifted_attention_inputs(adapters=2)
    ids = torch.tensor([1, -1], dtype=torch.int32)
    out = shifted_attention(*inputs, shift.requires_grad_(), causal=True, adapter_ids=ids, impl="auto")
    assert len(choices) == 1
    out.sum().backward()
    assert len(choices) == 2 and choices[0] == choices[1]
    assert choices[0][1] is True


@pytest.mark.parametrize("needs_grad", (False, True))
def test_a_call_that_is_not_trained_takes_inferences_limit(needs_grad, choices, monkeypatch):
    monkeypatch.setattr(_op, "infers", lambda *_: False)  # as on CUDA
    inputs = [x.requires_grad_(needs_grad) for x in shifted_attention_inputs()]
    with torch.no_grad():
        shifted_attention(*inputs)
    assert [training for _, training, *_ in choices] == [False]


@pytest.mark.parametrize("impl", ("composed", "reference"))
def test_a_named_implementation_asks_nothing(impl, choices):
    inputs = [x.requires_grad_() for x in shifted_attention_inputs()]
    shifted_attention(*inputs, impl=impl).sum().backward()
    assert not choices
