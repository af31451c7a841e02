"""``benchmarks.instructions``: what is made of the counts; valgrind itself is not asked."""

from benchmarks import instructions


def test_rows_are_of_a_layer_and_a_token():
    share = instructions.TOKENS * instructions.CELLS[0].layers
    found = {(0, "plain"): 1000 * share, (0, "MimIC"): 1250 * share, (1, "plain"): 500 * share}
    rows = instructions.rows_of(found)
    assert [(x["variant"], x["padded"], x["instructions"], x["ratio"]) for x in rows] == [
        ("plain", False, 1000, 1.0), ("MimIC", False, 1250, 1.25), ("plain", True, 500, 1.0),
    ]  # fmt: skip
    machine = dict.fromkeys(("cpu", "torch", "transformers", "commit", "date"), "x")
    table = instructions.markdown({"machine": machine, "rows": rows})
    assert "| 576, float32, no mask | MimIC | 1,250 | 1.250 |" in table
