"""AIM on the digits and in the wide world: what is drawn, fused and kept apart."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import mmicl_kernels as mk
from benchmarks.experiments.digits import aim, data, held_out, report, wide
from benchmarks.experiments.digits.evaluate import accuracy
from benchmarks.experiments.digits.model import load_model


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
    demonstrations, _ = data.draw_episodes(2, 3, split="test", generator=generator)
    inputs, positions = aim.demonstration_prompts(demonstrations, "ink", "label")
    assert inputs["input_ids"].shape == (6, 1 + 7)
    answers = demonstrations.answers[..., data.TASKS.index("ink")].flatten()
    assert inputs["input_ids"][positions].view(6, 2)[:, 0].tolist() == answers.tolist()
    assert (inputs["input_ids"][positions].view(6, 2)[:, 1] == data.END_ID).all()
    assert torch.equal(inputs["pixel_values"], demonstrations.images.flatten(0, 1))
    _, ends = aim.demonstration_prompts(demonstrations, "ink", "end")
    assert ends.sum(-1).tolist() == [1] * 6 and ends[:, -1].all()


def test_the_bank_holds_what_is_drawn(lvlm, tmp_path, monkeypatch):
    """Through bytes and back: the tokens of the bank are those of the images themselves."""
    monkeypatch.setattr(aim, "BANKED", 5)
    adapter = mk.create(lvlm, mk.AIMConfig(positions="answer"))
    bank = aim.fill_bank(tmp_path / "bank", lvlm, adapter, "parity", seed=3)
    samples = data.draw_queries(5, split="train", generator=torch.Generator().manual_seed(3))
    with mk.attach(lvlm, adapter) as handle:
        fused = handle.aggregate(*aim.demonstration_prompts(samples[:, None], "parity", "label"))
    assert len(bank) == 5
    for number, tokens in enumerate(fused):
        torch.testing.assert_close(bank.tokens(number), tokens.detach())
        assert bank.text(number).answer in data.WORDS["parity"]


def test_a_short_training_answers_unseen_images(lvlm):
    adapter = aim.train_aim(lvlm, recipe=aim.Recipe(steps=40, batch=16, most_shots=4), progress=False)
    with mk.attach(lvlm, adapter) as handle:

        def ask(*episode):
            return aim.fused_prompts(handle, "label", *episode)

        found = accuracy(lvlm, "ink", 4, "test", samples=48, demonstrations_from="test", ask=ask)
    assert found.value > 0.8 > 2 * accuracy(lvlm, "ink", 0, "test", samples=48).value


def test_held_out_words_and_questions_are_in_no_batch(generator):
    allowed = {*data.SPECIAL}
    for name in wide.TRAINED:
        allowed |= {f"{name}?", *wide.WORDS[name]}
    assert not set(wide.TRAINED) & set(wide.HELD_OUT) and len(wide.TRAINED) == 9
    batches = held_out.batches(held_out.Recipe(batch=16, shots=4), generator)
    named = set()
    for _, batch in zip(range(12), batches, strict=False):
        for inputs in (batch.demonstrations, batch.queries):
            met = set(words(inputs["input_ids"].flatten(), wide.VOCABULARY))
            assert met <= allowed
            named.add(data.SPECIAL[data.QUESTION_ID] not in met)
        assert set(words(batch.labels[batch.labels != -100], wide.VOCABULARY)) <= allowed
        assert batch.positions.sum(-1).tolist() == [1] * 64
        assert (batch.demonstrations["input_ids"][batch.positions] == data.END_ID).all()
    assert named == {True, False}


def test_the_wide_backbone_learns_in_context(wide_lvlm):
    for name in ("paper", "top"):
        assert wide.accuracy(wide_lvlm, name, 8, "test", samples=50).value > 0.9
        assert wide.accuracy(wide_lvlm, name, 0, "test", samples=50).value < 0.4


def test_wide_episodes(generator):
    demonstrations, queries, attribute = wide.draw_episodes(40, 8, split="test", generator=generator)
    assert demonstrations.shape == (40, 8) and queries.shape == (40,)
    assert not (demonstrations.originals == queries.originals[:, None]).any()
    pool = set(data.split_originals("test").tolist())
    assert set(demonstrations.originals.flatten().tolist()) <= pool
    for row in range(40):
        own = set(wide.WORDS[list(wide.ATTRIBUTES)[attribute[row]]])
        shown = words(demonstrations.answers[row, :, 0], wide.VOCABULARY)
        answer = wide.VOCABULARY[int(queries.answers[row, 0])]
        assert {*shown, answer} <= own
        assert answer.rsplit("-", 1)[0] in {word.rsplit("-", 1)[0] for word in shown}


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
