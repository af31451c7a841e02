"""Training and measuring adapters of the digits model: what is drawn, kept and printed."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import mmicl_kernels as mk
from benchmarks.experiments.digits import data, evaluate, measure, report, train, uses
from benchmarks.experiments.digits.model import load_model
from benchmarks.experiments.digits.processor import DigitsPrompts
from benchmarks.experiments.digits.train import train_adapter
from mmicl_kernels.training.run import Training


@pytest.fixture(scope="module")
def lvlm():
    return load_model()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_mixed_is_two_tasks_told_apart_by_the_image(generator):
    examples = data.Examples(("mixed",), "train", generator=generator, count=300)
    turned = examples.values["orientation"] == data.WORDS["orientation"].index("turned")
    expected = torch.where(turned, examples.values["next"], examples.values["digit"])
    assert [x.answer for x in examples] == [data.WORDS["mixed"][i] for i in expected]
    assert 100 < turned.sum() < 200 and "mixed" not in data.TASKS


def test_many_shots_are_split_over_passes(lvlm):
    recipe = replace(train.RECIPE, shots=10, shots_per_pass=3, batch_size=3)
    examples = train.training_examples(("ink",), recipe, seed=0)
    training = Training.of(
        lvlm, DigitsPrompts(), examples, mk.LIVEConfig(), recipe=recipe, draw=data.other_scans
    )
    batch = training.collator([examples[i] for i in range(3)])
    prompts = [batch.teacher, *(inputs for inputs, _ in batch.further)]
    shots = [(x["input_ids"].shape[1] - 8) // 7 for x in prompts]
    assert sorted(shots) == [2, 2, 3, 3]
    images = torch.cat([x["pixel_values"].view(3, -1, 3, 16, 16)[:, :-1] for x in prompts], 1)
    assert [len(row.flatten(1).unique(dim=0)) for row in images] == [10] * 3  # none is shown twice
    for inputs, query in zip(prompts, [batch.teacher_query, *(q for _, q in batch.further)], strict=True):
        assert torch.equal(inputs["input_ids"][query], batch.student["input_ids"][batch.student_query])


@pytest.mark.parametrize("name", ["mimic", "live", "m2iv", "m2iv-64", "prompt_tuning"])
def test_training_is_repeatable_and_leaves_the_model(lvlm, name):
    before = {key: x.clone() for key, x in lvlm.state_dict().items()}
    setting = measure.SETTINGS[name]
    recipe = replace(setting.recipe, steps=2, batch_size=2)
    one, same, other = (
        train_adapter(lvlm, "ink", config=setting.config, recipe=recipe, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(x.requires_grad for x in one.parameters())
    assert all(torch.equal(x, before[key]) for key, x in lvlm.state_dict().items())


@pytest.fixture
def quick(monkeypatch):
    """Settings of one task and one update; every training is noted."""
    trained = []
    real = train_adapter

    def noted(model, task, **options):
        trained.append((task, options["seed"]))
        return real(model, task, **options)

    recipe = replace(train.RECIPE, steps=1, batch_size=2, shots=1)
    monkeypatch.setattr(measure, "train_adapter", noted)
    monkeypatch.setattr(measure, "SHOTS", (0,))
    monkeypatch.setitem(
        measure.SETTINGS, "m2iv", measure.Setting("M2IV", mk.M2IVConfig(), recipe, ("ink", "size"))
    )
    return trained


def test_measured_results_are_not_measured_again(lvlm, quick, tmp_path):
    path = tmp_path / "results.json"
    first = measure.measure(lvlm, "validation", ["m2iv"], [0], path)
    assert quick == [("ink", 0), ("size", 0)] and json.loads(path.read_text()) == first
    second = measure.measure(lvlm, "validation", ["m2iv"], [0, 1], path)
    assert quick[2:] == [("ink", 1), ("size", 1)]
    assert second["adapted"]["m2iv"]["seeds"]["0"] == first["adapted"]["m2iv"]["seeds"]["0"]
    assert set(second["plain"]["0"]) == set(data.WORDS)


def test_learned_tokens_are_before_the_prompts_that_are_measured(lvlm):
    adapter = mk.create(lvlm, mk.PromptTuningConfig())
    queries, shots = next(evaluate.questions("ink", 0, "validation", samples=3))
    with mk.attach(lvlm, adapter) as handle:
        inputs = evaluate.adapted_prompts(handle, queries, shots)
    assert inputs["input_ids"].shape[1] == DigitsPrompts().asked(queries)["input_ids"].shape[1] + 20
    with mk.attach(lvlm, mk.create(lvlm, mk.LIVEConfig())) as handle:
        inputs = evaluate.adapted_prompts(handle, queries, shots)
    assert torch.equal(inputs["input_ids"], DigitsPrompts().asked(queries)["input_ids"])


def test_results_of_another_recipe_or_split_are_refused(lvlm, quick, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    measure.measure(lvlm, "validation", ["m2iv"], [0], path)
    kept = path.read_text()
    with pytest.raises(ValueError, match="split"):
        measure.measure(lvlm, "test", ["m2iv"], [0], path)
    changed = replace(measure.SETTINGS["m2iv"], recipe=replace(train.RECIPE, steps=7))
    monkeypatch.setitem(measure.SETTINGS, "m2iv", changed)
    with pytest.raises(ValueError, match="m2iv"):
        measure.measure(lvlm, "validation", ["m2iv"], [0], path)
    assert path.read_text() == kept


def collated(name, tasks, generator):
    """A batch of a use: two queries for each of ``tasks``, after one to four demonstrations."""
    pool = data.Examples(tasks, "train", generator=generator)
    queries = [pool[i] for i in range(2 * len(tasks))]
    use = uses.USES[name]
    collate = uses.InContext(DigitsPrompts(), pool, (1, 4), draw=data.other_scans, contrast=use.contrast)
    return queries, collate([use.wanted(x) for x in queries])


def test_uses_ask_for_what_they_say(generator):
    queries, style = collated(uses.STYLE, ("ink",), generator)
    _, refusal = collated(f"refuses {uses.REFUSED}", ("ink", "size"), generator)
    for i, query in enumerate(queries):
        answer = data.VOCABULARY.index(query.answer)
        labels = style.labels[i][style.labels[i] != data.IGNORE]
        assert labels.tolist() == [answer, data.QUESTION_ID]
    found = [row[row != data.IGNORE].tolist() for row in refusal.labels]
    assert found[::2] == [[data.QUESTION_ID]] * 2  # ink
    sizes = [data.VOCABULARY.index(word) for word in data.WORDS["size"]]
    assert all(answer in sizes and end == data.END_ID for answer, end in found[1::2])
    for batch in (style, refusal):  # the same prompt twice, with demonstrations that are answered as ever
        assert torch.equal(batch.student["input_ids"], batch.teacher["input_ids"])
        assert (batch.student["input_ids"] == data.IMAGE_ID).sum(1).min() > data.IMAGE_TOKENS
        shown = (batch.student["input_ids"] == data.QUESTION_ID) & (batch.labels == data.IGNORE)
        images = (batch.student["input_ids"] == data.IMAGE_ID).sum(1) // data.IMAGE_TOKENS
        assert torch.equal(shown.sum(1), images)


def test_faded_images_keep_their_mean(generator):
    _, batch = collated("sees faded images", ("ink",), generator)
    assert torch.equal(batch.student["input_ids"], batch.teacher["input_ids"])
    clear, faded = batch.teacher["pixel_values"], batch.student["pixel_values"]
    step = 1 / 127.5  # between the values that a pixel may have: rounding is off by half of it
    torch.testing.assert_close(faded.mean((-2, -1)), clear.mean((-2, -1)), rtol=0, atol=step / 2)
    torch.testing.assert_close(
        faded.std((-2, -1)), uses.CONTRAST * clear.std((-2, -1)), rtol=0, atol=step / 2
    )


@pytest.mark.slow
def test_uses_run_and_their_table(lvlm, tmp_path):
    library = mk.VLibrary(tmp_path)
    uses.fill(library, lvlm, steps=3)
    assert library.list() == sorted([*uses.USES, uses.TASK])
    results = uses.measure(library, lvlm, "validation")
    for shares in results["uses"].values():
        assert shares["plain"].keys() == shares["with"].keys()
    table = report.uses_table(results).splitlines()
    assert len(table) == 2 + 7 + 4 and all(line.count("|") == 5 for line in table)


@pytest.mark.slow
def test_a_style_is_learned(lvlm):
    """On a task whose words it never saw."""
    asks = f"{uses.TASK}: right, then asks back"
    style = uses.learn(lvlm, uses.STYLE, steps=150)
    with mk.attach(lvlm, style):
        assert uses.measure_style(lvlm, "validation")[asks] > 0.8
    assert uses.measure_style(lvlm, "validation")[asks] == 0


def test_tables_are_of_what_was_measured():
    plain = {str(k): dict.fromkeys(data.WORDS, 0.5) | {"mixed": 0.25} for k in measure.SHOTS}
    seeds = {"0": dict.fromkeys(data.TASKS, 0.4), "1": dict.fromkeys(data.TASKS, 0.5)}
    results = {"plain": plain, "adapted": {"m2iv": {"seeds": seeds}}}
    results["adapted"]["mixed-mimic"] = {"seeds": {"0": {"mixed": 0.75}}}
    digits, mixed = report.task_table(results), report.mixed_table(results)
    assert "| M2IV, no demonstrations, 2 seeds |" + " 45.0 |" * 7 + " 45.0 (40.0 to 50.0) |" in digits
    assert "M2IV 90.0 %" in digits and "MimIC" not in digits
    assert mixed.splitlines()[-2:] == ["| 16-shot | 25.0 |", "| MimIC, no demonstrations, 1 seed | 75.0 |"]
