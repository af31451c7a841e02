"""Gradient checkpointing, which runs layers twice."""

from torch import nn


def repeats_reentrant(layer: nn.Module) -> bool:
    """Whether reentrant checkpointing runs ``layer``, without gradients at first and again with them."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    keywords = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(keywords.get("use_reentrant", False))


def refuse_checkpointing(model: nn.Module, config: object, name: str, instead: object) -> None:
    """Raise ValueError under gradient checkpointing, unless ``config`` has ``instead`` as ``name``."""
    # A checkpointed layer runs without a graph first, so what a hook inside it sees has no gradient.
    if getattr(config, name) != instead and _is_checkpointing(model):
        raise ValueError(
            f"{name} is {getattr(config, name)!r} and gradient checkpointing is on, "
            f"expected {name}={instead!r}, model.eval() or model.gradient_checkpointing_disable()"
        )


def refuse_recorded_checkpoints(model: nn.Module, layer: nn.Module) -> None:
    """Raise ValueError where gradient checkpointing runs a layer's hooks again: records would be lost.

    Before 5.23, transformers checkpoints the whole call of a layer; since then its forward alone.
    """
    if _is_checkpointing(model) and type(layer).__call__ is not nn.Module.__call__:
        raise ValueError(
            "gradient checkpointing is on, and this version of transformers runs the hooks of layers within "
            "it: expected model.eval(), model.gradient_checkpointing_disable() or transformers 5.23"
        )


def _is_checkpointing(model: nn.Module) -> bool:
    # The model's own property has another name in each version of transformers.
    return model.training and any(getattr(x, "gradient_checkpointing", False) for x in model.modules())
