"""Tiny processors with chat templates, and real ones, where this environment can make them."""

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
