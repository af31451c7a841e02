"""A problem size, and the sizes that models have."""

from dataclasses import dataclass

import torch

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


def square(
    B: int,
    T: int,
    H: int,
    D: int = 128,
    dtype: str = "bfloat16",
    backward: bool = False,
    model: str = "",
    groups: int = 1,
) -> Case:
    """As many keys as queries, in ``H // groups`` heads."""
    return Case(B=B, H=H, G=H // groups, T=T, S=T, D=D, dtype=dtype, backward=backward, model=model)


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
