"""Every bad argument gets an error that names it, its value and what was expected."""

import pytest
import torch

from mmicl_kernels.ops import attention_shift, shifted_attention
from mmicl_kernels.testing.inputs import attention_shift_inputs, ints, shifted_attention_inputs

HALF = torch.float16


def packed(**changes):
    arguments = {
        "cu_seqlens_q": ints(0, 3, 7), "cu_seqlens_k": ints(0, 4, 7),
        "max_seqlen_q": 4, "max_seqlen_k": 4,
    }  # fmt: skip
    return {**arguments, **changes}


# Tensors are replaced by name: q [2, 4, 7, 16], k and v [2, 2, 7, 16], weight [4, 16], bias [4].
SHIFTED_ATTENTION = {
    "q_type": ({"q": 3}, TypeError, "q must be a tensor, got int"),
    "q_rank": ({"q": torch.zeros(4, 7, 16)}, ValueError, r"q has shape \[4, 7, 16\], expected \[B, H"),
    "q_dtype": ({"q": torch.zeros(2, 4, 7, 16).int()}, TypeError, "q has dtype torch.int32"),
    "k_batch": ({"k": torch.zeros(3, 2, 7, 16)}, ValueError, r"k has shape \[3.*B = 2"),
    "k_dim": ({"k": torch.zeros(2, 2, 7, 8)}, ValueError, r"k has shape \[2, 2, 7, 8\].*D = 16"),
    "k_dtype": ({"k": torch.zeros(2, 2, 7, 16, dtype=HALF)}, TypeError,
                "k has dtype torch.float16, expected torch.float32"),
    "v_dtype": ({"v": torch.zeros(2, 2, 7, 16, dtype=HALF)}, TypeError, "v has dtype torch.float16"),
    "v_length": ({"v": torch.zeros(2, 2, 6, 16)}, ValueError, r"v has shape \[2, 2, 6.*S = 7"),
    "v_head_dim": ({"v": torch.zeros(2, 2, 7, 8)}, ValueError, "v has head dim 8, expected 16"),
    "heads": ({"k": torch.zeros(2, 3, 7, 16), "v": torch.zeros(2, 3, 7, 16)}, ValueError,
              "q has 4 heads, expected a multiple of the 3 heads"),
    "no_key_heads": ({"k": torch.zeros(2, 0, 7, 16), "v": torch.zeros(2, 0, 7, 16)}, ValueError,
                     "multiple of the 0 heads"),
    **{
        f"{name}_stride": ({name: torch.zeros(2, heads, 16, 7).mT}, ValueError,
                           rf"{name} has strides .*expected a contiguous last dimension")
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    },
    "weight_shape": ({"weight": torch.zeros(4, 8)}, ValueError, r"weight has shape \[4, 8\]"),
    "weight_dtype": ({"weight": torch.zeros(4, 16).int()}, TypeError, "weight has dtype torch.int32"),
    "bias_shape": ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \[3\].*H = 4"),
    "shift_shape": ({"shift": torch.zeros(4)}, ValueError, r"shift has shape \[4\], expected \[H, D\]"),
    "weight_device": ({"weight": torch.zeros(4, 16, device="meta")}, ValueError,
                      "weight is on meta, expected cpu like q"),
    "stack_without_ids": ({"weight": torch.zeros(2, 4, 1, 16)}, ValueError, "4-D weight needs adapter_ids"),
    "weight_heads": ({"weight": torch.zeros(3, 5, 16), "bias": torch.zeros(3, 5),
                      "shift": torch.zeros(3, 5, 16)}, ValueError, "weight has 3 heads, expected.* 4, or a"),
    "weight_no_keys": ({"weight": torch.zeros(4, 0, 16), "bias": torch.zeros(4, 0),
                        "shift": torch.zeros(4, 0, 16)}, ValueError, "weight has 0 virtual keys, expected 1"),
    "weight_many_keys": ({"weight": torch.zeros(1, 2049, 16), "bias": torch.zeros(1, 2049),
                          "shift": torch.zeros(1, 2049, 16)}, ValueError, "weight has 2049 virtual keys"),
    "bias_keys": ({"weight": torch.zeros(4, 3, 16)}, ValueError, r"bias has shape \[4\], expected \[P, N\]"),
    "ids_rank": ({"weight": torch.zeros(2, 4, 16), "bias": torch.zeros(2, 4), "shift": torch.zeros(2, 4, 16),
                  "adapter_ids": torch.zeros(2, 7, 1, dtype=torch.int32)}, ValueError,
                 r"adapter_ids has shape \[2, 7, 1\], expected \[B\] or \[B, T\]"),
    "prefix_type": ({"prefix": 1}, TypeError, "prefix is 1, expected True, False or a bool tensor"),
    "prefix_stack": ({"prefix": torch.ones(1, dtype=torch.bool)}, ValueError, "expected True or False"),
    "ids_without_stack": ({"adapter_ids": ints(0, 0)}, ValueError, "adapter_ids.*2-D weight"),
    "scale": ({"scale": "x"}, TypeError, "scale is a str"),
    "window_0": ({"window": 0}, ValueError, "window is 0, expected an int of at least 1"),
    "window_float": ({"window": 2.0}, ValueError, "window is 2.0"),
    "softcap_0": ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive finite number"),
    "softcap_nan": ({"softcap": float("nan")}, ValueError, "softcap is nan"),
    "softcap_type": ({"softcap": "5"}, ValueError, "softcap is '5', expected a positive"),
    "normalizer": ({"normalizer": "some"}, ValueError, "normalizer is 'some', expected.*'all_keys'"),
    "impl": ({"impl": "fast"}, ValueError, "impl is 'fast', expected one of"),
    "impl_triton_cpu": ({"impl": "triton"}, RuntimeError, "TRITON_INTERPRET=1"),
    "impl_triton_fp64": (
        {"impl": "triton", **{name: torch.zeros(2, 4, 5, 16, dtype=torch.float64) for name in "qkv"}},
        NotImplementedError,
        "impl='triton' has no torch.float64 with head dim 16",
    ),
    "impl_cuda_fp32": ({"impl": "cuda"}, NotImplementedError,
                       "impl='cuda' has no torch.float32 with head dim 16, only fp16 and bf16 with 64"),
    "q_start_type": ({"q_start": 1.5}, TypeError, "q_start is 1.5, expected an int, an integer tensor"),
    "q_start_bool": ({"q_start": True}, TypeError, "q_start is True, expected an int"),
    "scale_nan": ({"scale": float("nan")}, ValueError, "scale is nan, expected a finite number"),
    "softcap_large": ({"softcap": 1e39}, ValueError, "softcap is 1e.39, expected a positive finite number"),
    "softcap_tiny": ({"softcap": 1e-46}, ValueError, "softcap is 1e-46, expected a positive finite number"),
    "softcap_huge": ({"softcap": 10**400}, ValueError, "softcap is 1000.*expected a positive"),
    "softcap_bool": ({"softcap": True}, ValueError, "softcap is True, expected a positive finite number"),
    "scale_huge": ({"scale": 10**400}, ValueError, "scale is 10{39}, expected a finite number of fp32"),
    "softcap_inf": ({"softcap": float("inf")}, ValueError, "softcap is inf, expected a positive finite"),
    "causal_text": ({"causal": "no"}, TypeError, "causal is 'no', expected True or False"),
    "window_bool": ({"window": True}, ValueError, "window is True, expected an int"),
    "q_start_shape": ({"q_start": ints(1, 2, 3)}, ValueError, r"q_start has shape \[3\].*B = 2"),
    "q_start_dtype": ({"q_start": torch.zeros(2)}, TypeError, "q_start has dtype torch.float32"),
    "kv_start_int": ({"kv_start": 3}, TypeError, "kv_start is 3, expected an integer tensor"),
    "kv_start_range": ({"kv_start": ints(0, -1)}, ValueError, "kv_start has values from -1 to 0"),
    "kv_end_range": ({"kv_end": ints(7, 8)}, ValueError, "kv_end has values from 7 to 8, expected 0 to 7"),
    "kv_end_device": ({"kv_end": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError,
                      "kv_end is on meta"),
    "mask_type": ({"mask": True}, TypeError, "mask must be a tensor, got bool"),
    "mask_dtype": ({"mask": torch.ones(7, 7).int()}, TypeError, "mask has dtype torch.int32"),
    "mask_shape": ({"mask": torch.ones(7, 6)}, ValueError, r"mask has shape \[7, 6\].*\[2, 4, 7, 7\]"),
    "mask_rank": ({"mask": torch.ones(1, 2, 4, 7, 7)}, ValueError, "mask has shape"),
    "mask_heads": ({"mask": torch.ones(2, 2, 7, 7)}, ValueError, "mask has shape"),
    "mask_grad": ({"mask": torch.ones(7, 7, requires_grad=True)}, ValueError, "mask requires grad"),
    "max_alone": ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q.*need cu_seqlens"),
    "packed_batch": (packed(), ValueError, "q has batch size 2, expected 1 for packed"),
}  # fmt: skip

# Tensors as above, but for one packed row.
PACKED = {
    **{
        f"packed_{name}": (packed(**{name: value}), ValueError, f"{name} cannot be given together")
        for name, value in (
            ("mask", torch.ones(7, 7)), ("q_start", 0), ("kv_start", ints(0)), ("kv_end", ints(7)),
        )
    },
    "cu_k_missing": (packed(cu_seqlens_k=None), ValueError, "cu_seqlens_k is None"),
    "cu_q_missing": (packed(cu_seqlens_q=None), ValueError, "cu_seqlens_q is None"),
    "cu_type": (packed(cu_seqlens_q=[0, 3, 7]), TypeError, "cu_seqlens_q must be a tensor, got list"),
    "cu_dtype": (packed(cu_seqlens_q=ints(0, 3, 7).long()), TypeError, "cu_seqlens_q has dtype torch.int64"),
    "cu_count": (packed(cu_seqlens_k=ints(0, 7)), ValueError, r"cu_seqlens_k has shape \[2\]"),
    "cu_empty": (packed(cu_seqlens_q=ints(), cu_seqlens_k=ints()), ValueError, "cu_seqlens_q is empty"),
    "cu_first": (packed(cu_seqlens_q=ints(1, 3, 7)), ValueError, r"\[1, 3, 7\], expected a rise from 0 to 7"),
    "cu_last": (packed(cu_seqlens_k=ints(0, 3, 6)), ValueError, r"\[0, 3, 6\], expected a rise from 0 to 7"),
    "cu_order": (packed(cu_seqlens_q=ints(0, 9, 7)), ValueError, r"\[0, 9, 7\], expected a rise"),
    "max_missing": (packed(max_seqlen_q=None), ValueError, "max_seqlen_q is None"),
    "max_tensor": (packed(max_seqlen_k=torch.tensor(4)), ValueError, "max_seqlen_k is tensor"),
    "max_small": (packed(max_seqlen_q=3), ValueError, "max_seqlen_q is 3, expected at least 4"),
}  # fmt: skip

# Tensors as the first, but of dtype bf16 and head dim 64, and impl="cuda".
CUDA = {
    name: (changes, NotImplementedError, f"impl='cuda' has no {lacking or name}; use impl='triton' or")
    for name, lacking, changes in (
        ("softcap", "", {"softcap": 5.0}), ("window", "", {"window": 3}),
        ("mask", "", {"mask": torch.ones(7, 7, dtype=torch.bool)}),
        ("all_keys", "normalizer='all_keys'", {"normalizer": "all_keys"}),
        ("scale_0", "scale=0.0", {"scale": 0}), ("scale_negative", "scale=-1.0", {"scale": -1}),
        ("two", "softcap, window", {"softcap": 5.0, "window": 3}),
    )
}  # fmt: skip

STACKED = {
    "ids_high": ({"adapter_ids": ints(0, 3)}, ValueError, "adapter_ids has values from 0 to 3, expected -1"),
    "ids_low": ({"adapter_ids": ints(-2, 0)}, ValueError, "adapter_ids has values from -2"),
    "ids_shape": ({"adapter_ids": ints(0)}, ValueError, r"adapter_ids has shape \[1\].*B = 2"),
    "ids_dtype": ({"adapter_ids": torch.zeros(2)}, TypeError, "adapter_ids has dtype torch.float32"),
    "ids_type": ({"adapter_ids": [0, 1]}, TypeError, "adapter_ids must be a tensor, got list"),
}  # fmt: skip

ATTENTION_SHIFT = {
    "lse_shape": ({"lse": torch.zeros(2, 4, 6)}, ValueError, r"lse has shape \[2, 4, 6\].*T = 7"),
    "lse_dtype": ({"lse": torch.zeros(2, 4, 7, dtype=HALF)}, TypeError,
                  "lse has dtype torch.float16, expected torch.float32"),
    "q_shape": ({"q": torch.zeros(2, 4, 6, 16)}, ValueError, "q has shape"),
    "q_dtype": ({"q": torch.zeros(2, 4, 7, 16, dtype=HALF)}, TypeError, "q has dtype torch.float16"),
    "out_stride": ({"out": torch.zeros(2, 4, 16, 7).mT}, ValueError, "out has strides"),
    "q_stride": ({"q": torch.zeros(2, 4, 16, 7).mT}, ValueError, "q has strides"),
    "q_device": ({"q": torch.zeros(2, 4, 7, 16, device="meta")}, ValueError, "q is on meta"),
    "out_dtype": ({"out": torch.zeros(2, 4, 7, 16).long()}, TypeError, "out has dtype torch.int64"),
    "bias_shape": ({"bias": torch.zeros(4, 1)}, ValueError, r"bias has shape \[4, 1\], expected \[H\]"),
    "impl": ({"impl": "fast"}, ValueError, "impl is 'fast'"),
    "impl_cuda": ({"impl": "cuda"}, NotImplementedError, "attention_shift has no impl='cuda'"),
}  # fmt: skip


def rejected(op, names, tensors, changes, error, message):
    arguments = {**dict(zip(names, tensors, strict=True)), **changes}
    with pytest.raises(error, match=message):
        op(**arguments)


def shifted_names():
    return ("q", "k", "v", "weight", "bias", "shift")


@pytest.mark.parametrize("name", SHIFTED_ATTENTION)
def test_shifted_attention(name):
    tensors = shifted_attention_inputs(T=7, S=7)
    rejected(shifted_attention, shifted_names(), tensors, *SHIFTED_ATTENTION[name])


@pytest.mark.parametrize("name", CUDA)
def test_shifted_attention_on_hopper(name):
    tensors = shifted_attention_inputs(T=7, S=7, D=64, dtype=torch.bfloat16)
    changes, error, message = CUDA[name]
    rejected(shifted_attention, shifted_names(), tensors, {"impl": "cuda", **changes}, error, message)


def test_packed_shifted_attention_on_hopper():
    tensors = shifted_attention_inputs(B=1, T=7, S=7, D=64, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="impl='cuda' has no cu_seqlens_q"):
        shifted_attention(*tensors, **packed(), impl="cuda")


@pytest.mark.parametrize("name", PACKED)
def test_packed_shifted_attention(name):
    tensors = shifted_attention_inputs(B=1, T=7, S=7)
    rejected(shifted_attention, shifted_names(), tensors, *PACKED[name])


@pytest.mark.parametrize("name", STACKED)
def test_adapter_ids(name):
    tensors = shifted_attention_inputs(T=7, S=7, adapters=3)
    rejected(shifted_attention, shifted_names(), tensors, *STACKED[name])
    names = ("out", "lse", "q", "weight", "bias", "shift")
    tensors = attention_shift_inputs(T=7, adapters=3)
    rejected(attention_shift, names, tensors, *STACKED[name])


@pytest.mark.parametrize("name", ATTENTION_SHIFT)
def test_attention_shift(name):
    names = ("out", "lse", "q", "weight", "bias", "shift")
    tensors = attention_shift_inputs(T=7)
    rejected(attention_shift, names, tensors, *ATTENTION_SHIFT[name])


def test_triton_needs_the_interpreter_on_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='triton'.*TRITON_INTERPRET=1|pip install triton"):
        attention_shift(*attention_shift_inputs(), impl="triton")
