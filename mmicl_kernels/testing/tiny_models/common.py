"""Sizes and ids that all tiny models share."""

import torch
from torch import Tensor

IMAGE_SIZE = 8
PATCH_SIZE = 4
VOCABULARY = 64
IMAGE_ID = 60
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}


def place_images(ids: Tensor, attention_mask: Tensor, count: int, *around: int) -> None:
    """Write ``count`` image tokens, between ``around``'s two if given, after each row's first token."""
    for row in range(ids.shape[0]):
        start = int(attention_mask[row].argmax()) + 1
        tokens = [IMAGE_ID] * count
        if around:
            tokens = [around[0], *tokens, around[1]]
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
