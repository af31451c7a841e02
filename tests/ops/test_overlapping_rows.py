"""Tensors whose rows share memory: windows with a hop shorter than they are, and rows seen twice.

The values are those of dense copies, and gradients flow back through the view.
"""

import pytest
import torch

from mmicl_kernels.ops import (
    alignment_loss,
    attention_shift,
    prefix_splice,
    prefix_splice_,
    residual_shift,
    residual_shift_rms_norm,
    row_projection,
    shifted_attention,
)
from mmicl_kernels.ops._core.checks import overlaps
from mmicl_kernels.testing.inputs import attention_shift_inputs, normal, shifted_attention_inputs, token_ids
from tests.ops.triton_process import INTERPRETED

# In the interpreter, which takes minutes.
pytestmark = [pytest.mark.slow] if INTERPRETED else []

FP32, D = torch.float32, 8


def frames(B, H, T, hop):
    """Frames ``[B, H, T, D]`` of a signal: rows ``hop`` elements apart."""
    return normal(B, H, D + hop * (T - 1), dtype=FP32, seed=hop).unfold(2, D, hop)


def heads(B, H, T, hop):
    """Heads that overlap, not rows."""
    return frames(B, T, H, hop).transpose(1, 2)


def batch(B, H, T, hop):
    """Batch rows that overlap, next to heads and tokens that do not."""
    storage = normal(H * T * D + hop * (B - 1), dtype=FP32, seed=hop)
    return storage.as_strided((B, H, T, D), (hop, T * D, D, 1))


def repeated(B, H, T, hop):
    return normal(B, H, 1, D, dtype=FP32, seed=hop).expand(B, H, T, D)


VIEWS = {
    **{f"frames_{hop}": lambda *s, hop=hop: frames(*s, hop) for hop in (1, 2, 5, 7)},
    "heads_1": lambda *s: heads(*s, 1),
    "heads_3": lambda *s: heads(*s, 3),
    "batch_1": lambda *s: batch(*s, 1),
    "batch_11": lambda *s: batch(*s, 11),
    "repeated": lambda *s: repeated(*s, 1),
}
# In the interpreter one of each kind.
HERE = ("frames_5", "heads_3", "batch_11", "repeated") if INTERPRETED else VIEWS
views = pytest.mark.parametrize("view", HERE)


def compare(call, inputs, dout_view=None):
    """``call`` of the views equals that of their dense copies, in value and every gradient."""
    results = []
    for dense in (True, False):
        leaves = [
            x.detach().clone(memory_format=torch.contiguous_format) if dense else x.detach() for x in inputs
        ]
        leaves = [x.requires_grad_() for x in leaves]
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        douts = [torch.ones_like(y, memory_format=torch.contiguous_format) for y in outputs]
        if dout_view is not None:
            douts[0] = dout_view.contiguous() if dense else dout_view
        grads = torch.autograd.grad(outputs, leaves, douts, allow_unused=True, materialize_grads=True)
        results.append([y.detach() for y in outputs] + list(grads))
    for dense, other in zip(*results, strict=True):
        torch.testing.assert_close(other, dense)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "q_start": 0},
    "window": {"causal": True, "window": 2},
    "added": {"mask": normal(2, 1, 5, 5, dtype=FP32)},
    "blocks": {"softcap": 3.0},
    "all_keys": {"causal": True, "normalizer": "all_keys"},
    "packed": {
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 2, 5], dtype=torch.int32), "max_seqlen_q": 3, "max_seqlen_k": 3,
    },
}  # fmt: skip


@views
@pytest.mark.parametrize("name", ("causal", "packed") if INTERPRETED else OPTIONS)
def test_queries_keys_values_and_dout(name, view, impl):
    B = 1 if name == "packed" else 2
    x = VIEWS[view](B, 2, 5)
    q, k, v, *parameters = shifted_attention_inputs(B=B, H=2, G=2, T=5, S=5, D=D)

    def call(*inputs):
        return shifted_attention(*inputs, **OPTIONS[name], return_lse=True, impl=impl)

    for inputs in ((x, k, v), (q, x, v), (q, k, x), (x, x, x)):
        compare(call, [*inputs, *parameters])
    compare(call, [q, k, v, *parameters], dout_view=x)


@views
def test_gradients_flow_back_through_the_view(view, impl):
    """Each element of the storage gets the sum over its places."""
    _, k, v, *parameters = shifted_attention_inputs(B=2, H=2, G=2, T=5, S=5, D=D)
    x = VIEWS[view](2, 2, 5)
    storage = torch.zeros(x.untyped_storage().size() // 4).set_(x.untyped_storage())
    leaf = storage.clone().requires_grad_()

    def grad(make):
        out = shifted_attention(make(leaf), k, v, *parameters, impl=impl)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    as_view = grad(lambda s: s.as_strided(x.shape, x.stride(), x.storage_offset()))
    copied = grad(lambda s: s.as_strided(x.shape, x.stride(), x.storage_offset()).contiguous())
    torch.testing.assert_close(as_view, copied)


@views
def test_under_autocast(view, impl):
    """A cast keeps strides, and of overlapping rows makes others."""
    _, k, v, *parameters = shifted_attention_inputs(B=2, H=2, G=2, T=5, S=5, D=D)
    x, dtype = VIEWS[view](2, 2, 5), torch.float16
    with torch.autocast("cpu", dtype):
        out = shifted_attention(x, k, v, *parameters, impl=impl)
    wanted = shifted_attention(x.contiguous().to(dtype), k.to(dtype), v.to(dtype), *parameters, impl=impl)
    torch.testing.assert_close(out, wanted)


@views
def test_masks(view, impl):
    """Those that hide keys and those that are added."""
    inputs = shifted_attention_inputs(B=2, H=2, G=2, T=5, S=D, D=D)
    mask = VIEWS[view](2, 2, 5)
    for one in (mask, mask > 0):
        wanted = shifted_attention(*inputs, mask=one.contiguous(), impl=impl)
        torch.testing.assert_close(shifted_attention(*inputs, mask=one, impl=impl), wanted)


@views
def test_attention_shift(view, impl):
    out, lse, q, *parameters = attention_shift_inputs(B=2, H=2, T=5, D=D)
    x = VIEWS[view](2, 2, 5)

    def call(*inputs):
        return attention_shift(*inputs, impl=impl)

    for inputs in ((x, lse, q), (out, x[..., 2], q), (out, lse, x), (x, lse, x)):
        compare(call, [*inputs, *parameters])
    compare(call, [out, lse, q, *parameters], dout_view=x)


def hidden(view):
    """``[B, T, C]`` of a view's batch rows and tokens, or heads."""
    x = VIEWS[view](2, 2, 5)
    return x[:, :, 0] if view.startswith("heads") else x[:, 0]


@views
def test_hidden_states(view, impl):
    x, vector, skip = hidden(view), normal(D, dtype=FP32, seed=1), normal(D, dtype=FP32, seed=2)
    other, rows = normal(*x.shape, dtype=FP32, seed=3), torch.tensor([0, 2, 2, -1])
    weight = normal(6, D, dtype=FP32, seed=4)
    stacked, ids = normal(3, D, dtype=FP32, seed=5), torch.tensor([2, -1], dtype=torch.int32)

    def of_tokens(x):
        return token_ids(*x.shape[:2], 2, adapters=3)

    calls = {
        "plain": lambda x: residual_shift(x, vector, 0.5, impl=impl),
        "norm": lambda x: residual_shift(x, stacked, 0.5, preserve_norm=True, adapter_ids=ids, impl=impl),
        "tokens": lambda x: residual_shift(x, stacked, 0.5, adapter_ids=of_tokens(x), impl=impl),
        "tokens_norm": lambda x: residual_shift(
            x, stacked, 0.5, preserve_norm=True, adapter_ids=of_tokens(x), impl=impl
        ),
        "rms": lambda x: residual_shift_rms_norm(x, other, vector, 0.5, skip, eps=1e-5, impl=impl),
        "skip": lambda x: residual_shift_rms_norm(other, x, vector, 0.5, skip, eps=1e-5, impl=impl),
        "rows": lambda x: row_projection(x, rows, weight, norm_weight=weight[:, 0], impl=impl),
        "aligned": lambda x: alignment_loss((x, other), (weight[:4], weight[2:]), rows, impl=impl),
    }
    for call in calls.values():
        compare(call, [x])
        shape = call(x)[0].shape if isinstance(call(x), tuple) else call(x).shape
        if shape == x.shape:
            compare(call, [other], dout_view=x)


@views
def test_splice(view, impl):
    x = hidden(view)
    offsets, ids, cu = torch.tensor([0, 2, 3]), torch.tensor([1, 0, 0]), torch.tensor([0, 1, 3])
    R, T = x.shape[:2]

    def spliced(bank, prompt):
        options = {"length": T + 4, "layout": "left", "impl": impl}
        return prefix_splice(bank, offsets, ids, cu, prompt, **options).embeddings

    dense = normal(*x.shape, dtype=FP32, seed=6)
    bank = VIEWS[view](1, 3, 3)[0, :, 0] if view.startswith("heads") else VIEWS[view](1, 1, 3)[0, 0]
    compare(spliced, [bank, dense])
    compare(spliced, [normal(3, D, dtype=FP32, seed=7), x])
    starts = torch.zeros(R, dtype=torch.int32)
    with pytest.raises(ValueError, match="embeddings has strides .* expected rows of their own"):
        prefix_splice_(x, normal(3, D, dtype=FP32), offsets, ids, cu, starts, impl=impl)


def test_what_overlaps():
    """By the storage that is reached, counted."""
    for name, make in VIEWS.items():
        assert overlaps(make(2, 2, 5)), name
    dense = normal(2, 3, 4, 5, dtype=FP32)
    for x in (dense, dense.transpose(1, 2), dense[:, 1:, ::2], dense[..., 1:3], dense[:0], dense[:, :, :1]):
        assert not overlaps(x)
    interleaved = torch.zeros(12).as_strided((2, 2), (3, 2))
    assert not overlaps(interleaved) and overlaps(torch.zeros(12).as_strided((3, 2), (1, 2)))
