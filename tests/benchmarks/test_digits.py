"""The digits world and its shipped model: what is drawn, how prompts are built, what is learned."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from benchmarks.experiments.digits import data, evaluate, model, pretrain
from benchmarks.experiments.digits.processor import DigitsPrompts
from mmicl_kernels.training import EpisodeCollator


@pytest.fixture(scope="module")
def lvlm():
    return model.load_model()


@pytest.fixture(scope="module")
def prompts():
    return DigitsPrompts()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def answer_indices(examples, task):
    answers = [x.answer for x in examples if x.task == task]
    return torch.tensor([data.WORDS[task].index(answer) for answer in answers])


def as_images(pixels):
    """``[N, 3, 16, 16]`` in [0, 1]."""
    return torch.from_numpy(pixels).movedim(-1, 1) / 255


def test_splits_are_disjoint_and_complete():
    parts = [data.split_scans(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1200, 200, 397]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    # The shipped weights were trained on this very split.
    assert parts[2][:5].tolist() == [786, 873, 1655, 819, 1243]


def test_examples_are_all_scans_of_their_split_before_one_comes_again(generator):
    examples = data.Examples(("ink", "size"), "test", generator=generator, count=2 * 397 + 1)
    assert len(examples) == 2 * (2 * 397 + 1) and len({x.id for x in examples}) == len(examples)
    scans = [x.scan for x in examples if x.task == "ink"]
    assert sorted(scans[:397]) == sorted(scans[397:-1]) == data.split_scans("test").sort().values.tolist()
    assert scans[:397] != scans[397:-1]
    first, again = (np.frombuffer(examples[2 * scans.index(scans[-1], k)].image, np.uint8) for k in (0, 397))
    assert not np.array_equal(first, again)  # drawn anew
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_questions_keep_to_their_splits():
    batches = list(evaluate.questions("ink", 16, "test"))
    queries = [x for part, _ in batches for x in part]
    assert sorted(x.scan for x in queries) == data.split_scans("test").sort().values.tolist()
    train = set(data.split_scans("train").tolist())
    assert {x.scan for _, rows in batches for row in rows for x in row} <= train
    assert {len(row) for _, rows in batches for row in rows} == {16}
    for options in ({}, {"scrambled": True}):
        again = next(evaluate.questions("size", 3, "test", **options))[0]
        assert [x.image for x in again] == [x.image for x in queries[:64]]


def test_demonstrations_are_distinct_and_never_the_query(generator):
    pool = data.Examples(("ink", "digit"), "validation", generator=generator, count=600)
    for query in [pool[i] for i in range(0, len(pool), 7)]:
        drawn = [pool[i] for i in data.other_scans(pool, query, 40, generator)]
        scans = {x.scan for x in drawn}
        assert len(scans) == 40 and query.scan not in scans
        assert {x.task for x in drawn} == {query.task}


@pytest.mark.parametrize("augment", [False, True])
def test_corner_has_the_paper_colour(generator, augment):
    examples = data.Examples(("paper",), "train", generator=generator, count=300, augment=augment)
    corner = as_images(examples.pixels)[:, :, 0, 0]
    nearest = torch.cdist(corner, data.PAPER_RGB).argmin(1)
    assert torch.equal(nearest, answer_indices(examples, "paper"))
    if not augment:
        torch.testing.assert_close(corner, data.PAPER_RGB[nearest], rtol=0, atol=HALF_A_STEP)


HALF_A_STEP = 0.5 / 255 + 1e-6  # by which eight bits are off, and the rounding of fp32


def test_every_pixel_is_a_mix_of_the_paper_and_the_ink(generator):
    examples = data.Examples(("paper", "ink"), "train", generator=generator, count=300)
    pixels = as_images(examples.pixels).flatten(2)
    paper = data.PAPER_RGB[answer_indices(examples, "paper")][:, :, None]
    towards_ink = data.INK_RGB[answer_indices(examples, "ink")][:, :, None] - paper
    coverage = ((pixels - paper) * towards_ink).sum(1) / (towards_ink**2).sum(1)
    # Three colours, each off by half a step, move the mix that is found by at most as much.
    mixed = paper + coverage[:, None] * towards_ink
    torch.testing.assert_close(pixels, mixed, rtol=0, atol=(1 + 3**0.5) * HALF_A_STEP)
    assert coverage.amax(1).min() > 0.7 and coverage.min() > -0.01


def test_turned_is_a_quarter_turn_and_digits_are_the_scans():
    scans, digits = data.all_scans()
    colour = torch.zeros(20, dtype=torch.long)
    upright, turned = (
        data.render(scans[:20], colour, colour, torch.full((20,), flag)) for flag in (False, True)
    )
    assert torch.equal(turned, upright.rot90(1, (2, 3)))
    # Averaged back to 4x4, the ink of the drawing is that of the scan.
    ink = (upright[:, 0] - upright[:, 0].amax()) / -(data.PAPER_RGB[0] - data.INK_RGB[0])[0]
    small = torch.nn.functional.avg_pool2d(ink[:, None, 2:14, 2:14], 3)
    expected = torch.nn.functional.avg_pool2d(scans[:20, None], 2)
    assert (small - expected).abs().max() < 0.25 and (small - expected).abs().mean() < 0.05


def test_answers_follow_from_the_digit(generator):
    examples = data.Examples(data.TASKS, "train", generator=generator)
    digit = data.all_scans()[1][examples.scans]
    assert torch.equal(answer_indices(examples, "digit"), digit)
    assert torch.equal(answer_indices(examples, "next"), (digit + 1) % 10)
    assert torch.equal(answer_indices(examples, "parity"), digit % 2)
    assert torch.equal(answer_indices(examples, "size"), (digit > 4).long())


def test_only_digit_and_next_share_words():
    shared = {(a, b) for a in data.TASKS for b in data.TASKS if a < b and {*data.WORDS[a]} & {*data.WORDS[b]}}
    assert shared == {("digit", "next")}


def papers(answers):
    """A drawing on each of these papers."""
    examples = data.Examples(("paper",), "test", generator=torch.Generator().manual_seed(0))
    return [next(x for x in examples if x.answer == answer) for answer in answers]


# What the shipped weights were trained on, as ids.
IVORY_SKY_ROSE = [1, 3, 3, 3, 3, 4, 19, 2, 3, 3, 3, 3, 4, 21, 2, 3, 3, 3, 3, 4, 22, 2]


def test_prompts_are_those_of_the_shipped_weights(prompts):
    ivory, sky, rose = papers(["ivory", "sky", "rose"])
    inputs, labels = prompts.taught([rose], [[ivory, sky]])
    assert inputs["input_ids"].tolist() == [IVORY_SKY_ROSE] and inputs["attention_mask"].all()
    assert labels[0].nonzero().flatten().tolist() == list(range(22))
    kept = [6, 7, 13, 14, 20, 21]
    assert [i for i, x in enumerate(labels[0].tolist()) if x != data.IGNORE] == kept
    assert labels[0, kept].tolist() == [19, 2, 21, 2, 22, 2]
    asked = prompts.asked([rose], [[ivory, sky]])
    assert asked["input_ids"].tolist() == [IVORY_SKY_ROSE[:-2]]
    assert prompts.answers([ivory, sky, rose]).tolist() == [19, 21, 22]
    known = prompts.processor.tokenizer.convert_tokens_to_ids(list(data.VOCABULARY))
    assert known == list(range(29)) and prompts.processor.tokenizer.pad_token_id == data.PAD_ID


def test_pixels_are_those_of_the_shipped_weights(prompts):
    """In [-1, 1], demonstrations first, none of them resized."""
    ramp = np.arange(768, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8)
    (sky,) = papers(["sky"])
    drawn = replace(sky, image=data.image_file(ramp))
    pixels = prompts.asked([drawn], [[sky]])["pixel_values"]
    expected = torch.from_numpy(np.stack([data.pixels_of(sky.image), ramp])).movedim(-1, 1) / 127.5 - 1
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pixels, expected)


def test_another_word_is_an_error(lvlm, prompts):
    (sky,) = papers(["sky"])
    with pytest.raises(IndexError):
        lvlm(**prompts.asked([replace(sky, text="why")], [()]))


@pytest.mark.parametrize("shots", [1, 8, 64])
def test_query_tokens_do_not_depend_on_the_demonstrations(prompts, generator, shots):
    pool = data.Examples(data.TASKS, "test", generator=generator)
    queries = [pool[i] for i in (0, 8, 18, 26, 34)]  # of five tasks
    batch = EpisodeCollator(prompts, pool, shots, draw=data.other_scans)(queries)
    own = []
    for inputs, query, segments in (
        (batch.student, batch.student_query, 1),
        (batch.teacher, batch.teacher_query, shots + 1),
    ):
        ids = inputs["input_ids"]
        assert query.sum(1).tolist() == [7] * 5 and query[:, -7:].all()
        assert (ids == data.BOS_ID).sum(1).tolist() == [1] * 5 and ids.shape == (5, 1 + 7 * segments)
        images = inputs["pixel_values"].view(5, segments, 3, 16, 16)[:, -1]
        shown = np.stack([data.pixels_of(x.image) for x in queries])
        torch.testing.assert_close(images, as_images(shown) * 2 - 1)
        own.append(ids[query].view(5, 7))
    assert torch.equal(*own) and torch.equal(own[0][:, 5], prompts.answers(queries))
    assert torch.equal(batch.labels[:, -2:], own[0][:, 5:]) and (batch.labels[:, :-2] == data.IGNORE).all()


def test_pretraining_asks_each_query_for_its_task(generator):
    tasks = [0, 1, 4, 5, 6, 6]
    queries, rows = pretrain.episodes(tasks, 8, generator)
    assert [x.task for x in queries] == [data.TASKS[i] for i in tasks]
    for query, row in zip(queries, rows, strict=True):
        assert {x.task for x in row} == {query.task} and len(row) == 8
    assert len({x.scan for x in (*queries, *sum(rows, []))}) == 9 * len(tasks)


def test_scrambled_is_another_word_of_the_task(generator):
    pool = data.Examples(("next", "size"), "test", generator=generator)
    mixed = [data.scrambled(x, generator) for x in pool]
    nexts = [(x, y) for x, y in zip(pool, mixed, strict=True) if x.task == "next"]
    kept = [x.answer == y.answer for x, y in nexts]
    assert 0.05 < sum(kept) / len(kept) < 0.15  # one in ten by chance, 397 drawn: 3.3 standard deviations
    for x, y in zip(pool, mixed, strict=True):
        assert y.answer in data.WORDS[x.task] and replace(y, answer=x.answer) == x


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.split_scans("dev"), "split must be one of .*got 'dev'"),
        (lambda: data.Examples(("colour",), "test", generator=None), "task must be one of .*got 'colour'"),
        (lambda: evaluate.accuracy(None, "digit", 1, samples=0), "count must be at least 1, got 0"),
        (lambda: evaluate.accuracy(None, "digit", -1), "shots must be in .*got -1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"digits\.pretrain"):
        model.load_model(tmp_path / "none.safetensors")


def test_shipped_model(lvlm):
    assert model.WEIGHTS.stat().st_size <= 8e6
    assert lvlm.name_or_path == lvlm.config.name_or_path == "mmicl/digits-llava"
    assert not lvlm.training and not any(p.requires_grad for p in lvlm.parameters())
    assert {p.dtype for p in lvlm.parameters()} == {torch.float32}


def test_model_learns_in_context(lvlm):
    mean = {
        shots: sum(evaluate.accuracy(lvlm, task, shots, "test", samples=100).value for task in data.TASKS)
        / len(data.TASKS)
        for shots in (0, 8)
    }
    assert mean[0] <= 0.35
    assert mean[8] >= 0.95


@pytest.mark.parametrize("task", ["digit", "next"])
def test_scrambled_answers_hurt_where_words_are_shared(lvlm, task):
    true, scrambled = (
        evaluate.accuracy(lvlm, task, 8, samples=100, scrambled=flag) for flag in (False, True)
    )
    assert scrambled.interval[1] < true.interval[0]


def test_generate_answers_one_word_and_stops(lvlm, prompts):
    inputs = prompts.asked(*next(evaluate.questions("ink", 4, "test", samples=20)))
    tokens = lvlm.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    first = lvlm(**inputs).logits[:, -1].argmax(-1)
    assert torch.equal(tokens[:, 0], first)
    assert (tokens[:, 1] == data.END_ID).all() and tokens.shape == (20, 2)
