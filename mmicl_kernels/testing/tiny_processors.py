"""Processors of the tiny models, their tokenizers made on the spot: no downloads, no torchvision."""

from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from mmicl_kernels.testing.tiny_models import IMAGE_ID, IMAGE_SIZE, PATCH_SIZE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # with the ids of the tiny models
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789▁.,?:!\n"
WORDS = ("▁red", "▁blue", "▁cat", "▁do")  # each one token, the space before it included
IDEFICS3 = ("<fake_token_around_image>", "<global-img>")


def tiny_tokenizer(*special: str, words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """A token per character and per one of ``words``; every text begins with "<s>".

    The image's token is ``IMAGE_ID``, those of ``special`` follow.
    """
    merges = dict.fromkeys(pair for word in words for pair in pairwise(_growing(word)))
    tokens = dict.fromkeys([*SPECIAL, *ALPHABET, *(longer for _, longer in merges)])
    unused = [f"<unused{i}>" for i in range(IMAGE_ID - len(tokens))]
    vocabulary = {token: i for i, token in enumerate([*tokens, *unused, "<image>", *special])}
    rules = [(shorter, longer[-1]) for shorter, longer in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=rules, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    extra = {"additional_special_tokens": ["<image>", *special]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **extra)


def tiny_processor(name: str, *, words: tuple[str, ...] = WORDS) -> ProcessorMixin:
    """The processor of "llava", as the tiny models need it, or of "idefics3"."""
    if name == "llava":
        images = CLIPImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)
        # Of the vision tower's tokens the first is dropped and counted before.
        return LlavaProcessor(
            images, tiny_tokenizer(words=words), patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * IMAGE_SIZE},
        max_image_size={"longest_edge": IMAGE_SIZE},
        do_image_splitting=False,
    )
    return Idefics3Processor(images, tiny_tokenizer(*IDEFICS3, words=words), image_seq_len=2)


def _growing(word: str) -> list[str]:
    return [word[: i + 1] for i in range(len(word))]
