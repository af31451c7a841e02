"""AIM on the digits and in the wide world: what is drawn, fused and kept apart."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import mmicl_kernels as mk
from benchmarks.experiments.digits import aim, data, held_out, report, wide
from benchmarks.experiments.digits.evaluate import accuracy
from benchmarks.experiments.digits.model import load_model
from benchmarks.experiments.digits.processor import DigitsPrompts
from mmicl_kernels.training import AggregationCollator


@pytest.fixture(scope="module")
def lvlm():
    return load_model()


@pytest.fixture(scope="module")
def wide_lvlm():
    return wide.load_wide_model()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def words(ids, vocabulary):
    return [vocabulary[i] for i in ids.tolist()]


def test_answers_and_ends_are_fused(generator):
    examples = data.Examples(("ink",), "test", generator=generator, count=6)
    shown = [x.demonstration() for x in examples]
    prompts = DigitsPrompts(fused="label")
    inputs, positions = prompts.demonstrations(shown)
    assert inputs["input_ids"].shape == (6, 1 + 7)
    fused = inputs["input_ids"][positions].view(6, 2)
    assert torch.equal(fused[:, 0], prompts.answers(examples)) and (fused[:, 1] == data.END_ID).all()
    _, ends = DigitsPrompts(fused="end").demonstrations(shown)
    assert ends.sum(-1).tolist() == [1] * 6 and ends[:, -1].all()
    _, labels = prompts.queries(shown)  # what is learned is the answer alone
    assert (labels != data.IGNORE).sum(-1).tolist() == [1] * 6
    assert torch.equal(labels[labels != data.IGNORE], prompts.answers(examples))


def test_queries_have_their_own_demonstrations(lvlm, generator):
    """Fused together, each query is answered as it is after its own demonstrations alone."""
    pool = data.Examples(("ink", "next"), "test", generator=generator)
    queries = [pool[i] for i in range(3)]
    rows = [[pool[i] for i in data.other_scans(pool, x, k, generator)] for k, x in enumerate(queries)]
    prompts = DigitsPrompts(fused="label")
    with mk.attach(lvlm, mk.create(lvlm, aim.FUSER)) as handle, torch.no_grad():
        inputs = aim.fused_prompts(handle, prompts, queries, rows)
        assert inputs["attention_mask"].sum(1).tolist() == [6, 8, 10]
        together = lvlm(**inputs).logits[:, -1]
        for i in (1, 2):
            inputs = aim.fused_prompts(handle, prompts, queries[i : i + 1], rows[i : i + 1])
            torch.testing.assert_close(lvlm(**inputs).logits[0, -1], together[i], rtol=1e-4, atol=1e-4)


def test_the_bank_holds_what_is_drawn(lvlm, tmp_path, monkeypatch):
    monkeypatch.setattr(aim, "BANKED", 5)
    adapter = mk.create(lvlm, aim.FUSER)
    pool = aim.banked("parity", seed=3)
    bank = aim.fill_bank(tmp_path / "bank", lvlm, adapter, pool)
    shown = [x.demonstration() for x in pool]
    with mk.attach(lvlm, adapter) as handle:
        fused = handle.aggregate(*DigitsPrompts(fused="label").demonstrations(shown))
    assert len(bank) == 5 and [bank.find(x) for x in shown] == list(range(5))
    for number, tokens in enumerate(fused):
        torch.testing.assert_close(bank.tokens(number), tokens.detach())
        assert bank.text(number).answer in data.WORDS["parity"]


def test_a_short_training_answers_unseen_images(lvlm, generator):
    recipe = replace(aim.RECIPE, steps=40, batch_size=16, shots=(1, 4))
    adapter = aim.train_aim(lvlm, recipe=recipe, progress=False)
    pool = data.Examples(("ink",), "test", generator=generator)
    with mk.attach(lvlm, adapter) as handle:
        ask = partial(aim.fused_prompts, handle, DigitsPrompts(fused="label"))
        found = accuracy(lvlm, "ink", 4, "test", samples=48, pool=pool, ask=ask)
    assert found.value > 0.8 > 2 * accuracy(lvlm, "ink", 0, "test", samples=48).value


def test_held_out_words_and_questions_are_in_no_batch():
    allowed = {*data.SPECIAL}
    for name in wide.TRAINED:
        allowed |= {f"{name}?", *wide.WORDS[name]}
    assert not set(wide.TRAINED) & set(wide.HELD_OUT) and len(wide.TRAINED) == 9
    episodes = held_out.training_episodes(replace(held_out.RECIPE, batch_size=16, shots=4, steps=12), seed=0)
    assert len(episodes) == 16 * 12
    collate, named = AggregationCollator(held_out.PROMPTS), set()
    for start in range(0, len(episodes), 16):
        batch = collate([episodes[i] for i in range(start, start + 16)])
        for inputs in (batch.demonstrations, batch.queries):
            met = set(words(inputs["input_ids"].flatten(), wide.VOCABULARY))
            assert met <= allowed
            named |= {row.eq(data.QUESTION_ID).any().item() for row in inputs["input_ids"]}
        assert set(words(batch.labels[batch.labels != -100], wide.VOCABULARY)) <= allowed
        assert batch.positions.sum(-1).tolist() == [1] * 64
        assert (batch.demonstrations["input_ids"][batch.positions] == data.END_ID).all()
    assert named == {True, False}


def test_the_wide_backbone_learns_in_context(wide_lvlm):
    for name in ("paper", "top"):
        assert wide.accuracy(wide_lvlm, name, 8, "test", samples=50).value > 0.9
        assert wide.accuracy(wide_lvlm, name, 0, "test", samples=50).value < 0.4


def test_wide_episodes(generator):
    episodes = wide.draw_episodes(40, 8, split="test", generator=generator, unnamed=0.5)
    pool = set(data.split_scans("test").tolist())
    questions = set()
    for query, shots in episodes:
        assert len(shots) == 8 and query.scan not in {x.scan for x in shots}
        assert {x.scan for x in shots} <= pool
        assert {x.answer for x in (query, *shots)} <= set(wide.WORDS[query.task])
        values = [x.answer.rsplit("-", 1)[0] for x in (query, *shots)]
        assert values[0] in values[1:] and len(set(values)) <= wide.WAYS
        spoken = {
            value: {x.answer for x, y in zip((query, *shots), values, strict=True) if y == value}
            for value in values
        }
        assert all(len(said) == 1 for said in spoken.values())  # one of eight words for each value
        assert {x.text for x in shots} == {query.text} and query.text in (data.QUESTION, f"{query.task}?")
        questions.add(query.text == data.QUESTION)
    assert questions == {True, False} and len({x.id for x in episodes.pool}) == 40 * 9


def test_an_echo_follows_every_demonstration(generator):
    ((query, shots),) = wide.draw_episodes(1, 3, split="train", generator=generator)
    prompts = DigitsPrompts(wide.VOCABULARY)
    inputs, labels = prompts.taught([query], [shots])
    found = wide.echoed(inputs["input_ids"], labels)[0, 1:]
    answers = prompts.answers(shots).tolist()
    assert found[[7, 14, 21]].tolist() == answers  # where the next image begins
    found[[7, 14, 21]] = data.IGNORE
    assert torch.equal(found, labels[0, 1:])


def test_wide_images_show_their_values(generator):
    """The frame's colours and the digit are those that the answers name."""
    for name in ("right", "digit"):
        episodes = wide.draw_episodes(30, 2, (name,), split="test", generator=generator)
        for query, _ in episodes:
            value = int(query.answer.split("-")[1])
            if name == "digit":
                assert int(data.all_scans()[1][query.scan]) == value
            else:
                colour = torch.from_numpy(data.pixels_of(query.image).copy())[8, -1] / 255
                assert (colour - wide.MARK_RGB[value]).abs().max() < 1 / 255


def test_the_committed_results_reach_the_targets():
    """Figures of the committed files, of which the README's tables are made."""
    results = json.loads(aim.RESULTS.read_text())
    plain = results["plain"]["8"]
    seeds = [rows["8"] for rows in results["fused"]["label"]["seeds"].values()]
    assert len(seeds) == 3
    for row in seeds:
        assert aim.mean_of(row) >= 0.95 * aim.mean_of(plain)
        assert row["prompt_tokens"] <= 2 / 5 * plain["prompt_tokens"]
    assert "held out" in report.held_out_table(json.loads(held_out.RESULTS.read_text()))
