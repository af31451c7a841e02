"""``benchmarks.layers`` runs, and its rows are of the models that they name."""

import json

import torch

import mmicl_kernels as mk
from benchmarks import layers


def test_it_runs(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert layers.main(["--quick", "--out", str(tmp_path), "--seconds", "0"]) == 0
    finally:
        torch.set_num_threads(threads)
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
