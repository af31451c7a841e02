"""Every method once more on every family, in plain PyTorch and from names written by hand.

Nothing here reads the package's tables: what ``attach`` finds is compared with what stands here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

import mmicl_kernels as mk
from mmicl_kernels.methods import Adapter
from tests.patch.spliced_prompts import CHOSEN, LEARNED, PLACEHOLDERS, learned_prompt, longer, ordinary_tokens
from tests.support.published import published, random_adapter
from tests.support.residuals import Moved, MovedWithNorm, decoder_layers, random_shift

METHODS = ("mimic", "m2iv", "live", "aim")  # of the support matrix
EVERY_METHOD = (*METHODS, "prompt_tuning")  # which is spliced as AIM's tokens are
# Layers that norm what a branch returned before it joins the stream.
NORM_OF_ATTENTION = {
    "Gemma2DecoderLayer": "post_attention_layernorm",
    "Gemma3DecoderLayer": "post_attention_layernorm",
    "Gemma4TextDecoderLayer": "post_attention_layernorm",
    "Glm4vTextDecoderLayer": "post_self_attn_layernorm",
}
# The last linear layer of every kind of attention, and of what stands in its place.
LAST_OF_MIXER = ("self_attn.o_proj", "self_attn.out_proj", "linear_attn.out_proj", "conv.out_proj")
MLPS = ("mlp", "feed_forward", "fc2")
Prompts = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def submodule(layer: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    """The one of ``paths`` that there is."""
    names = dict(layer.named_modules())
    (path,) = [path for path in paths if path in names]
    return names[path]


def end_of_attention(layer: nn.Module) -> nn.Module:
    name = NORM_OF_ATTENTION.get(type(layer).__name__)
    if getattr(layer, "norm_after", False):  # of Molmo2
        name = "input_layernorm"
    return getattr(layer, name) if name else submodule(layer, LAST_OF_MIXER)


def adapter_of(model: PreTrainedModel, method: str) -> Adapter:
    """One whose effect is large."""
    if method == "mimic":
        return random_adapter(model)
    if method == "prompt_tuning":
        return learned_prompt(model)
    config = {"m2iv": mk.M2IVConfig(), "live": mk.LIVEConfig(), "aim": mk.AIMConfig()}[method]
    return mk.create(model, config) if method == "aim" else random_shift(model, config)


@contextmanager
def independent(model: PreTrainedModel, method: str, adapter: Adapter) -> Iterator[Prompts]:
    """``model`` with the method of ``adapter`` as plain PyTorch; yields what makes prompts its inputs."""
    if method == "prompt_tuning":
        yield lambda inputs: longer(inputs, LEARNED[: len(inputs["input_ids"])])
    elif method == "aim":
        yield lambda inputs: longer(inputs, CHOSEN[: len(inputs["input_ids"])])
    elif method == "mimic":
        with published(model, adapter):
            yield dict
    else:
        with _moved(model, method, adapter):
            yield dict


@contextmanager
def _moved(model: PreTrainedModel, method: str, adapter: Adapter) -> Iterator[None]:
    """Forwards that add vectors: after both branches (M2IV), or to the MLP's with its norm kept (LIVE)."""
    changed = []
    for index, layer in decoder_layers(model).items():
        of = adapter.layers[index]
        if method == "m2iv":
            changed += [(end_of_attention(layer), Moved, of.attn), (layer, Moved, of.mlp)]
        else:
            changed.append((submodule(layer, MLPS), MovedWithNorm, of))
    try:
        for module, form, shift in changed:
            module.forward = form(module.forward, shift.scale * shift.vector)
        yield
    finally:
        for module, _, _ in changed:
            del module.forward


@contextmanager
def attached(model: PreTrainedModel, method: str, adapter: Adapter) -> Iterator[Prompts]:
    """The same by ``attach``."""
    options = {"placeholder_ids": PLACEHOLDERS} if adapter.embedding_site is not None else {}
    with mk.attach(model, adapter, **options) as handle:
        if method == "aim":
            trained = model.get_input_embeddings().weight.requires_grad
            tokens = ordinary_tokens(model, trained=trained)
            yield lambda inputs: handle.splice(inputs, CHOSEN[: len(inputs["input_ids"])], tokens=tokens)
        elif method == "prompt_tuning":
            yield handle.splice
        else:
            yield dict
