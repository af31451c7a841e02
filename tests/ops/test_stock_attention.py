"""Every stock kernel by name: what it returns, and the identity that makes training cheap.

A stock backward that is given a ``base`` with ``dout . base = dout . a + dg`` and the plain lse returns the
gradients of the shifted attention. On a GPU these tests come first; one that fails names the kernel, the
case and the dtype.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmicl_kernels.ops.attention_shift._torch import attention_shift_bwd
from mmicl_kernels.ops.shifted_attention import _stock
from mmicl_kernels.ops.shifted_attention._stock import BlockwiseAttention
from mmicl_kernels.ops.shifted_attention.options import Visibility
from mmicl_kernels.testing.budgets import (
    GATE_ROUNDINGS,
    assert_within_budget,
    eager_shifted_attention,
    gradients,
)
from mmicl_kernels.testing.inputs import normal, shift_parameters

HALF = (torch.bfloat16, torch.float16)
ALL = (torch.float32, *HALF)


@dataclass(frozen=True)
class Backend:
    fwd: Callable
    bwd: Callable
    device: str
    dtypes: tuple
    takes_bias: bool
    max_head_dim: int = 256
    min_length: int = 1


# Last the one whose faults are known to end in illegal accesses, after which CUDA answers nothing.
BACKENDS = {
    "cpu_flash": Backend(_stock._cpu_flash_fwd, _stock._cpu_flash_bwd, "cpu", ALL, True),
    "efficient": Backend(_stock._efficient_fwd, _stock._efficient_bwd, "cuda", ALL, True),
    "flash": Backend(_stock._flash_fwd, _stock._flash_bwd, "cuda", HALF, False),
    "cudnn": Backend(_stock._cudnn_fwd, _stock._cudnn_bwd, "cuda", HALF, False, 128, 2),
}


def added(*shape):
    """A learned bias such as ALiBi's or T5's."""
    return lambda dtype: normal(*shape, dtype=dtype, seed=7)


def hiding(value, *shape):
    """0 or ``value(dtype)``; query 3 sees nothing else."""

    def build(dtype):
        hidden = normal(*shape, dtype=torch.float32, seed=8) < -0.4
        hidden[..., 3, :] = True
        return torch.zeros(shape, dtype=dtype).masked_fill(hidden, value(dtype))

    return build


def minus_inf(dtype):
    return -torch.inf


def lowest(dtype):
    return torch.finfo(dtype).min


@dataclass(frozen=True)
class Case:
    """Sizes, and the bias as a function of the dtype, on the CPU."""

    B: int = 2
    H: int = 4
    G: int = 2
    T: int = 63
    S: int = 63
    D: int = 64
    causal: bool = False
    bias: Callable | None = field(default=None, hash=False)
    layout: str = "dense"
    dtypes: tuple = ALL


CASES = {
    "aligned": Case(G=4, T=128, S=128),
    "aligned_causal": Case(H=8, T=256, S=256, D=128, causal=True, layout="heads_last"),
    "gqa_63": Case(),
    "causal_63": Case(causal=True),
    "mqa_500": Case(B=1, G=1, T=500, S=500, D=128, causal=True),
    "cross": Case(T=63, S=500),
    "longer": Case(T=130, S=65),
    "half_a_tile_of_keys": Case(B=1, T=192, S=192),
    "d96": Case(T=200, S=200, D=96, causal=True),
    "d96_heads_last": Case(T=200, S=200, D=96, layout="heads_last"),
    "d128": Case(T=129, S=129, D=128),
    "d256": Case(B=1, T=130, S=130, D=256, causal=True),
    "d256_all_keys": Case(B=1, T=63, S=130, D=256),
    "one_query": Case(T=1),
    "one_query_gqa": Case(H=8, G=1, T=1, S=500, D=128),
    "one_key": Case(T=5, S=1),
    "one_row": Case(B=1, H=1, G=1, T=40, S=40, causal=True),
    "misaligned": Case(layout="sliced"),
    "repeated": Case(layout="expanded", causal=True),
    "bias": Case(bias=added(2, 4, 63, 63)),
    "bias_per_row": Case(T=64, S=64, bias=added(2, 1, 64, 64)),
    "bias_shared": Case(S=500, bias=added(1, 1, 63, 500), D=128),
    "bias_keys": Case(S=64, bias=added(2, 1, 1, 64)),
    "bias_queries": Case(S=64, bias=added(1, 4, 63, 1)),
    "bias_transposed": Case(T=72, S=72, bias=lambda dtype: added(1, 4, 72, 72)(dtype).mT),
    "bias_cut": Case(S=56, bias=lambda dtype: added(2, 1, 63, 60)(dtype)[..., 2:58]),
    "bias_d256": Case(B=1, D=256, bias=added(1, 1, 63, 63)),
    "bias_one_query": Case(T=1, bias=added(2, 1, 1, 63)),
    "hide_inf": Case(bias=hiding(minus_inf, 2, 1, 63, 63)),
    "hide_inf_heads": Case(G=4, T=130, S=200, bias=hiding(minus_inf, 1, 4, 130, 200)),
    "hide_lowest": Case(bias=hiding(lowest, 2, 1, 63, 63)),
    "hide_lowest_192": Case(B=1, T=192, S=192, bias=hiding(lowest, 1, 1, 192, 192)),
}


def offered(backend, case):
    return (
        backend.max_head_dim >= case.D
        and min(case.T, case.S) >= backend.min_length
        and (case.bias is None or backend.takes_bias)
    )


def parameters(names=tuple(CASES), dtypes=ALL):
    return [
        pytest.param(
            backend, name, dtype, id=f"{backend}-{name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.gpu] if BACKENDS[backend].device == "cuda" else [],
        )
        for backend in BACKENDS
        for name in names
        for dtype in BACKENDS[backend].dtypes
        if dtype in dtypes and dtype in CASES[name].dtypes and offered(BACKENDS[backend], CASES[name])
    ]  # fmt: skip


def cases(names=tuple(CASES), dtypes=ALL):
    return pytest.mark.parametrize(("backend", "name", "dtype"), parameters(names, dtypes))


@dataclass
class Problem:
    """One case at one dtype on the CPU: inputs, and the eager and exact results it is judged by."""

    inputs: list  # q, k, v, weight, bias, shift
    mask: torch.Tensor | None
    dout: torch.Tensor
    low: list  # of (out, lse, dq, dk, dv), one for each order of the channels
    exact: list
    plain_low: list  # of the attention before the shift
    plain_exact: torch.Tensor

    @property
    def roundings(self):
        """A kernel that recomputes exp(s - lse) loses ``|lse|`` roundings, where lse resolves scores."""
        sizes = self.exact[1].abs()
        sizes = sizes[sizes * torch.finfo(torch.float32).eps < 1]
        return GATE_ROUNDINGS + float(sizes.max())


@functools.cache
def problem(name, dtype, blind=0):
    """``blind``: the first queries that the reference hides all keys from."""
    case = CASES[name]
    options = {"dtype": dtype, "layout": case.layout}
    q = normal(case.B, case.H, case.T, case.D, seed=1, **options)
    k = normal(case.B, case.G, case.S, case.D, seed=2, **options)
    v = normal(case.B, case.G, case.S, case.D, seed=3, **options)
    inputs = [q, k, v, *shift_parameters(case.H, case.D, keys=case.S, seed=4)]
    mask = None if case.bias is None else case.bias(dtype)
    reference_mask = mask
    if blind:
        reference_mask = (torch.arange(case.T) >= blind)[:, None].expand(case.T, case.S)
    dout = normal(*q.shape, dtype=dtype, seed=5)

    def results(inputs, dout, order):
        def shifted(q, k, v, weight, bias, shift):
            q, k, v, weight, shift = (x[..., order] for x in (q, k, v, weight, shift))
            out, lse = eager_shifted_attention(
                q, k, v, weight, bias, shift, causal=case.causal, mask=reference_mask
            )
            return out[..., order.argsort()], lse

        outputs, grads = gradients(shifted, inputs, (dout, None))
        unshifted = [*inputs[:5], torch.zeros_like(inputs[5])]
        return [*outputs, *grads[:3]], shifted(*unshifted)[0]

    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(case.D), *(torch.randperm(case.D, generator=generator) for _ in range(2))]
    low, plain_low = zip(*(results(inputs, dout, order) for order in orders), strict=True)
    exact, plain_exact = results([x.double() for x in inputs], dout.double(), orders[0])
    return Problem(inputs, mask, dout, list(low), exact, list(plain_low), plain_exact)


def kernel_of(backend, name, mask):
    case, device = CASES[name], BACKENDS[backend].device
    if backend == "cudnn" and torch.backends.cudnn.version() <= 91500 and (case.T % 128 or case.S % 128):
        pytest.skip("this cuDNN reads beyond lengths that 128 does not divide")
    bias = None if mask is None else mask.to(device).expand(*mask.shape[:2], case.T, case.S)
    functions = (BACKENDS[backend].fwd, BACKENDS[backend].bwd)
    return _stock.StockAttention(*functions, case.S, case.causal, bias, case.D**-0.5, mask is not None)


def on(device, tensors):
    """Moved without change of strides: ``to`` makes a sliced or repeated tensor dense."""
    moved = []
    for x in tensors:
        storage = torch.empty(0, dtype=x.dtype, device=device)
        storage.set_(x.untyped_storage().to(device=device), x.storage_offset(), x.shape, x.stride())
        moved.append(storage)
    return moved


def heads_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded(x):
    """Rows of D elements in rows of 2 D."""
    return torch.cat((x, x), -1)[..., : x.shape[-1]]


LAYOUTS = {"dense": torch.Tensor.contiguous, "heads_last": heads_last, "padded": padded}


def backward_through_shift(kernel, inputs, dout, lse, a, drop_dlse=False, of_base=heads_last):
    """``dq, dk, dv`` of the shifted attention by one stock backward; with ``drop_dlse`` over ``a`` itself."""
    q, k, v, weight, bias, shift = inputs
    parameters = weight[None, :, None], bias[None, :, None], shift[None, :, None]
    dg, _, _, base, *_ = attention_shift_bwd(dout, lse, q, *parameters, None, None, a, False)
    dq, dk, dv = kernel.backward(dout, q, k, v, of_base(a if drop_dlse else base), lse)
    return (dq + dg * weight[:, None]).to(q.dtype), dk, dv


def assert_gradients(given, actual):
    for i, name in enumerate(("dq", "dk", "dv")):
        lows = [low[2 + i] for low in given.low]
        assert_within_budget(name, actual[i].cpu(), lows, given.exact[2 + i], given.roundings)


@cases()
def test_forward(backend, name, dtype):
    """The attention output, and its log-sum-exp: natural, ``[B, H, T]``, fp32, -inf without a key."""
    given = problem(name, dtype)
    kernel = kernel_of(backend, name, given.mask)
    q, k, v = on(BACKENDS[backend].device, given.inputs[:3])
    out, lse = kernel.forward(q, k, v)
    assert lse.dtype == torch.float32 and out.dtype == dtype
    lows = [low[1] for low in given.low]
    assert_within_budget("lse", lse.cpu(), lows, given.exact[1], given.roundings)
    assert_within_budget("out", out.cpu(), given.plain_low, given.plain_exact, given.roundings)


@cases()
def test_backward_includes_the_gradient_through_lse(backend, name, dtype):
    given = problem(name, dtype)
    kernel = kernel_of(backend, name, given.mask)
    *inputs, dout = on(BACKENDS[backend].device, [*given.inputs, given.dout])
    a, lse = kernel.forward(*inputs[:3])
    assert_gradients(given, backward_through_shift(kernel, inputs, dout, lse, a))


@pytest.mark.parametrize("layout", ("dense", "heads_last", "padded", "dout_heads_last"))
@cases(("gqa_63", "causal_63", "aligned", "aligned_causal", "bias"))
def test_backward_for_any_layout(backend, name, dtype, layout):
    """cuDNN's plans are cached without the layouts of out and dout, and efficient assumes one of out."""
    given = problem(name, dtype)
    kernel = kernel_of(backend, name, given.mask)
    *qkv, weight, bias, shift, dout = on(BACKENDS[backend].device, [*given.inputs, given.dout])
    *qkv, dout = (LAYOUTS["dense" if layout == "dout_heads_last" else layout](x) for x in (*qkv, dout))
    dout = heads_last(dout) if layout == "dout_heads_last" else dout
    a, lse = kernel.forward(*qkv)
    for of_base in (heads_last, torch.Tensor.contiguous):
        actual = backward_through_shift(kernel, (*qkv, weight, bias, shift), dout, lse, a, of_base=of_base)
        assert_gradients(given, actual)


@cases(("aligned", "gqa_63", "aligned_causal"))
def test_dropping_the_gradient_through_lse_breaks_the_budget(backend, name, dtype):
    """The same backward over the plain attention output: what FlashAttention 2 and 3 compute."""
    given = problem(name, dtype)
    kernel = kernel_of(backend, name, given.mask)
    *inputs, dout = on(BACKENDS[backend].device, [*given.inputs, given.dout])
    a, lse = kernel.forward(*inputs[:3])
    actual = backward_through_shift(kernel, inputs, dout, lse, a, drop_dlse=True)
    for i, label in enumerate(("dq", "dk")):
        lows = [low[2 + i] for low in given.low]
        # In fp32 by far.
        times, exact = 5 if dtype == torch.float32 else 1, given.exact[2 + i]
        closer = exact + (actual[i].cpu().double() - exact) / times
        with pytest.raises(AssertionError, match="exceeds the budget"):
            assert_within_budget(label, closer.to(dtype), lows, exact, given.roundings)


@cases(("aligned", "gqa_63", "d128", "bias"))
def test_a_query_with_lse_minus_inf_reaches_nothing(backend, name, dtype):
    """As the gate of all_keys has it beside queries that see no key: no bias says so."""
    blind = 5
    given = problem(name, dtype, blind)
    kernel = kernel_of(
        backend, name, given.mask if name != "bias" else torch.zeros(1, 1, 63, 63, dtype=dtype)
    )
    *inputs, dout = on(BACKENDS[backend].device, [*given.inputs, given.dout])
    a, lse = kernel.forward(*inputs[:3])
    a[:, :, :blind], lse[:, :, :blind] = 0.0, -torch.inf
    actual = backward_through_shift(kernel, inputs, dout, lse, a)
    assert not actual[0][:, :, :blind].any()
    assert_gradients(given, actual)


@cases(("hide_inf", "hide_inf_heads"))
def test_a_query_that_sees_no_key(backend, name, dtype):
    given = problem(name, dtype)
    kernel = kernel_of(backend, name, given.mask)
    *inputs, dout = on(BACKENDS[backend].device, [*given.inputs, given.dout])
    out, lse = kernel.forward(*inputs[:3])
    assert not out[:, :, 3].any() and (lse[:, :, 3] == -torch.inf).all()
    louder = dout.clone()
    louder[:, :, 3] *= 1e3
    assert_gradients(given, backward_through_shift(kernel, inputs, louder, lse, out))


@cases(("hide_lowest", "hide_lowest_192"), (torch.float32, torch.bfloat16))
def test_a_query_whose_keys_all_carry_the_lowest_value(backend, name, dtype):
    """Scores vanish in rounding: the mean of all values. Times log2(e) the lowest value is -inf."""
    given = problem(name, dtype)
    kernel = kernel_of(backend, name, given.mask)
    q, k, v = on(BACKENDS[backend].device, given.inputs[:3])
    out, lse = kernel.forward(q, k, v)
    assert (lse[:, :, 3] == torch.finfo(dtype).min).all()
    values = v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
    u = torch.finfo(dtype).eps / 2
    error = (out[:, :, 3] - values.mean(2)).abs()
    assert (error <= 2 * u * (values.mean(2).abs() + values.abs().mean(2))).all()


# ---- without a device ----


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_the_lowest_value_stays_finite_in_base_2(dtype):
    bias = torch.tensor([torch.finfo(dtype).min, -torch.inf, -1e4, 0.0, 3.0], dtype=dtype)
    raised = _stock._finite_in_base_2(bias)
    assert torch.isfinite(raised[0].float() * 1.4427) and raised[0] <= -6e4
    assert torch.equal(raised[1:], bias[1:])


@pytest.mark.parametrize("layout", ("dense", "heads_last", "sliced", "expanded"))
def test_rows_are_aligned_for_cuda(layout):
    x = normal(2, 3, 5, 16, dtype=torch.bfloat16, layout=layout)
    aligned = _stock._aligned(x)
    assert torch.equal(aligned, x) and aligned.data_ptr() % 16 == 0
    assert all(step % 8 == 0 and step > 0 for step in aligned.stride()[:-1])
    assert (aligned is x) == (layout in ("dense", "heads_last"))


@pytest.mark.parametrize("S", (40, 37))
@pytest.mark.parametrize("broadcast", ((2, 4), (2, 1), (1, 1)), ids=str)
def test_rows_of_a_bias_are_aligned_for_cuda(broadcast, S):
    q = normal(2, 4, 9, 16, dtype=torch.bfloat16)
    full = normal(*broadcast, 9, S, dtype=torch.bfloat16)
    buffer = normal(*broadcast, 9, S + 3, dtype=torch.bfloat16)
    column = normal(*broadcast, 9, 1, dtype=torch.bfloat16).expand(*broadcast, 9, S)
    row = normal(*broadcast, 1, S, dtype=torch.bfloat16).expand(*broadcast, 9, S)
    for bias in (full, buffer[..., 3:], full.mT.contiguous().mT, column, row):
        aligned = _stock._aligned_bias(bias, q)
        assert torch.equal(aligned, bias.expand(2, 4, 9, S)) and aligned.stride(-1) == 1
        assert aligned.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in aligned.stride()[:-1])


def test_heads_last_has_exact_strides():
    """Also where a size is 1: cuDNN's plans are compared by strides."""
    rows = normal(1, 9, 3, 8, dtype=torch.float32)[:, 2:6].transpose(1, 2)  # batch stride of nine rows
    for x in (rows, normal(2, 3, 4, 8, dtype=torch.float32), normal(2, 1, 4, 8, dtype=torch.float32)):
        B, H, T, D = x.shape
        assert torch.equal(_stock._heads_last(x), x)
        assert _stock._heads_last(x).stride() == (T * H * D, D, H * D, 1)
    assert _stock._heads_last(rows).data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("scale", (0.0, -0.5))
def test_scales_that_no_cuda_kernel_handles_go_in_blocks(scale):
    q = cuda_queries()
    kernel = _stock.attention_kernel(q, q, scale, None, Visibility())
    assert isinstance(kernel, BlockwiseAttention)


META = {
    f"{name}-{str(dtype).removeprefix('torch.')}{'-bias' if bias else ''}": (backend, dtype, bias)
    for name, backend in BACKENDS.items()
    for dtype in backend.dtypes
    for bias in (False, True)
    if backend.device == "cuda" and (backend.takes_bias or not bias)
}


@pytest.mark.parametrize(("T", "S"), ((37, 41), (64, 64), (2, 500)))
@pytest.mark.parametrize("name", META)
def test_cuda_calls_type_check(name, T, S):
    """Schemas, shapes, dtypes and layouts through PyTorch's own meta kernels."""
    backend, dtype, with_bias = META[name]
    q = torch.empty(2, 4, T, 64, device="meta", dtype=dtype)
    k = torch.empty(2, 2, S, 64, device="meta", dtype=dtype)
    bias = torch.empty(2, 1, T, S, device="meta", dtype=dtype) if with_bias else None
    kernel = _stock.StockAttention(backend.fwd, backend.bwd, S, False, bias, 0.125, with_bias)
    for q_layout in (q, heads_last(q)):
        out, lse = kernel.forward(q_layout, k, k)
        assert out.shape == q.shape and out.dtype == dtype
        assert lse.shape == (2, 4, T) and lse.dtype == torch.float32
        heads_last_out = backend.fwd is _stock._efficient_fwd or q_layout is not q
        assert out.stride() == (heads_last(q) if heads_last_out else q).stride()
        grads = kernel.backward(torch.empty_like(out), q_layout, k, k, out, lse)
        for grad, x in zip(grads, (q, k, k), strict=True):
            assert grad.shape == x.shape and grad.dtype == dtype
        if backend.bwd is not _stock._flash_bwd:
            assert grads[0].transpose(1, 2).is_contiguous()


def cuda_queries(dtype=torch.bfloat16, T=37, D=128):
    with FakeTensorMode():
        return torch.empty(2, 4, T, D, device="cuda", dtype=dtype)


@pytest.fixture
def hopper(monkeypatch):
    """A function that says what the device is, first called for the one with the newest of everything."""

    def become(capability=(9, 0), version=91900):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)

    become()
    return become


@pytest.mark.parametrize(
    ("expected", "sizes", "bias", "keys"),
    (
        ("cudnn", {}, False, 37),
        ("cudnn", {"dtype": torch.float16, "D": 64}, False, 500),
        ("efficient", {}, True, 37),
        ("efficient", {"dtype": torch.float32}, False, 37),
        ("flash", {"D": 256}, False, 37),
        ("flash", {"D": 192}, False, 37),
        ("efficient", {"D": 224}, False, 37),
        ("efficient", {"D": 264}, False, 37),
        ("flash", {"T": 1}, False, 500),
        ("flash", {}, False, 1),
        (None, {"dtype": torch.float64}, False, 37),
        (None, {"D": 36}, False, 37),
    ),
)
def test_which_kernel_runs_on_hopper(expected, sizes, bias, keys, hopper):
    chosen = _stock._select(cuda_queries(**sizes), torch.zeros(()) if bias else None, keys)
    assert chosen == (expected and (BACKENDS[expected].fwd, BACKENDS[expected].bwd))


@pytest.mark.parametrize(
    ("expected", "dtype", "device"),
    (
        ("cudnn", torch.bfloat16, {"capability": (10, 0)}),
        ("flash", torch.bfloat16, {"version": 91500}),
        ("flash", torch.bfloat16, {"version": None}),
        ("flash", torch.bfloat16, {"capability": (8, 0)}),
        ("flash", torch.bfloat16, {"capability": (12, 0)}),
        ("efficient", torch.float16, {"capability": (7, 5)}),
        (None, torch.bfloat16, {"capability": (7, 5)}),
    ),
)
def test_which_kernel_runs_elsewhere(expected, dtype, device, hopper):
    hopper(**device)
    chosen = _stock._select(cuda_queries(dtype), None, 37)
    assert chosen == (expected and (BACKENDS[expected].fwd, BACKENDS[expected].bwd))


def test_cudnn_can_be_switched_off_as_in_pytorch(hopper, monkeypatch):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert _stock._select(cuda_queries(), None, 37)[0] is _stock._flash_fwd
    torch.use_deterministic_algorithms(True)  # the fixture of all tests switches it off again
    assert _stock._select(cuda_queries(), None, 37)[0] is _stock._flash_fwd
