"""The splice's Triton kernels: values in the interpreter and on a GPU, machine code without one.

``test_values_in_the_interpreter`` starts a process on the value tests and on those here.
"""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from mmicl_kernels.ops import prefix_splice, prefix_splice_  # noqa: E402
from mmicl_kernels.ops.prefix_splice import _triton  # noqa: E402
from mmicl_kernels.ops.prefix_splice._triton import bwd, fwd  # noqa: E402
from mmicl_kernels.testing.budgets import gradients  # noqa: E402
from mmicl_kernels.testing.cross_compile import compiling_for, machine_code  # noqa: E402
from mmicl_kernels.testing.inputs import normal  # noqa: E402
from tests.ops.triton_process import (  # noqa: E402
    CAPABILITIES,
    assert_machine_code,
    assert_passes_interpreted,
    assert_replays,
    compiles,
    far_rows,
    launches,
    on_device,
    on_gpu_alone,
)

FORWARD, BACKWARD = KERNELS = (fwd.prefix_splice_fwd_kernel, bwd.prefix_splice_bwd_kernel)
LAYOUTS = ("left", "right", "packed")
COUNTS = {"prefix_splice": 120, "prefix_splice_in_place": 15, "prefix_splice_triton": 30}
# Another dtype, larger cases, the layout that differs least from another one; and what is no kernel's work.
SLOW = "value_and_gradients and (right or torch.float16] or long or many) or many_blocks and right or compile"


@compiles
@pytest.mark.parametrize("name", COUNTS)
def test_values_in_the_interpreter(name):
    """Runs the value tests of one file on the CPU, but for the slow ones."""
    assert_passes_interpreted(f"not bad_input and not ({SLOW})", name, at_least=COUNTS[name])


@compiles
@pytest.mark.slow
def test_slow_values_in_the_interpreter():
    assert_passes_interpreted(SLOW, *COUNTS, at_least=90)


def make_inputs(C=24, dtype=torch.float32, device="cpu", R=3, T=5):
    """Five demonstrations, of which R requests name three each: the arguments in the order of the op."""
    ints = {"dtype": torch.int32, "device": device}
    offsets = torch.tensor([0, 3, 3, 20, 21, 26], **ints)
    demo_ids = torch.arange(3 * R, **ints) % 5
    cu_demos = 3 * torch.arange(R + 1, **ints)
    bank = normal(26, C, dtype=dtype, device=device, seed=1)
    return bank, offsets, demo_ids, cu_demos, normal(R, T, C, dtype=dtype, device=device, seed=2)


# ---- values: the interpreter's, or a GPU's ----


@on_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_blocks(layout, device):
    """Several programs per row, and several tiles of requests and of demonstrations in each."""
    bank, offsets, _, _, prompt = make_inputs(600, device=device, R=20, T=18)
    counts = torch.arange(20, dtype=torch.int32) % 7 * 6
    cu_demos = torch.nn.functional.pad(counts.cumsum(0).int(), (1, 0)).to(device)
    demo_ids = (torch.arange(int(counts.sum()), dtype=torch.int32, device=device) * 3) % 5
    options = {"layout": layout, "length": 64 if layout != "packed" else 1000, "max_length": 64}
    dout = normal(*((20, 64) if layout != "packed" else (1, 1000)), 600, dtype=torch.float32, device=device)

    def fn(impl):
        return lambda b, p: prefix_splice(b, offsets, demo_ids, cu_demos, p, **options, impl=impl)[:4]

    ours, reference = (
        gradients(fn(impl), (bank, prompt), (dout, None, None, None)) for impl in ("triton", "reference")
    )
    assert all(map(torch.equal, ours[0], reference[0]))
    torch.testing.assert_close(ours[1], reference[1])


@on_device
def test_offsets_past_two_to_the_31(device):
    """Rows 2^29 elements apart: the product of row and stride passes int32."""
    bank, offsets, demo_ids, cu_demos, prompt = make_inputs(16, torch.float16, device, R=1)
    offsets, few = offsets.clamp(max=6), bank[:6]
    near, other = (
        prefix_splice(x, offsets, demo_ids, cu_demos, prompt, length=12, impl="triton").embeddings
        for x in (few, far_rows(few))
    )
    assert torch.equal(near, other)
    arguments = (bank, offsets, demo_ids, cu_demos, torch.zeros(1, dtype=torch.int32, device=device))
    batch = far_rows(few[None])
    expected = prefix_splice_(batch.clone(), *arguments, impl="triton")
    assert torch.equal(prefix_splice_(batch, *arguments, impl="triton"), expected)


HOSTILE = {
    "ids": {"demo_ids": [7, -3, 2**30, 0, 1, 2, -(2**31), 4, 5]},
    "offsets": {"offsets": [-5, 3, 3, 26, 31, 36]},
    "long_offsets": {"offsets": [0, 900, 4, 4, 26, 27]},
    "cu_demos": {"cu_demos": [-4, 99, 2, 7]},
    "prompt_start": {"prompt_start": [-9, 99, 2]},
    "prompt_end": {"prompt_end": [99, -1, 2]},
    "cu_prompt": {"cu_prompt": [-4, 99, 2, 7]},
    "long_prompt": {"length": 3},
    "short_batch": {"length": 4, "max_length": 30},
}  # fmt: skip


@on_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", HOSTILE)
def test_wrong_values_touch_nothing_else(name, layout, device):
    """Ids and bounds on a GPU are not checked; what lies around the tensors is neither read nor written."""
    changes = {
        k: torch.tensor(v, device=device) if isinstance(v, list) else v for k, v in HOSTILE[name].items()
    }
    bank, *indices, prompt = make_inputs(device=device)

    def guarded(x):
        buffer = torch.full((len(x) + 200, *x.shape[1:]), torch.nan, device=device)
        buffer[100:-100] = x
        return buffer[100:-100]

    prompt = guarded(prompt if "cu_prompt" not in changes else prompt.flatten(0, 1)[None])
    length = changes.get("length", 20)
    bounds = [changes.get(x) for x in ("prompt_start", "prompt_end", "cu_prompt")]
    names = ("offsets", "demo_ids", "cu_demos")
    indices = [changes.get(k, v) for k, v in zip(names, indices, strict=True)]
    most = changes.get("max_length", length)
    outputs = torch.ops.mmicl.prefix_splice_fwd(
        guarded(bank), None, *indices, prompt, *bounds, None, layout, length, most, "triton"
    )
    assert not outputs[0].isnan().any()
    dout = guarded(torch.ones_like(outputs[0]))
    grads = torch.ops.mmicl.prefix_splice_bwd(
        dout, *indices[:2], *outputs[5:], list(prompt.shape), *bounds, len(bank), torch.float32, True, True,
        "triton",
    )  # fmt: skip
    assert not any(g.isnan().any() for g in grads)


@on_device
def test_ids_that_no_request_uses_have_no_place(device):
    """And what is not kept has none either: a backward would read there."""
    bank, offsets, demo_ids, cu_demos, prompt = make_inputs(device=device)
    cu_demos = cu_demos.clamp(max=4)  # of nine ids four are used, two of them are kept
    *_, places, _ = torch.ops.mmicl.prefix_splice_fwd(
        bank, None, offsets, demo_ids, cu_demos, prompt, None, None, None, None, "left", 22, 22, "triton"
    )
    assert (places[1] >= 0).tolist() == [False, True, True, True] + [False] * 5
    assert (places[1][places[1] < 0] < -(2**40)).all()


@on_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches(layout, device):
    """One forward, one backward and a sort of the ids; without a gradient of the bank not even that."""
    bank, *indices, prompt = make_inputs(device=device)
    options = {"layout": layout, "length": 64, "impl": "triton"}
    sort = mock.patch.object(torch, "sort", wraps=torch.sort)
    with launches(*KERNELS) as launched, sort as sorts:
        out = prefix_splice(bank.requires_grad_(), *indices, prompt.requires_grad_(), **options).embeddings
        assert launched == [FORWARD]
        torch.autograd.grad(out, (bank, prompt), out)
        assert launched == [FORWARD, BACKWARD] and sorts.call_count == 1
        out = prefix_splice(bank.detach(), *indices, prompt, **options).embeddings
        torch.autograd.grad(out, prompt, out)
        assert launched == [FORWARD, BACKWARD] * 2 and sorts.call_count == 1
        batch, starts = torch.zeros(3, 64, 24, device=device), indices[2][:-1]
        prefix_splice_(batch, bank.detach(), *indices, starts, impl="triton")
        assert launched[4:] == [FORWARD]


# ---- machine code, without a GPU ----


def compiled(capability, C, dtype, int8=False):
    """What the launchers would launch on a CUDA device, in their order."""
    bank, *indices, prompt = make_inputs(C, dtype, T=16)
    scale = torch.ones(len(bank)) if int8 else None
    bank = bank.to(torch.int8) if int8 else bank
    start, labels = torch.zeros(3, dtype=torch.int32), torch.zeros(3, 16, dtype=torch.long)
    with compiling_for(capability, KERNELS) as kernels:
        for layout in LAYOUTS:
            outputs = _triton.prefix_splice_fwd(
                bank, scale, *indices, prompt, start, None, None, labels, layout, 128, 128
            )
        _triton.prefix_splice_place_(prompt, bank, scale, *indices, start)
        _triton.prefix_splice_bwd(
            prompt, *indices[:2], *outputs[5:], [3, 16, C], start, None, None, len(bank), dtype, True, True
        )
    return [machine_code(kernel) for kernel in kernels]


@compiles
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_registers_and_vector_accesses(dtype, capability):
    """Registers leave room for 12 warps on an SM of 65536; rows are touched 16 bytes at a time."""
    assert_machine_code(compiled(capability, 4096, dtype), [FORWARD] * 4 + [BACKWARD], 168)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(("C", "int8"), ((40, False), (3584, True), (8192, False)))
def test_no_spills_at_other_sizes(C, int8):
    for code in compiled(90, C, torch.bfloat16, int8):
        assert code.spilled_bytes == 0, (code.name, code.registers)


# ---- on a GPU alone ----


def step_on_cuda():
    """Forward and backward of everything, and the ids it reads."""
    bank, offsets, demo_ids, cu_demos, prompt = make_inputs(1024, torch.bfloat16, "cuda", R=8, T=100)
    indices = (offsets, demo_ids, cu_demos)

    def spliced(layout):
        return lambda bank, prompt: prefix_splice(
            bank, *indices, prompt, layout=layout, length=1200 if layout == "packed" else 150, max_length=130
        )[:4]

    def in_place(bank, batch):
        return prefix_splice_(batch * 1, bank, *indices, cu_demos[:-1])

    def step():
        results = []
        for layout in LAYOUTS:
            fn = spliced(layout)
            dout = torch.ones(1 if layout == "packed" else 8, 1200 if layout == "packed" else 150, 1024,
                              dtype=torch.bfloat16, device="cuda")  # fmt: skip
            results += gradients(fn, (bank, prompt), (dout, None, None, None))
        results += gradients(in_place, (bank, prompt), (prompt,))
        return sum(results, ())

    return step, demo_ids


@on_gpu_alone
def test_cuda_graph_replay_without_synchronisation():
    assert_replays(*step_on_cuda())
