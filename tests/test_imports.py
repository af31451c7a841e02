"""Importing does nothing but define names; the ops run with torch alone."""

import json
import subprocess
import sys

import pytest

BLOCK = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def run(script: str) -> str:
    """Standard output of ``script`` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("statement", ["import mmicl_kernels", "import mmicl_kernels.ops"])
def test_import_loads_little(statement):
    script = f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run(script)))
    for package in ("transformers", "triton", "safetensors", "rich", "matplotlib"):
        assert package not in loaded, package
    layers = {name.split(".")[1] for name in loaded if name.startswith("mmicl_kernels.")}
    expected = {"ops", "_extension"} if "ops" in statement else set()
    assert layers == expected
    if not expected:
        assert "torch" not in loaded


def test_import_patches_nothing():
    script = """
import torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers import LlamaConfig, AttentionInterface
from transformers.models.llava import modeling_llava
from transformers.models.llama import modeling_llama

def state():
    watched = (transformers, modeling_llava, modeling_llava.LlavaForConditionalGeneration, modeling_llama,
               modeling_llama.LlamaAttention, torch.nn.Module, torch.nn.functional, torch.Tensor)
    members = [(x.__name__, name, id(value)) for x in watched for name, value in list(vars(x).items())]
    return members, sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()), sorted(AttentionInterface._global_mapping)

settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.backends.cuda.flash_sdp_enabled(), torch.initial_seed())
for _ in range(2):  # lazily loaded names settle first
    before = state()
import mmicl_kernels as mk
for name in mk.__all__:
    getattr(mk, name)
import mmicl_kernels.training
after = state()
assert "mmicl" not in after[1] and "mmicl" not in after[2]
assert after == before, set(map(str, after[0])) ^ set(map(str, before[0]))
assert settings == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                    torch.backends.cuda.flash_sdp_enabled(), torch.initial_seed())
"""
    run(script)


def test_ops_run_without_transformers_and_triton():
    script = (
        BLOCK.format(names=["transformers", "triton", "safetensors", "tqdm", "numpy"])
        + """
import torch
from mmicl_kernels import ops
q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
parameters = [torch.randn(4, 8, requires_grad=True), torch.randn(4), torch.randn(4, 8)]
for normalizer in ("visible", "all_keys"):
    results = [ops.shifted_attention(q, k, v, *parameters, causal=True, normalizer=normalizer, impl=impl)
               for impl in ("reference", "composed", "auto")]
    grads = [torch.autograd.grad(out.square().sum(), [q, k, v, parameters[0]]) for out in results]
    for out, grad in zip(results, grads):
        torch.testing.assert_close(out, results[0])
        for x, y in zip(grad, grads[0]):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
out, lse = ops.shifted_attention(q, k, v, *parameters, return_lse=True)
ops.attention_shift(out, lse, q, *parameters).sum().backward()
for impl in ("triton", "cuda"):
    try:
        ops.attention_shift(out, lse, q, *parameters, impl=impl)
    except (RuntimeError, NotImplementedError) as error:
        assert impl in str(error), error
    else:
        raise AssertionError(impl + " ran")
"""
    )
    run(script)


def test_ops_run_without_the_extension():
    script = """
import os
os.environ["MMICL_DISABLE_EXTENSION"] = "1"
import torch
from mmicl_kernels import _extension, ops
assert not _extension.load()
q = torch.randn(1, 2, 5, 8)
parameters = torch.randn(2, 8), torch.randn(2), torch.randn(2, 8)
torch.testing.assert_close(
    ops.shifted_attention(q, q, q, *parameters, causal=True, impl="composed"),
    ops.shifted_attention(q, q, q, *parameters, causal=True, impl="reference"),
)
"""
    run(script)


def test_hopper_kernels_say_why_they_do_not_run():
    script = """
import torch
from mmicl_kernels import ops
q = torch.randn(1, 2, 5, 64, dtype=torch.bfloat16)
try:
    ops.shifted_attention(q, q, q, *(torch.randn(2, *size) for size in ((64,), (), (64,))), impl="cuda")
except RuntimeError as error:
    assert str(error) == "impl='cuda' cannot run on cpu: it needs CUDA tensors", error
else:
    raise AssertionError("it ran")
"""
    run(script)


def test_names_that_need_transformers_say_so():
    script = BLOCK.format(names=["transformers"]) + (
        "import mmicl_kernels as mk\n"
        "try:\n    mk.attach\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    assert run(script).strip() == "mmicl_kernels.attach needs transformers: pip install 'mmicl-kernels[hf]'"
