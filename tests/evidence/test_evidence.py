"""The experiments on the real model: that they compare what they say they compare."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import mmicl_kernels as mk
from benchmarks.experiments.evidence import __main__ as evidence
from benchmarks.experiments.evidence import arms, experiments, forms, report, runs, world
from benchmarks.experiments.smolvl import tasks
from mmicl_kernels.data import as_records
from mmicl_kernels.evaluation.metrics import exact_match
from mmicl_kernels.ops import alignment_loss
from mmicl_kernels.training import RandomShots


@pytest.mark.parametrize("task", tasks.TASKS)
def test_labelled_items_are_balanced_and_nested(task):
    rows = tasks.records(task, "train")
    drawn = world.labelled(task, 16, 3)
    assert drawn == world.labelled(task, None, 3)[:16] and drawn != world.labelled(task, 16, 4)
    assert sorted(x["id"] for x in world.labelled(task, None, 3)) == sorted(x["id"] for x in rows)
    counts = Counter(x["answer"] for x in drawn)
    if task != "shapes":  # a colour is rarer there than a shape
        assert max(counts.values()) - min(counts.values()) <= 1 or max(counts.values()) == 1


def test_a_tower_remembers_what_it_was_shown():
    calls = []

    class Tower(torch.nn.Module):
        config, dtype = None, torch.float32

        def forward(self, pixel_values):
            calls.append(len(pixel_values))
            return type("Output", (), {"last_hidden_state": pixel_values.flatten(1)[:, None] * 2})

    tower = world.Remembering(Tower())
    x = torch.arange(24.0).view(4, 3, 1, 2)
    for shown in ([0, 1], [1, 2, 0], [2], [3, 3]):
        torch.testing.assert_close(tower(x[shown]).last_hidden_state, 2 * x[shown].flatten(1)[:, None])
    assert calls == [2, 1, 2]


@pytest.mark.parametrize("answers, kept", [(16, 0), (4, 0), (2, 8)])
def test_shuffled_answers_are_the_same_ones_elsewhere(answers, kept):
    rows = [{"id": str(i), "answer": str(i % answers)} for i in range(16)]
    dealt = arms.shuffled(rows, 0)
    assert Counter(x["answer"] for x in dealt) == Counter(x["answer"] for x in rows)
    assert [x["id"] for x in dealt] == [x["id"] for x in rows]
    assert sum(x["answer"] == y["answer"] for x, y in zip(rows, dealt, strict=True)) == kept


def test_questions_without_answers_are_others_whatever_their_answers():
    few = world.labelled("feeling", 4, 0)
    drawn = world.unlabelled("feeling", 64, 0, few)
    assert len(drawn) == 64 and not {x["id"] for x in few} & {x["id"] for x in drawn}
    relabelled = [{**x, "answer": "?"} for x in tasks.records("feeling", "train")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "records", lambda task, split: relabelled)
        assert [x["id"] for x in world.unlabelled("feeling", 64, 0, few)] == [x["id"] for x in drawn]


def test_other_names_of_answers_are_one_to_one():
    for name, (task, names) in world.RENAMED.items():
        mine, theirs = world.records(name, "test"), tasks.records(task, "test")
        assert len(set(names.values())) == len(names)
        assert [x["answer"] for x in mine] == [names[x["answer"]] for x in theirs]
        assert [x["id"] for x in mine] == [x["id"] for x in theirs]
    assert {(x["text"][-1] == x["answer"]) for x in world.records(world.LAST_LETTER, "validation")} == {True}


def test_demonstrations_of_several_tasks_are_of_the_querys():
    pool = as_records(world.labelled("past + feeling", 8, 0))
    assert len(pool) == 16 and len({x.id for x in pool}) == 16
    draw = world.OfTheTask()
    for query in pool:
        drawn = draw(pool, query, 5, torch.Generator().manual_seed(0))
        assert {pool[i].id.split(": ")[0] for i in drawn} == {query.id.split(": ")[0]}
        assert len(set(drawn)) == 5 and query.id not in {pool[i].id for i in drawn}
    alone = as_records(world.labelled("past", 8, 0))
    ours, theirs = (x(alone, alone[3], 5, torch.Generator().manual_seed(0)) for x in (draw, RandomShots()))
    assert ours == theirs


def test_an_answer_that_is_the_teachers():
    """Compared as answers are; by the seeds of both."""
    mine, theirs = {0: ["Teal.", "red"], 1: ["red"]}, {0: ["teal", "blue"], 2: ["red"]}
    assert {k: x.tolist() for k, x in report.agreement(mine, theirs).items()} == {0: [1, 0]}


def test_what_another_experiment_ran_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    run = runs.Run("kind", "MimIC", 16, 0)
    runs.keep("forms", run, {"right": "01", "accuracy": 0.5})
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"forms": lambda: [run], "tuning": lambda: [run]})
    monkeypatch.setattr(evidence, "perform", lambda run: pytest.fail("run again"))
    assert evidence.run_all("tuning", 1) == [] and runs.read("tuning")[run]["right"] == "01"


def test_what_other_arms_found_is_not_taken_for_todays(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    run = runs.Run("kind", "MimIC", 16, 0)
    runs.keep("default", run, {"right": "01", "accuracy": 0.5})
    assert runs.read("default").keys() == {run}
    monkeypatch.setattr(runs, "ARMS", {"MimIC": arms.Arm(mk.MimICConfig(align_weight=2))})
    assert runs.read("default") == {}


def test_the_command_names_what_there_is(capsys):
    with pytest.raises(SystemExit):
        evidence.main(["nothing"])
    assert "NAME is 'nothing', expected one of forms, tuning" in capsys.readouterr().err


def test_a_run_that_fails_ends_no_other(monkeypatch):
    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, context, **options):
            super().__init__(workers)

    kept = []
    first, second, third = (runs.Run("kind", "MimIC", 16, seed) for seed in range(3))
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"some": lambda: [first, second, third]})
    monkeypatch.setattr(evidence, "read", lambda name: {third: {}})
    monkeypatch.setattr(evidence, "keep", lambda name, run, found: kept.append(run))
    monkeypatch.setattr(evidence, "perform", lambda run: {"accuracy": 1 / run.seed})  # the first has no such
    assert evidence.run_all("some", 1) == [first] and kept == [second]


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_runs_are_listed_once_and_name_what_there_is(name):
    listed = experiments.EXPERIMENTS[name]()
    assert len(set(listed)) == len(listed) > 0
    for run in listed:
        assert {*run.task.split(" + ")} <= {*world.TASKS} and run.asked in {None, *world.TASKS}
        assert run.arm in {*arms.ARMS, runs.ICL, runs.LORA}
        assert (run.labeller is None) == (run.unlabelled == 0)
        assert (run.split == "validation") == (run.seed == experiments.OTHER_SEED)


def test_what_was_run_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    run = runs.Run("kind", "MimIC", 16, 0)
    assert runs.read("default") == {}
    runs.keep("default", run, {"right": "01", "accuracy": 0.5})
    runs.keep("default", runs.Run("kind", "MimIC", 16, 1), {"right": "11", "accuracy": 1.0})
    found = runs.read("default")
    assert found[run]["accuracy"] == 0.5 and len(found) == 2
    assert {seed: x.tolist() for seed, x in report.right(found, task="kind").items()} == {
        0: [0, 1],
        1: [1, 1],
    }
    assert report.right(found, task="past") == {}


def test_a_difference_is_over_the_seeds_of_both():
    zeros, ones = np.zeros(50, int), np.ones(50, int)
    assert report.minus({0: ones, 1: zeros}, {0: zeros}) == "+100"  # of one seed there is no interval
    assert report.minus({0: ones}, {1: ones}) == ""
    same = {seed: ones for seed in range(3)}
    assert report.minus(same, same) == "+0 (+0 to +0)"


def test_intervals_cover_what_they_say():
    """Nineteen of twenty, with few seeds too: a resampling of three seeds covers 86 % of such draws."""
    generator = np.random.default_rng(0)
    for S, Q in ((3, 60), (5, 60), (3, 20)):
        covered = 0
        for _ in range(1000):
            effect = 0.1 * generator.standard_normal((S, 1)) + 0.3 * generator.standard_normal((1, Q))
            gaps = effect + 0.4 * generator.standard_normal((S, Q))
            covered += abs(gaps.mean()) <= report.half_width(gaps)
        assert 915 <= covered <= 985, (S, Q, covered)


def test_rows_of_a_table_are_of_the_same_seeds():
    x = np.ones(4, int)
    assert [list(y) for y in report.common([{0: x, 1: x}, {}, {1: x, 2: x}])] == [[1], [], [1]]


def test_other_forms_are_0_where_the_states_agree():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 200, generator=generator, dtype=torch.float64) for _ in range(2))
    scaled = 1000 * y
    for name, form in forms.FORMS.items():
        assert form(x, x).shape == (5,) and abs(form(x, x).mean()) < 1e-12 < form(x, y).mean(), name
        assert torch.allclose(form(1000 * x, scaled), form(x, y)), name  # none has a scale


@pytest.mark.parametrize("form, name", [(forms.of_both, "relative"), (forms.mean_square, "mean_square")])
def test_two_of_the_forms_are_the_ops(form, name):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 200, generator=generator, dtype=torch.float64) for _ in range(2))
    query = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(form(x, y).mean(), alignment_loss([x.view(2, 3, -1)], [y], query, form=name))


def test_results_are_of_runs_that_are_listed():
    """What is committed is what the command would run."""
    for name, list_runs in experiments.EXPERIMENTS.items():
        found, listed = runs.read(name), set(list_runs())
        assert found.keys() <= listed, sorted(map(str, found.keys() - listed))[:3]
        for run, row in found.items():
            asked = world.records(run.asked or run.task, run.split)[: runs.QUERIES]
            score = exact_match(row["texts"], [x["answer"] for x in asked])
            assert row["right"] == "".join(str(int(x)) for x in score.samples), run
            assert row["accuracy"] == score.value, run


def test_tables_are_those_of_the_committed_results():
    page = report.PAGE.read_text()
    assert all(table in page for table in report.tables().values())


@pytest.mark.slow
def test_an_arm_learns_and_leaves_the_model_alone():
    model, prompts = world.world()
    rows = world.labelled("feeling", 8, 0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    arm = arms.Arm(mk.MimICConfig(), held={"weight": 0, "bias": 100})
    adapter, again, tied = (
        arms.learn(x, model, prompts, rows, rows, 2, 0, 4)
        for x in (arm, arm, arms.Arm(mk.MimICConfig(), tied=True))
    )
    for (name, x), y, z in zip(
        adapter.named_parameters(), again.parameters(), tied.parameters(), strict=True
    ):
        held = {"weight": 0, "bias": 100}.get(name.rpartition(".")[2])
        assert torch.equal(x, y) and (held is None or (x == held).all()), name
        assert torch.equal(z, z[:1].expand_as(z)) and z.abs().sum() > 0, name
        assert (z[0] != 0).any() and (held is not None or not torch.equal(x, x[:1].expand_as(x))), name
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.slow
def test_an_adapter_is_left_on_elsewhere():
    """One that changes everything changes other tasks and prose; none changes nothing."""
    model, prompts = world.world()
    run = runs.Run("colour", "MimIC", 4, 0, elsewhere=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FEWER_QUERIES", 4)
        patch.setattr(runs, "ELSEWHERE", ("past", "colour"))
        adapter = mk.create(model, mk.MimICConfig())
        plain, idle = (runs._elsewhere(run, model, prompts, x) for x in (None, _silent(adapter)))
        loud = runs._elsewhere(run, model, prompts, _loud(adapter))
    assert (
        plain == idle and plain["elsewhere"].keys() == {"past"} and len(plain["nats"]) == len(world.prose())
    )
    assert sum(loud["nats"]) > sum(plain["nats"]) + len(world.prose())


def _silent(adapter):
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.shift.zero_()
    return adapter


def _loud(adapter):
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.shift.fill_(5)
            layer.bias.fill_(100)
    return adapter


@pytest.mark.slow
def test_the_default_learns_where_a_mean_square_is_that_of_one_token():
    """Where the query's first token is what attention sinks into: .73 and 0 when this was written."""
    fields = {"labelled": 16, "seed": 100, "steps": 30, "head": False, "split": "validation"}
    ours, theirs = (runs.perform(runs.Run("feeling", arm, **fields)) for arm in ("MimIC", arms.OFFICIAL))
    assert ours["accuracy"] >= 0.6 and theirs["accuracy"] <= 0.1
    assert all(text in ("positive", "negative") for text in ours["texts"])
