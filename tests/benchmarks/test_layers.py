"""``benchmarks.layers`` runs, and its rows are of the models that they name."""

import json

import pytest
import torch

import mmicl_kernels as mk
from benchmarks import layers


@pytest.mark.usefixtures("same_threads")
def test_it_runs(tmp_path, capsys):
    assert layers.main(["--quick", "--out", str(tmp_path), "--seconds", "0"]) == 0
    (path,) = tmp_path.glob("*/layers.json")
    result = json.loads(path.read_text())
    names = ["plain", *layers.OURS, layers.OFFICIAL]
    assert [row["variant"] for row in result["rows"]] == names
    plain = result["rows"][0]
    assert plain["first_ratio"] == plain["further_ratio"] == [1.0, 1.0, 1.0]
    for row in result["rows"]:
        assert row["further_ms"] > 0 and row["further_ratio"][1] <= row["further_ratio"][0]
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in names) and "32 x 2, fp32, batch 2, padded" in shown
    del result["rows"][1:]  # a decoder of which there is a row was measured
    path.write_text(json.dumps(result))
    assert layers.main(["--quick", "--out", str(tmp_path), "--resume"]) == 0
    assert json.loads(path.read_text()) == result


def test_tables_beside_an_earlier_run():
    def row(variant, further, **kind):
        times = {f"{x}_{y}": 1 for x in ("first", "further") for y in ("ms", "rounds")}
        ratios = {"first_ratio": [1.5, 1.4, 1.6], "further_ratio": [further, further, further]}
        made = {"commit": "c", "date": "d"}
        cell = {**layers.asdict(layers.QUICK[0]), "padded": False, **made, **kind}
        return {"variant": variant, **cell, **times, **ratios, "peak_bytes": 3 * 2**20}

    line = {"cpu": "C", "threads": 1, "torch": "2", "transformers": "5", "commit": "c", "date": "d"}
    result = {"machine": line, "rows": [row("plain", 1.0), row("MimIC", 2.0)]}
    result["rows"] += [row("MimIC", 0.5, hidden=64), row("MimIC", 3.0, compiled=True)]
    tables = layers.tables(result)
    assert (
        "| 32 x 2, fp32, batch 2 | MimIC | 1.0 | 1.50 (1.40 to 1.60) | 1.00 | 2.00 (2.00 to 2.00) | 3 |"
        in tables["layers"]
    )
    (mean,) = [line for line in tables["layers-mean"].splitlines() if line.startswith("| MimIC")]
    assert mean == "| MimIC | 1.50 (1.50 to 1.50) | 1.00 (0.50 to 2.00) |  | 3.00 (3.00 to 3.00) |"
    shown = layers.markdown(result, {"rows": [row("MimIC", 7.0)]}).splitlines()
    assert shown[3].endswith("| 1.50, 7.00 |") and shown[4].endswith("|  |")


@pytest.mark.usefixtures("same_threads")
def test_a_profile_names_functions(capsys):
    assert layers.main(["--quick", "--profile", "MimIC"]) == 0
    shown = capsys.readouterr().out
    assert "MimIC: of a layer and a token" in shown and "decode" in shown and "linear" in shown


def test_variants_share_their_weights_and_differ():
    cell = layers.QUICK[0]
    with layers.ExitStack() as patched:
        models = layers.variants(cell.model(), cell, patched)
        weight = next(models["plain"].parameters()).data_ptr()
        assert all(next(x.parameters()).data_ptr() == weight for x in models.values())
        with torch.no_grad():
            logits = {name: x(**cell.inputs()).logits for name, x in models.items()}
        assert [name for name, x in models.items() if mk.handle_of(x) is not None] == [*layers.OURS]
    assert not any(torch.equal(x, logits["plain"]) for name, x in logits.items() if name != "plain")


def test_the_published_form_is_that_of_all_keys():
    """But for padding, which it counts as keys."""
    cell = layers.Cell(32, 4, 2, 2, "float32", 2, False, prompt=16)
    with layers.ExitStack() as patched:
        models = layers.variants(cell.model(), cell, patched)
        with torch.no_grad():
            ours, theirs = (models[x](**cell.inputs()).logits for x in ("MimIC, all_keys", layers.OFFICIAL))
    torch.testing.assert_close(ours, theirs)


def test_an_answer_is_what_generate_says():
    cell = layers.QUICK[0]
    model, tokens = cell.model(), []
    answer = layers.Answer(model, cell, 4)
    for _ in range(4):
        tokens.append(answer._token)
        answer()
    expected = model.generate(
        **cell.inputs(), max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    assert torch.equal(torch.cat(tokens, 1), expected[:, cell.prompt :])
