"""Prompts with fused tokens before them, and the same prompts with ordinary tokens in their place."""

import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import FusedTokens

# What the bank's demonstrations are made of: ordinary tokens, so that prompts can have them too.
DEMONSTRATIONS = [[5, 9, 11], [], [7], [20, 21, 22, 23, 24, 25, 26], [7, 7]]
CHOSEN = [[0, 3], [4, 1, 0, 0]]
LEARNED = [[0], [0]]  # what learned tokens are: those of one demonstration
PLACEHOLDERS = (59, 58)


def ordinary_tokens(model, *, trained=False):
    """The bank as the embeddings of ``DEMONSTRATIONS``, with gradients to them if ``trained``."""
    lengths = [len(x) for x in DEMONSTRATIONS]
    ids = torch.tensor([token for x in DEMONSTRATIONS for token in x])
    embedding = model.get_input_embeddings()
    with torch.set_grad_enabled(trained):
        rows = embedding(ids.to(embedding.weight.device))
    return FusedTokens(rows, torch.tensor([0, *lengths]).cumsum(0).to(rows.device), None)


def learned_prompt(model):
    """A prompt that learned to be the tokens of ``LEARNED``."""
    tokens = ordinary_tokens(model)
    first, last = tokens.offsets[:2].tolist()
    adapter = mk.create(model, mk.PromptTuningConfig(num_tokens=last - first)).to(tokens.rows.dtype)
    with torch.no_grad():
        adapter.tokens.copy_(tokens.rows[first:last])
    return adapter


def longer(inputs, chosen, begins=()):
    """``inputs`` written anew with the demonstrations' ids, row by row; padded where they are."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    right = not mask[:, -1].all()
    fused = torch.tensor([sum(len(DEMONSTRATIONS[d]) for d in of) for of in chosen])
    L = int((mask.sum(-1) + fused).max())
    out = dict(inputs)
    for name, x in inputs.items():
        if not per_token(name, x, ids.shape):
            continue
        rows = []
        for r, of in enumerate(chosen):
            own = x[r][mask[r]]
            lead = int(int(ids[r][mask[r]][0]) in begins)
            tokens = [token for d in of for token in DEMONSTRATIONS[d]]
            prefix = torch.full((len(tokens), *x.shape[2:]), int(name == "attention_mask"), dtype=x.dtype)
            if name == "input_ids":
                prefix = torch.tensor(tokens, dtype=x.dtype)
            row = torch.cat([own[:lead], prefix, own[lead:]])
            padding = torch.zeros(L - len(row), *x.shape[2:], dtype=x.dtype)
            rows.append(torch.cat([row, padding] if right else [padding, row]))
        out[name] = torch.stack(rows)
    return out


def per_token(name, x, shape):
    masks = ("attention_mask", "image_attention_mask", "cross_attention_mask")
    named = name == "input_ids" or name in masks or name.endswith("token_type_ids")
    return named and x.shape[:2] == shape  # Phi4's image_attention_mask has one entry per image
