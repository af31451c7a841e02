"""Processors of the tiny models, their tokenizers made on the spot: no downloads, no torchvision."""

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from mmicl_kernels.models.pretrained import NoVideos, image_only
from mmicl_kernels.testing.tiny_models import IMAGE_ID, IMAGE_SIZE, PATCH_SIZE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # with the ids of the tiny models
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789▁.,?:!\n"
WORDS = ("▁red", "▁blue", "▁cat", "▁do")  # each one token, the space before it included
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}  # of an image, whose tokens are 28 x 28 pixels
QWEN = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>")


def _in_order(
    image: str,
    text: str = "{{ part['text'] }}",
    begin: str = "{{ message['role'] }}\n",
    end: str = "</s>",
) -> str:
    """A chat template with the parts of a turn as they come."""
    parts = f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{text}{{% endif %}}"
    turn = f"{begin}{{% for part in message['content'] %}}{parts}{{% endfor %}}"
    return f"{{{{ bos_token }}}}{{% for message in messages %}}{turn}{end}{{% endfor %}}"


def _images_first(image: str, text: str) -> str:
    """A chat template with a turn's images before its texts."""
    loops = [
        f"{{% for part in message['content'] | selectattr('type', 'equalto', '{kind}') %}}{{{{ {written} }}}}"
        "{% endfor %}"
        for kind, written in (("image", image), ("text", text))
    ]
    return "{% for message in messages %}USER: " + "".join(loops) + "{% endfor %}"


# What a turn is written by, in the words of the families' own templates.
CHAT_TEMPLATES = {
    "gemma3": _in_order("<start_of_image>", "{{ part['text'] | trim }}", "<start_of_turn>user\n"),
    "glm4v": _in_order("<|begin_of_image|><|image|><|end_of_image|>", begin="<|user|>\n"),
    "idefics2": _in_order("<image>", begin="{{ message['role'] | capitalize }}:", end="<end_of_utterance>\n"),
    "idefics3": _in_order(
        "<image>", begin="User{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    ),
    "internvl": _in_order("{{ '<IMG_CONTEXT>\\n' }}"),
    "llava": _images_first(r"'<image>\n'", "part['text'] + ' '"),
    "llava_onevision": _images_first("'<image>'", r"'\n' + part['text']"),
    # Its turns are headed by a system's, unless there are images.
    "mllama": "{% if not (messages[0]['content'] | selectattr('type', 'equalto', 'image') | list) %}"
    "system\n\n{% endif %}" + _in_order("<|image|>", begin="user\n\n"),
    "qwen2_vl": "<|im_start|>system\nhi<|im_end|>\n"
    + _in_order("<|vision_start|><|image_pad|><|vision_end|>", begin="<|im_start|>user\n"),
}
CHAT_TEMPLATES["qwen2_5_vl"] = CHAT_TEMPLATES["qwen2_vl"]


def tiny_tokenizer(*special: str, words: tuple[str, ...] = WORDS, **named: str) -> PreTrainedTokenizerFast:
    """A token per character and per one of ``words``; every text begins with "<s>".

    The token "<image>" is ``IMAGE_ID``, those of ``special`` follow. ``named`` says which the
    processor asks for by which name, such as ``image_token``.
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        extra_special_tokens=["<image>", *special],
        model_specific_special_tokens=named,
    )


def tiny_processor(name: str, *, words: tuple[str, ...] = WORDS, chat: bool = False) -> ProcessorMixin:
    """The processor of a family: of "llava" as the tiny models need it, or of another of ``MAKERS``.

    With ``chat`` it has a chat template.

    Raises:
        ImportError: this transformers has that family's image processor with torchvision alone.
    """

    def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
        return tiny_tokenizer(*special, words=words, **named)

    processor = MAKERS[name](tokenizer)
    processor.chat_template = CHAT_TEMPLATES[name] if chat else None
    return processor


def pil_images(family: str, name: str, **options: object) -> BaseImageProcessor:
    """The image processor of a family that works without torchvision."""
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{name}ImageProcessorPil")(**options)


def without_videos(name: str, *parts: object, **options: object) -> ProcessorMixin:
    """A processor whose last part, for videos, needs torchvision and is left out."""
    return image_only(getattr(transformers, name), [*parts, NoVideos()], options)


def _llava(tokenizer: Callable) -> ProcessorMixin:
    images = pil_images("clip", "CLIP", size=SQUARE, do_center_crop=False)
    # Of the vision tower's tokens the first is dropped and counted before.
    return transformers.LlavaProcessor(
        images, tokenizer(), patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def _llava_onevision(tokenizer: Callable) -> ProcessorMixin:
    images = pil_images(
        "llava_onevision", "LlavaOnevision", size=SQUARE, image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]]
    )
    return without_videos(
        "LlavaOnevisionProcessor", images, tokenizer("<video>"),
        num_image_tokens=4, vision_feature_select_strategy="full",
    )  # fmt: skip


def _idefics(tokenizer: Callable) -> ProcessorMixin:
    images = pil_images("idefics", "Idefics", image_size=IMAGE_SIZE)
    return transformers.IdeficsProcessor(images, tokenizer("<fake_token_around_image>"))


def _idefics2(tokenizer: Callable) -> ProcessorMixin:
    edges = {"longest_edge": 2 * IMAGE_SIZE, "shortest_edge": IMAGE_SIZE}
    images = pil_images("idefics2", "Idefics2", size=edges, do_image_splitting=False)
    special = ("<fake_token_around_image>", "<end_of_utterance>")
    return transformers.Idefics2Processor(images, tokenizer(*special), image_seq_len=2)


def _idefics3(tokenizer: Callable) -> ProcessorMixin:
    images = pil_images(
        "idefics3", "Idefics3", size={"longest_edge": 2 * IMAGE_SIZE},
        max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=False,
    )  # fmt: skip
    special = ("<fake_token_around_image>", "<global-img>")
    return transformers.Idefics3Processor(images, tokenizer(*special), image_seq_len=2)


def _qwen(name: str) -> Callable:
    def make(tokenizer: Callable) -> ProcessorMixin:
        return without_videos(name, pil_images("qwen2_vl", "Qwen2VL", size=PIXELS), tokenizer(*QWEN))

    return make


def _glm4v(tokenizer: Callable) -> ProcessorMixin:
    images = pil_images("glm4v", "Glm4v", size={**PIXELS, "longest_edge": 2 * 56 * 56})  # of two frames
    text = tokenizer("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>")
    return without_videos("Glm4vProcessor", images, text)


def _gemma3(tokenizer: Callable) -> ProcessorMixin:
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    images = pil_images("gemma3", "Gemma3", size=SQUARE)
    return transformers.Gemma3Processor(images, tokenizer(*names.values(), **names), image_seq_length=3)


def _internvl(tokenizer: Callable) -> ProcessorMixin:
    names = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    images = pil_images("got_ocr2", "GotOcr2", size=SQUARE, max_patches=1)
    text = tokenizer(*names.values(), **names)
    return without_videos("InternVLProcessor", images, text, image_seq_length=2)


def _mllama(tokenizer: Callable) -> ProcessorMixin:
    images = pil_images("mllama", "Mllama", size=SQUARE, max_image_tiles=1)
    return transformers.MllamaProcessor(images, tokenizer("<|image|>", "<|python_tag|>"))


def _paligemma(tokenizer: Callable) -> ProcessorMixin:
    images = pil_images("siglip", "Siglip", size=SQUARE)
    images.image_seq_length = 2
    return transformers.PaliGemmaProcessor(images, tokenizer())


MAKERS = {
    "gemma3": _gemma3,
    "glm4v": _glm4v,
    "idefics": _idefics,  # has no chat template
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "mllama": _mllama,
    "paligemma": _paligemma,  # has no chat template
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
}


def _growing(word: str) -> list[str]:
    return [word[: i + 1] for i in range(len(word))]
