"""Whether a model is, object by object, what it was."""

from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.support.published import logits


def used_model(name, base="sdpa"):
    """transformers installs hooks of its own in the first forward."""
    model = tiny_model(name, attn_implementation=base)
    logits(model, tiny_inputs(model))
    return model


WRITTEN_BY_FORWARD = ("rope_deltas",)  # by Qwen2.5-VL, attached or not


def snapshot(model):
    """Every attribute of every module and config, by identity."""
    objects = dict(model.named_modules())
    configs = {
        f"{name}.config": module.config for name, module in objects.items() if hasattr(module, "config")
    }
    state = {}
    for name, thing in {**objects, **configs}.items():
        for key, value in getattr(thing, "__dict__", {}).items():
            state[name, key] = value
            if isinstance(value, dict):
                state.update({(name, key, inner): x for inner, x in value.items()})
    return state


def assert_same_objects(after, before):
    assert list(after) == list(before)
    assert changes(after, before) == []


def changes(after, before):
    return [key for key in before if after[key] is not before[key] and key[1] not in WRITTEN_BY_FORWARD]
