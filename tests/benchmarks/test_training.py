"""``benchmarks.training`` runs, and its official formulation minimises what ours does."""

import dataclasses
import json

import pytest
import torch

import mmicl_kernels as mk
from benchmarks import layers, training
from benchmarks.peers import published
from tests.support.published import relative_error


@pytest.mark.usefixtures("same_threads")
def test_it_runs(tmp_path, capsys):
    assert training.main(["--quick", "--out", str(tmp_path), "--seconds", "0"]) == 0
    (path,) = tmp_path.glob("*/training.json")
    rows = json.loads(path.read_text())["rows"]
    names = [training.FLOOR, *training.OURS, training.OFFICIAL]
    assert [row["variant"] for row in rows] == names and rows[0]["ratio"] == [1.0, 1.0, 1.0]
    assert all(row["ms"] > 0 and row["peak_bytes"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in names)


@pytest.mark.parametrize("align, ce", [(1.0, 0.0), (0.0, 1.0)])
def test_the_official_formulation(align, ce):
    """But for the cross-entropy, which is that of all tokens here and there of the answer's."""
    cell = training.QUICK[0]
    model, batch = cell.model(), cell.episodes()
    labels = batch.student["input_ids"].clone()
    labels[:, 0] = -100
    batch = dataclasses.replace(batch, labels=labels)
    config = dataclasses.replace(training.AS_PUBLISHED, align_weight=align, ce_weight=ce)
    gradients = []
    for form in ("ours", "official"):
        own, adapter = layers.shared_copy(model), layers.created(model, config).requires_grad_(True)
        if form == "ours":
            with mk.attach(own, adapter) as handle:
                loss = adapter.objective_class()(handle)(batch).total
                loss.backward()
        else:
            with published(own, adapter):
                loss = training.official_loss(model, own, batch, config)()
                loss.backward()
        gradients.append(torch.cat([loss[None], *(x.grad.flatten() for x in adapter.parameters())]).detach())
    ours, theirs = gradients
    assert ours[0] > 0 and relative_error(ours, theirs) < 1e-4


def test_a_step_of_a_rate_of_zero_is_the_same_step():
    with training.steps(training.QUICK[0]) as variants:
        losses = {name: [step() for _ in range(3)] for name, step in variants.items()}
    for name, (first, *others) in losses.items():
        assert others == [first, first], name
