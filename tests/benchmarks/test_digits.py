"""The digits world and its shipped model: what is drawn, how prompts are built, what is learned."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from benchmarks.experiments.digits import data, evaluate, model


@pytest.fixture(scope="module")
def lvlm():
    return model.load_model()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def answer_indices(samples, task):
    return samples.answers[..., data.TASKS.index(task)] - data.word_ids(task)[0]


def test_splits_are_disjoint_and_complete():
    parts = [data.split_originals(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1200, 200, 397]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    # The shipped weights were trained on this very split.
    assert parts[2][:5].tolist() == [786, 873, 1655, 819, 1243]


def test_episodes_keep_to_their_splits(generator):
    demonstrations, queries = data.draw_episodes(397, 16, split="test", generator=generator)
    assert torch.isin(demonstrations.originals, data.split_originals("train")).all()
    assert torch.equal(queries.originals.sort().values, data.split_originals("test").sort().values)


def test_demonstrations_are_distinct_and_never_the_query(generator):
    demonstrations, queries = data.draw_episodes(1300, 64, split="train", generator=generator)
    row = torch.cat([demonstrations.originals, queries.originals[:, None]], 1).sort(1).values
    assert (row.diff(dim=1) > 0).all()


@pytest.mark.parametrize("augment", [False, True])
def test_corner_has_the_paper_colour(generator, augment):
    samples = data.draw_queries(300, split="train", generator=generator, augment=augment)
    corner = (samples.images[:, :, 0, 0] + 1) / 2
    nearest = torch.cdist(corner, data.PAPER_RGB).argmin(1)
    assert torch.equal(nearest, answer_indices(samples, "paper"))
    if not augment:
        torch.testing.assert_close(corner, data.PAPER_RGB[nearest])


def test_every_pixel_is_a_mix_of_the_paper_and_the_ink(generator):
    samples = data.draw_queries(300, split="train", generator=generator)
    pixels = ((samples.images + 1) / 2).flatten(2)
    paper = data.PAPER_RGB[answer_indices(samples, "paper")][:, :, None]
    towards_ink = data.INK_RGB[answer_indices(samples, "ink")][:, :, None] - paper
    coverage = ((pixels - paper) * towards_ink).sum(1) / (towards_ink**2).sum(1)
    torch.testing.assert_close(pixels, paper + coverage[:, None] * towards_ink)
    assert coverage.amax(1).min() > 0.7 and coverage.min() > -1e-6


def test_turned_is_a_quarter_turn_and_digits_are_the_scans():
    scans, digits = data._scans()
    colour = torch.zeros(20, dtype=torch.long)
    upright, turned = (
        data.render(scans[:20], colour, colour, torch.full((20,), flag)) for flag in (False, True)
    )
    assert torch.equal(turned, upright.rot90(1, (2, 3)))
    # Averaged back to 4x4, the ink of the drawing is that of the scan.
    ink = (upright[:, 0] - upright[:, 0].amax()) / -2 / (data.PAPER_RGB[0] - data.INK_RGB[0])[0]
    small = torch.nn.functional.avg_pool2d(ink[:, None, 2:14, 2:14], 3)
    expected = torch.nn.functional.avg_pool2d(scans[:20, None], 2)
    assert (small - expected).abs().max() < 0.25 and (small - expected).abs().mean() < 0.05


def test_answers_follow_from_the_digit(generator):
    samples = data.draw_queries(1200, split="train", generator=generator)
    digit = data._scans()[1][samples.originals]
    assert torch.equal(answer_indices(samples, "digit"), digit)
    assert torch.equal(answer_indices(samples, "next"), (digit + 1) % 10)
    assert torch.equal(answer_indices(samples, "parity"), digit % 2)
    assert torch.equal(answer_indices(samples, "size"), (digit > 4).long())


def test_only_digit_and_next_share_words():
    shared = {(a, b) for a in data.TASKS for b in data.TASKS if a < b and {*data.WORDS[a]} & {*data.WORDS[b]}}
    assert shared == {("digit", "next")}
    assert data.decode(data.word_ids("ink")) == list(data.WORDS["ink"])


@pytest.mark.parametrize("shots", [1, 8, 64])
@pytest.mark.parametrize("with_answer", [True, False])
def test_query_tokens_do_not_depend_on_the_demonstrations(generator, shots, with_answer):
    demonstrations, queries = data.draw_episodes(5, shots, split="test", generator=generator)
    task = torch.tensor([0, 1, 4, 5, 6])
    student = data.episode_inputs(None, queries, task, with_answer=with_answer)
    teacher = data.episode_inputs(demonstrations, queries, task, with_answer=with_answer)
    length = 7 if with_answer else 5
    for episode, segments in ((student, 1), (teacher, shots + 1)):
        ids = episode.inputs["input_ids"]
        assert episode.query_mask.sum(1).tolist() == [length] * 5
        assert (ids == data.BOS_ID).sum(1).tolist() == [1] * 5 and not episode.query_mask[:, 0].any()
        assert ids.shape == (5, 6 + 7 * (segments - 1) + 2 * with_answer)
        images = episode.inputs["pixel_values"].view(5, segments, 3, 16, 16)
        assert torch.equal(images[:, -1], queries.images)
    own = [e.inputs["input_ids"][e.query_mask] for e in (student, teacher)]
    assert torch.equal(*own)
    if with_answer:
        assert torch.equal(own[0].view(5, 7)[:, 5], student.targets)
    else:
        assert torch.equal(own[0].view(5, 5)[0], torch.tensor([data.IMAGE_ID] * 4 + [4]))


def test_labels_cover_the_answers(generator):
    demonstrations, queries = data.draw_episodes(3, 2, split="test", generator=generator)
    every, last = (
        data.episode_inputs(demonstrations, queries, "ink", label_demonstrations=flag).labels
        for flag in (True, False)
    )
    column = data.TASKS.index("ink")
    answers = torch.cat([demonstrations.answers, queries.answers[:, None]], 1)[..., column]
    assert torch.equal(every[:, 6::7], answers) and (every[:, 7::7] == data.END_ID).all()
    assert (every != data.IGNORE).sum() == 3 * 3 * 2
    assert torch.equal(last[:, -2:], every[:, -2:]) and (last[:, :-2] == data.IGNORE).all()


def test_scramble_changes_one_task_within_its_words(generator):
    demonstrations, _ = data.draw_episodes(200, 4, split="test", generator=generator)
    mixed = data.scramble(demonstrations, "next", generator)
    column = data.TASKS.index("next")
    kept = mixed.answers[..., column] == demonstrations.answers[..., column]
    assert 0.05 < kept.float().mean() < 0.15  # one in ten by chance, 800 draws
    assert torch.isin(mixed.answers[..., column], data.word_ids("next")).all()
    others = [i for i in range(len(data.TASKS)) if i != column]
    assert torch.equal(mixed.answers[..., others], demonstrations.answers[..., others])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.split_originals("dev"), "split must be one of .*got 'dev'"),
        (lambda: data.word_ids("colour"), "task must be one of .*got 'colour'"),
        (lambda: data.word_id("ten"), "'ten' is not in the vocabulary"),
        (lambda: evaluate.accuracy(None, "digit", 1, samples=0), "samples must be at least 1, got 0"),
        (lambda: evaluate.accuracy(None, "digit", -1), "shots must be in .*got -1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_mismatched_demonstrations_are_refused(generator):
    demonstrations, queries = data.draw_episodes(4, 2, split="test", generator=generator)
    with pytest.raises(ValueError, match=r"\[3, shots\].*got \[4, 2\]"):
        data.episode_inputs(demonstrations, queries[:3], "digit")


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


def test_generate_answers_one_word_and_stops(lvlm):
    episode = next(evaluate.evaluation_episodes("ink", 4, "test", samples=20))
    tokens = lvlm.generate(**episode.inputs)[:, episode.prompt_tokens :]
    first = lvlm(**episode.inputs).logits[:, -1].argmax(-1)
    assert torch.equal(tokens[:, 0], first)
    assert (tokens[:, 1] == data.END_ID).all() and tokens.shape == (20, 2)
