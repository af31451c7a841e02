"""Tiny processors with chat templates, and real ones, where this environment can make them."""

from contextlib import contextmanager
from functools import partial

import pytest

from mmicl_kernels.testing.real_processors import REAL_PROCESSORS, smolvlm_processor
from mmicl_kernels.testing.tiny_processors import tiny_processor

REAL = {f"real-{name}": make for name, make in REAL_PROCESSORS.items()}
REAL["real-smolvlm-whole"] = partial(smolvlm_processor, split=False)


def processor_of(name, *, chat=True, template=None, **options):
    """One of the tiny processors or of ``REAL``, which have their chat templates anyway."""
    try:
        processor = REAL[name](**options) if name in REAL else tiny_processor(name, chat=chat, **options)
    except ImportError as error:  # of packages; of an older transformers, whose PIL images need torchvision
        pytest.skip(str(error))
    if template is not None:
        processor.chat_template = template
    return processor


@contextmanager
def needs_torchvision():
    """In transformers 5.17 some image processors are found with torchvision alone."""
    try:
        yield
    except ValueError as error:
        if "None of these classes could be imported" not in str(error):
            raise
        pytest.skip(str(error))


def tokens(builder, row, mask):
    return builder.processor.tokenizer.convert_ids_to_tokens(row[mask.bool()])


def chosen(builder, inputs, mask):
    """Of each prompt those tokens that ``mask`` has."""
    return [tokens(builder, *pair) for pair in zip(inputs["input_ids"], mask, strict=True)]


def rows(builder, inputs):
    """Each prompt's own tokens."""
    return chosen(builder, inputs, inputs["attention_mask"])
