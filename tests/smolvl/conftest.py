"""The real model, once; its adapters are taken off again by whoever attaches them."""

import pytest

from benchmarks.experiments.smolvl import tasks
from benchmarks.experiments.smolvl.model import load_model, load_processor


@pytest.fixture(scope="session")
def processor():
    return load_processor()


@pytest.fixture(scope="session")
def prompts(processor):
    return tasks.task_prompts(processor)


@pytest.fixture(scope="session")
def model():
    return load_model()
