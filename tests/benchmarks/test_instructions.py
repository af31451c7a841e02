"""``benchmarks.instructions``: what is made of the counts; valgrind itself is not asked."""

from benchmarks import instructions, layers


def test_rows_are_of_a_layer_and_a_token():
    share = instructions.TOKENS * instructions.CELLS[0].layers
    found = dict.fromkeys(instructions.COUNTED, 1000 * share)
    rows = instructions.rows_of(found | {(0, "MimIC"): 1250 * share, (1, "plain"): 500 * share})
    assert [(x["variant"], x["padded"]) for x in rows] == [
        (name, padded) for padded in (False, True) for name in ("plain", *layers.OURS, layers.OFFICIAL)
    ]
    shown = [x for x in rows if x["variant"] in ("plain", "MimIC")]
    assert [(x["variant"], x["padded"], x["instructions"], x["ratio"]) for x in shown] == [
        ("plain", False, 1000, 1.0), ("MimIC", False, 1250, 1.25),
        ("plain", True, 500, 1.0), ("MimIC", True, 1000, 2.0),
    ]  # fmt: skip
    machine = dict.fromkeys(("cpu", "torch", "transformers", "commit", "date"), "x")
    table = instructions.tables({"machine": machine, "rows": rows})["instructions"]
    assert "| 576, float32, no mask | MimIC | 1,250 | 1.250 |" in table
