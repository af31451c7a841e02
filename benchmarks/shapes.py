"""The problem sizes that are measured, in the order of their value where time is limited."""

from dataclasses import dataclass
from itertools import product

import torch

LENGTHS = (256, 1024, 2048)
DTYPES = ("bfloat16", "float32")

# Query heads, key/value heads and head dim of the decoders' self-attention.
MODELS = {
    "Idefics2-8b": (32, 8, 128),
    "Idefics-9b, LLaVA-interleave-7B": (32, 32, 128),
    "Qwen2.5-VL-7B": (28, 4, 128),
    "SmolVLM": (32, 32, 64),
    "Phi-3.5-vision": (32, 32, 96),
}
IDEFICS2, MULTI_HEAD, QWEN, SMOLVLM, PHI = MODELS


@dataclass(frozen=True)
class Case:
    """One problem size, in the letters of the ops; ``dtype`` is a name in torch, ``model`` who has it."""

    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    dtype: str
    causal: bool = True
    backward: bool = False
    model: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def section(self) -> str:
        """The table it stands in: "forward", "training" or "decode"."""
        if self.T < self.S:
            return "decode"
        return "training" if self.backward else "forward"

    @property
    def label(self) -> str:
        name = f"{self.model} " if self.model else ""
        return f"{name}{self.section} {self.dtype} B={self.B} T={self.T} S={self.S}"


def prefill(model: str, T: int, B: int = 1, dtype: str = "bfloat16", backward: bool = False) -> Case:
    """A whole prompt."""
    H, G, D = MODELS[model]
    return Case(B=B, H=H, G=G, T=T, S=T, D=D, dtype=dtype, backward=backward, model=model)


def training(model: str, T: int, B: int = 1) -> Case:
    return prefill(model, T, B, backward=True)


def decode(model: str, S: int, B: int) -> Case:
    """One token that sees the whole cache; not causal, because a stock kernel's causal is top-left."""
    H, G, D = MODELS[model]
    return Case(B=B, H=H, G=G, T=1, S=S, D=D, dtype="bfloat16", causal=False, model=model)


CPU_ATTENTION = tuple(
    Case(B=1, H=8, G=8, T=T, S=T, D=128, dtype=dtype, backward=backward)
    for backward, dtype, T in product((False, True), DTYPES, LENGTHS)
)
CPU_SHIFT = tuple(Case(B=1, H=8, G=8, T=T, S=T, D=128, dtype=dtype) for dtype, T in product(DTYPES, LENGTHS))
# Hidden states are [B, T, H * D].
CPU_RESIDUAL = tuple(
    Case(B=1, H=32, G=32, T=T, S=T, D=128, dtype=dtype, backward=backward)
    for backward, dtype, T in product((False, True), DTYPES, (128, 512))
)

_K = 1024
# What targets are set for comes first, then every model, then the long tail of batches and lengths.
CUDA_ATTENTION = (
    *(prefill(IDEFICS2, T) for T in (1 * _K, 2 * _K, 4 * _K, 8 * _K, 16 * _K)),
    *(decode(IDEFICS2, S, B=8) for S in (16 * _K, 64 * _K)),
    *(training(IDEFICS2, T) for T in (2 * _K, 4 * _K, 8 * _K)),
    *(prefill(SMOLVLM, T) for T in (1 * _K, 2 * _K, 4 * _K, 8 * _K, 16 * _K)),
    *(prefill(IDEFICS2, T) for T in (128, 512)),
    decode(IDEFICS2, 1 * _K, B=1),
    decode(IDEFICS2, 16 * _K, B=1),
    decode(IDEFICS2, 16 * _K, B=64),
    *(prefill(model, 2 * _K) for model in (MULTI_HEAD, QWEN, PHI)),
    training(SMOLVLM, 2 * _K),
    prefill(IDEFICS2, 512, B=32),
    *(decode(model, 16 * _K, B=8) for model in (SMOLVLM, QWEN, PHI, MULTI_HEAD)),
    decode(IDEFICS2, 4 * _K, B=8),
    decode(IDEFICS2, 1 * _K, B=8),
    decode(IDEFICS2, 1 * _K, B=64),
    decode(IDEFICS2, 64 * _K, B=1),
    decode(IDEFICS2, 64 * _K, B=64),
    *(training(model, 2 * _K) for model in (MULTI_HEAD, QWEN, PHI)),
    training(SMOLVLM, 8 * _K),
    training(IDEFICS2, 512, B=8),
    *(prefill(model, T) for T in (8 * _K, 512) for model in (MULTI_HEAD, QWEN, PHI)),
    prefill(IDEFICS2, 2 * _K, B=8),
    prefill(IDEFICS2, 128, B=32),
    prefill(SMOLVLM, 512, B=32),
    prefill(SMOLVLM, 128),
    *(decode(model, 1 * _K, B=1) for model in (SMOLVLM, QWEN, PHI, MULTI_HEAD)),
    *(training(IDEFICS2, T) for T in (1 * _K, 16 * _K)),
    *(training(model, 8 * _K) for model in (QWEN, PHI, MULTI_HEAD)),
    *(prefill(model, 16 * _K) for model in (MULTI_HEAD, QWEN, PHI)),
    prefill(IDEFICS2, 2 * _K, dtype="float16"),
    prefill(IDEFICS2, 2 * _K, B=32),
)

# FlexAttention is compiled for every shape, for many seconds: only here.
WITH_FLEX = frozenset(
    (
        *(prefill(IDEFICS2, T) for T in (2 * _K, 8 * _K)),
        decode(IDEFICS2, 16 * _K, B=8),
        training(IDEFICS2, 4 * _K),
        prefill(SMOLVLM, 4 * _K),
        training(SMOLVLM, 2 * _K),
        prefill(IDEFICS2, 512, B=32),
    )
)

CUDA_SHIFT = (
    *(prefill(IDEFICS2, T) for T in (2 * _K, 8 * _K, 16 * _K, 1 * _K, 128)),
    *(Case(B=B, H=32, G=8, T=1, S=_K, D=128, dtype="bfloat16", model=IDEFICS2) for B in (1, 64)),
    prefill(SMOLVLM, 4 * _K),
    prefill(PHI, 4 * _K),
    prefill(IDEFICS2, 2 * _K, B=8),
)

CUDA_RESIDUAL = (
    *(prefill(IDEFICS2, T, backward=backward) for T in (4 * _K, 16 * _K) for backward in (False, True)),
    *(Case(B=B, H=32, G=8, T=1, S=_K, D=128, dtype="bfloat16", model=IDEFICS2) for B in (1, 64)),
    prefill(SMOLVLM, 8 * _K),
    training(QWEN, 8 * _K),
    training(IDEFICS2, 512, B=8),
)
