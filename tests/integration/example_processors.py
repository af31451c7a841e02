"""Tiny processors with chat templates, where this version of transformers can make them."""

import pytest

from mmicl_kernels.testing.tiny_processors import tiny_processor


def processor_of(name, *, chat=True, template=None, **options):
    try:
        processor = tiny_processor(name, chat=chat, **options)
    except ImportError as error:  # an older transformers has its image processor with torchvision alone
        pytest.skip(str(error))
    if template is not None:
        processor.chat_template = template
    return processor
