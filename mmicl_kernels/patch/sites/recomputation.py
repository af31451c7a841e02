"""Gradient checkpointing that would give other gradients, refused."""

from torch import nn

from mmicl_kernels.methods.checkpointing import repeats_reentrant
from mmicl_kernels.models.anchors import Anchor


def refuse_reentrant_checkpointing(model: nn.Module, anchor: Anchor) -> None:
    """Raise RuntimeError where reentrant checkpointing of the layer would give other gradients, or none.

    It follows only what a layer is called with: not the keys that some decoders' layers read of earlier
    ones; and where none of that needs gradients, as behind a frozen embedding, it computes none at all.
    """
    layer = anchor.layer
    if not repeats_reentrant(layer):
        return
    if anchor.decoder.shares_kv or not _embedding_needs_gradients(model):
        raise RuntimeError(
            "gradient checkpointing has use_reentrant=True, expected "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}): "
            "reentrant, gradients would be wrong or missing here"
        )


def _embedding_needs_gradients(model: nn.Module) -> bool:
    embedding = model.get_input_embeddings()
    return embedding.weight.requires_grad or bool(getattr(model, "_require_grads_hooks", None))
