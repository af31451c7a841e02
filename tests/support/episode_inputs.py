"""Random batches for the tiny models, of every objective.

The teacher of an episode sees the student's prompt after some more text.
"""

import torch
from torch.nn import functional as F

from mmicl_kernels.testing.tiny_models import tiny_inputs
from mmicl_kernels.training import AggregationBatch, EpisodeBatch, ManyShotBatch

DEMONSTRATION = 5  # tokens


def objective_of(handle):
    """That of the adapter's method, as ``TrainedModule`` has it."""
    return handle.single.objective_class()(handle)


def episode(model, *, padding=None, seed=0, length=12, batch=2):
    """Two queries; the last three tokens are the answer, the first is not compared."""
    student = tiny_inputs(model, batch=batch, length=length, padding=padding)
    generator = torch.Generator().manual_seed(seed)
    attended = student["attention_mask"].bool()
    text = (student["input_ids"] < 50) & attended  # images and special tokens stay
    ids = torch.randint(3, 50, text.shape, generator=generator)
    student["input_ids"] = torch.where(text, ids, student["input_ids"])
    dtype = model.get_input_embeddings().weight.dtype
    student["pixel_values"] = student["pixel_values"].to(dtype)

    query = attended.clone()
    query[torch.arange(len(query)), attended.int().argmax(1)] = False
    labels = torch.full_like(student["input_ids"], -100)
    for row, last in enumerate(length - 1 - attended.flip(1).int().argmax(1)):
        labels[row, last - 2 : last + 1] = student["input_ids"][row, last - 2 : last + 1]
    teacher_query = F.pad(query, (DEMONSTRATION, 0), value=False)
    return EpisodeBatch(student, demonstrated(student, generator), query, teacher_query, labels)


def demonstrated(student, generator):
    demonstration = torch.randint(3, 50, (len(student["input_ids"]), DEMONSTRATION), generator=generator)
    teacher = {**student, "input_ids": torch.cat([demonstration, student["input_ids"]], 1)}
    teacher["attention_mask"] = F.pad(student["attention_mask"], (DEMONSTRATION, 0), value=1)
    if "mm_token_type_ids" in student:
        teacher["mm_token_type_ids"] = F.pad(student["mm_token_type_ids"], (DEMONSTRATION, 0))
    if "image_attention_mask" in student:
        mask = student["image_attention_mask"]
        teacher["image_attention_mask"] = torch.cat([mask[:, :1].expand(-1, DEMONSTRATION, -1), mask], 1)
    return teacher


def many_shot(model, *, passes=3, padding=None, batch=2):
    one = episode(model, padding=padding, batch=batch)
    generator = torch.Generator().manual_seed(9)
    further = [(demonstrated(one.student, generator), one.teacher_query) for _ in range(passes - 1)]
    return ManyShotBatch(**vars(one), further=tuple(further))


def aggregation(model, *, padding="left", chosen=((0, 2), (1, 1, 0)), seed=0):
    """Demonstrations, and the prompts of an episode, each after those that are ``chosen`` for it."""
    queries = episode(model, padding=padding, seed=seed, batch=len(chosen))
    demonstrations = tiny_inputs(model, batch=1 + max(map(max, chosen)), padding="right")
    return AggregationBatch(demonstrations, None, queries.student, queries.labels, chosen)


def half_of(batch, rank):
    """Half of the queries; of demonstrations the half that they have."""
    fields = dict(vars(batch))
    chosen = fields.pop("chosen", None)
    halves = {name: _half_of(x, rank) for name, x in fields.items()}
    if chosen is not None:
        mine = chosen[rank * len(chosen) // 2 :][: len(chosen) // 2]
        first = len(halves["demonstrations"]["input_ids"]) * rank
        halves["chosen"] = [[x - first for x in row] for row in mine]
    return type(batch)(**halves)


def _half_of(value, rank):
    if torch.is_tensor(value):
        return value.chunk(2)[rank]
    if isinstance(value, dict):
        return {name: _half_of(x, rank) for name, x in value.items()}
    return value if value is None else tuple(_half_of(x, rank) for x in value)
