"""What a batch must be: the same tokens asked twice, no padding among them, labels that are the prompt's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature

from mmicl_kernels.testing.tiny_models import TINY_MODELS, tiny_model
from mmicl_kernels.training import ManyShotBatch
from tests.support.episode_inputs import aggregation, demonstrated, episode, many_shot
from tests.training.watching import Waits


def batch_of(padding=None):
    return episode(tiny_model("llava-llama"), padding=padding)


def with_ids(batch, who, row, position, token):
    inputs = dict(getattr(batch, who))
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][row, position] = token
    return {who: inputs}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_fine(name, padding):
    """Image tokens, M-RoPE's inputs, prompts of other lengths and either side of padding."""
    model = tiny_model(name)
    batch = many_shot(model, padding=padding)
    assert len(batch.further) == 2
    aggregation(model, padding=padding)
    # The teacher's prompts padded on the other side than the student's.
    pad = (0, 3) if padding == "left" else (3, 0)
    ids, mask = (F.pad(batch.teacher[x], pad) for x in ("input_ids", "attention_mask"))
    query = F.pad(batch.teacher_query, pad)
    replace(batch, teacher={"input_ids": ids, "attention_mask": mask}, teacher_query=query)


def test_a_token_that_merged():
    """As many tokens, the first of them another one: ``Question:`` after a line's end."""
    batch = batch_of()
    merged = with_ids(batch, "teacher", 1, 5 + 1, 37)
    there = int(batch.student["input_ids"][1, 1])
    assert there != 37
    with pytest.raises(
        ValueError,
        match=rf"teacher_query marks id 37 as token 0 of row 1, at position 6, expected id {there} as "
        "student_query does at position 1.*merged",
    ):
        replace(batch, **merged)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("k", [0, 3, -1])
def test_any_token_in_any_row(padding, k):
    batch = batch_of(padding)
    for row in range(2):
        mine, theirs = (x[row].nonzero()[k].item() for x in (batch.student_query, batch.teacher_query))
        wanted = int(batch.student["input_ids"][row, mine])
        rank = range(int(batch.student_query[row].sum()))[k]
        with pytest.raises(ValueError) as error:
            replace(batch, **with_ids(batch, "teacher", row, theirs, wanted ^ 1))
        assert str(error.value).startswith(
            f"teacher_query marks id {wanted ^ 1} as token {rank} of row {row}, at position {theirs}, "
            f"expected id {wanted} as student_query does at position {mine}:"
        )


def test_the_order_counts():
    batch = batch_of()
    ids = batch.teacher["input_ids"].clone()
    ids[0, -4:] = ids[0, -4:].flip(0)
    assert sorted(ids[0].tolist()) == sorted(batch.teacher["input_ids"][0].tolist())
    with pytest.raises(ValueError, match="teacher_query marks id .* the same order"):
        replace(batch, teacher={**batch.teacher, "input_ids": ids})


def test_a_mask_that_is_one_token_off():
    batch = batch_of()
    off = batch.teacher_query.roll(-1, 1)
    with pytest.raises(ValueError, match="teacher_query marks id .* as token 0 of row 0, at position 5"):
        replace(batch, teacher_query=off)


def test_rows_must_match_one_to_one():
    batch = batch_of()
    fewer = batch.teacher_query.clone()
    fewer[1, -1] = False
    with pytest.raises(
        ValueError, match=r"teacher_query marks \[11, 10\] tokens per row, expected \[11, 11\]"
    ):
        replace(batch, teacher_query=fewer)
    swapped = batch.teacher_query.clone()
    swapped[0, -1], swapped[1, 0] = False, True  # the same total, other rows
    with pytest.raises(ValueError, match=r"teacher_query marks \[10, 12\] tokens per row"):
        replace(batch, teacher_query=swapped)
    one = {name: x[:1] for name, x in batch.teacher.items()}
    with pytest.raises(ValueError, match="teacher_query has 1 rows, expected 2 like student_query"):
        replace(batch, teacher=one, teacher_query=batch.teacher_query[:1])


def test_further_passes_must_match():
    batch = many_shot(tiny_model("llava-llama"))
    fewer = batch.teacher_query.clone()
    fewer[0, -1] = False
    with pytest.raises(ValueError, match=r"further\[0\]: teacher_query marks \[10, 11\] tokens per row"):
        replace(batch, further=((batch.teacher, fewer),))
    other = with_ids(batch, "teacher", 0, -2, 3)["teacher"]
    further = (batch.further[0], (other, batch.teacher_query))
    with pytest.raises(
        ValueError, match=r"further\[1\]: teacher_query marks id 3 as token 9 of row 0, at pos"
    ):
        replace(batch, further=further)
    hidden = {**batch.teacher, "attention_mask": torch.zeros_like(batch.teacher["attention_mask"])}
    with pytest.raises(ValueError, match=r"further\[0\]: teacher_query marks \[11, 11\] tokens .* hides"):
        replace(batch, further=((hidden, batch.teacher_query),))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_padding_is_no_token_of_a_query(who):
    batch = batch_of("left")
    hidden = getattr(batch, who)["attention_mask"].clone()
    hidden[0, -1] = 0
    with pytest.raises(ValueError, match=rf"{who}_query marks \[1, 0\] tokens per row that attention_mask"):
        replace(batch, **{who: {**getattr(batch, who), "attention_mask": hidden}})


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_masks_of_another_form(who):
    batch, what = batch_of(), f"{who}_query"
    mask = getattr(batch, what)
    for wrong in (mask[:, :-1], mask.int(), mask[0], mask[..., None], mask.float()):
        with pytest.raises(
            ValueError, match=rf"{what} is torch.* expected torch.bool \[2, {mask.shape[1]}\]"
        ):
            replace(batch, **{what: wrong})
    with pytest.raises(TypeError, match=f"{what} is a list, expected a tensor"):
        replace(batch, **{what: mask.tolist()})
    short = {**getattr(batch, who), "attention_mask": getattr(batch, who)["attention_mask"][:, 1:]}
    with pytest.raises(ValueError, match=rf"attention_mask of {who} is \[2, {mask.shape[1] - 1}\], expected"):
        replace(batch, **{who: short})
    with pytest.raises(ValueError, match=rf"{who} has \['pixel_values'\], expected input_ids"):
        replace(batch, **{who: {"pixel_values": torch.zeros(2, 3)}})
    with pytest.raises(TypeError, match=f"{who} is a Tensor, expected inputs of model"):
        replace(batch, **{who: mask})


def test_labels_are_the_prompts_ids():
    for batch, what in ((batch_of(), "student"), (aggregation(tiny_model("llava-llama")), "queries")):
        ids = getattr(batch, what)["input_ids"]
        labels = batch.labels.clone()
        labels[1, -1] = wrong = (int(ids[1, -1]) + 1) % 50
        with pytest.raises(
            ValueError,
            match=f"labels has {wrong} in row 1 at position 11, expected {int(ids[1, -1])} as input_",
        ):
            replace(batch, labels=labels)
        labels = torch.where(batch.labels != -100, batch.labels.roll(1, 1), -100)  # shifted once too often
        with pytest.raises(ValueError, match="labels has "):
            replace(batch, labels=labels)
        for wrong in (batch.labels.int(), batch.labels[:, 1:], batch.labels.float(), batch.labels[0]):
            with pytest.raises(ValueError, match=r"labels is torch.* expected torch.int64 \[2, 12\]"):
                replace(batch, labels=wrong)
        first = batch.labels.clone()
        first[:, 0] = 7  # predicted by nothing
        replace(batch, labels=first)
        replace(batch, labels=ids.clone())


def test_prompts_without_ids_are_counted():
    """Of ``inputs_embeds`` nobody knows the ids."""
    batch = batch_of()
    embeds = {"inputs_embeds": torch.randn(2, 17, 8)}
    merged = with_ids(batch, "student", 1, 1, 37)["student"]
    replace(batch, teacher=embeds)
    replace(batch, teacher=embeds, student=merged)
    replace(batch, student={"inputs_embeds": torch.randn(2, 12, 8)})
    with pytest.raises(ValueError, match=r"teacher_query marks \[10, 11\] tokens per row"):
        fewer = batch.teacher_query.clone()
        fewer[0, 9] = False
        replace(batch, teacher=embeds, teacher_query=fewer)


def test_demonstrations_of_another_form():
    batch = aggregation(tiny_model("llava-llama"))
    with pytest.raises(
        ValueError, match=r"positions is torch.int32 \[3, 12\], expected torch.bool \[3, 12\]"
    ):
        replace(batch, positions=torch.zeros(3, 12, dtype=torch.int32))
    with pytest.raises(ValueError, match="demonstrations has "):
        replace(batch, demonstrations={})


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_check_waits_once(padding):
    """For a device, of however many passes."""
    model = tiny_model("llava-llama")
    batch, aims = many_shot(model, passes=4, padding=padding), aggregation(model, padding=padding)
    for given in (batch, aims):
        with Waits() as waits:
            replace(given)
        assert waits.seen == ["_local_scalar_dense"]
    with Waits() as waits:
        batch.to("cpu"), aims.to("cpu")
        batch.arguments(), aims.arguments()
    assert waits.seen == []


def tensors_of(value):
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for v in value.values() for x in tensors_of(v)]
    return [x for v in value for x in tensors_of(v)] if isinstance(value, tuple | list) else []


def test_arguments_are_all_fields():
    model = tiny_model("llava-llama")
    for batch in (episode(model), many_shot(model), aggregation(model)):
        arguments = batch.arguments()
        assert arguments.keys() == {"inputs", "labels"}
        assert arguments["labels"] is batch.labels
        again = type(batch)(**arguments["inputs"], labels=arguments["labels"])
        assert list(map(id, tensors_of(vars(again)))) == list(map(id, tensors_of(vars(batch))))


def test_what_a_processor_returns_becomes_plain():
    """A ``BatchFeature`` is no dict: DistributedDataParallel would not move its tensors."""
    batch = batch_of()
    given = replace(batch, student=BatchFeature(batch.student))
    assert type(given.arguments()["inputs"]["student"]) is dict
    assert type(given.to("meta").student) is dict


def test_to_a_device():
    model = tiny_model("llava-llama")
    for batch in (episode(model), many_shot(model), aggregation(model)):
        moved = batch.to("meta")
        assert type(moved) is type(batch)
        assert len(tensors_of(vars(moved))) == len(tensors_of(vars(batch))) > 5
        assert all(x.device.type == "meta" for x in tensors_of(vars(moved)))
        assert all(x.device.type == "cpu" for x in tensors_of(vars(batch)))
    assert moved.chosen == batch.chosen and moved.positions is None


def test_a_teacher_may_have_other_demonstrations():
    """Only the query is compared: what is before it may be anything."""
    model = tiny_model("llava-llama")
    batch = episode(model)
    other = demonstrated(batch.student, torch.Generator().manual_seed(5))
    assert not torch.equal(other["input_ids"], batch.teacher["input_ids"])
    assert isinstance(ManyShotBatch(**vars(replace(batch, teacher=other))), ManyShotBatch)
