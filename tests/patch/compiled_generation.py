"""Generation with a static cache, compiled as one graph; how many graphs there were."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def one_graph():
    """Options of ``generate``."""
    config = CompileConfig(fullgraph=True, backend="aot_eager")
    config._compile_all_devices = True  # transformers compiles on accelerators only, otherwise
    return {"cache_implementation": "static", "compile_config": config}


def generate(model, inputs, *, compiled=True):
    options = one_graph() if compiled else {"disable_compile": True}
    return model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, **options
    )


def assert_no_breaks():
    assert sum(counters["graph_break"].values()) == 0


def assert_graphs(count):
    assert_no_breaks()
    assert counters["stats"]["unique_graphs"] == count
