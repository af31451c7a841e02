"""On CPU, where no backward follows: attention and shift in one C++ call, which no Python stands before.

Its kernels are C++'s own (``csrc/bindings_attention.cpp``), so that a compiled graph calls it itself.
"""

import torch
from torch import Tensor

from mmicl_kernels.ops._core.dispatch import calls_cpp, refuse_vmap
from mmicl_kernels.ops._core.layout import new_heads
from mmicl_kernels.ops.attention_shift.kernels import VirtualKeys
from mmicl_kernels.ops.shifted_attention import dispatch
from mmicl_kernels.ops.shifted_attention.options import Options

torch.library.define(
    "mmicl::shifted_attention_inference",
    "(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor bias, Tensor shift, Tensor? adapter_ids,"
    " Tensor? prefix, float scale, float? softcap, bool causal, int? window, SymInt? q_start,"
    " Tensor? q_starts, Tensor? kv_start, Tensor? kv_end, Tensor? mask, bool all_keys, int few_queries)"
    " -> (Tensor out, Tensor lse)",
)
# What a patched layer asks of it for every token, to [B, T, H, D]: a mask, if any, ends the keys of all_keys.
torch.library.define(
    "mmicl::shifted_attention_step",
    "(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor bias, Tensor shift, Tensor? adapter_ids,"
    " Tensor? prefix, float scale, float? softcap, int? window, Tensor? mask, bool all_keys) -> Tensor",
)


def infers(q: Tensor, options: Options) -> bool:
    """Whether the operator computes this. A backward may not follow: nothing is kept for it."""
    return options.cu_seqlens_q is None and options.impl not in ("triton", "cuda") and calls_cpp(q)


def infer(q: Tensor, k: Tensor, v: Tensor, keys: VirtualKeys, options: Options) -> tuple[Tensor, Tensor]:
    """``out [B, H, T, D]`` and ``lse [B, H, T]``."""
    return torch.ops.mmicl.shifted_attention_inference.default(
        q, k, v, *keys, options.scale, options.softcap, options.causal, options.window, options.q_start,
        options.q_starts, options.kv_start, options.kv_end, options.mask, options.all_keys,
        dispatch.FEW_QUERIES,
    )  # fmt: skip


@torch.library.register_fake("mmicl::shifted_attention_inference")
def _inference_fake(q, *_):
    return new_heads(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("mmicl::shifted_attention_step")
def _step_fake(q, *_):
    return new_heads(q).transpose(1, 2)


for _name in ("shifted_attention_inference", "shifted_attention_step"):
    torch.library.register_vmap(f"mmicl::{_name}", refuse_vmap("shifted_attention"))
