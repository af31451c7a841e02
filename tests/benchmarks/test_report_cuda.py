"""The tables and plots of a GPU's results."""

import dataclasses
import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import report
from benchmarks.harness import tables_cuda
from benchmarks.harness.case import MODELS, decode, prefill


def cuda_result():
    """Two forward cases and a decode; numbers are such that every cell can be told."""
    rows = []

    def add(case, **times):
        for provider, ms in times.items():
            ratio = {peer: ms / times[peer] for peer in ("cudnn", "flash", "a", "b") if peer in times}
            row = {
                "run": 0,
                **dataclasses.asdict(case),
                "provider": provider,
                "median_ms": ms,
                "ratio": ratio,
            }
            rows.append({**row, "gb_per_s": 1000 / ms, "gflop_per_s": 1e6 / ms, "peak_bytes": 2**20 * ms})

    add(prefill("m", 1024), cudnn=1.0, flash=0.8, a=2.0, b=1.6, auto=1.2)
    add(prefill("m", 2048), flash=2.0, a=4.0, b=5.0, auto=3.0)
    rows.append({"run": 0, **dataclasses.asdict(prefill("m", 2048)), "provider": "cudnn", "error": "E: no"})
    rows[-2]["fault"], rows[-4]["fault"] = None, "out: too far"
    add(decode("m", 4096, 8), cudnn=0.5, flash=0.25, auto=0.5)
    machine = {
        "gpu": "G", "torch": "2", "cuda": "13", "cudnn": 9, "commit": "c", "date": "d",
        "copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 780.0,
    }  # fmt: skip
    return {
        "op": "x", "device": "cuda", "machine": machine, "command": "run", "peers": [],
        "floors": ["cudnn", "flash"], "stock": ["a", "b"], "ours": ["auto"], "rows": rows,
        "left_out": [dataclasses.asdict(prefill("m", 4096))],
    }  # fmt: skip


@pytest.fixture
def model_m(monkeypatch):
    monkeypatch.setitem(MODELS, "m", (32, 8, 128))


def test_cuda_tables(model_m):
    tables = report.tables(cuda_result())
    assert set(tables) == {"x-cuda-forward", "x-cuda-decode"}
    lines = tables["x-cuda-forward"].splitlines()
    assert lines[0] == (
        "| model | dtype | B | T | cudnn ms | flash ms | a ms | b ms | auto ms | auto / cudnn"
        " | auto / best of plain | auto / best of stock + epilogue | TFLOP/s | cudnn MiB | auto MiB |"
    )
    assert (
        lines[2]
        == "| m | bfloat16 | 1 | 1024 | 1 | 0.8 | 2 | 1.6 | 1.2 | 1.20 | 1.50 | 0.75 | 833 | 1.0 | 1.2 |"
    )
    # cuDNN failed and the values of "a" are wrong: neither is a peer here, and "b" is the best that is left.
    assert lines[3] == "| m | bfloat16 | 1 | 2048 | - | 2 | - | 5 | 3 | - | 1.50 | 0.60 | 333 | - | 3.0 |"
    below = "\n".join(lines[4:])
    assert "a: out: too far (m B=1 T=2048 S=2048)" in below
    assert "cudnn: E: no (m B=1 T=2048 S=2048)" in below
    assert "Left out for lack of time: m B=1 T=4096 S=4096" in below
    assert "a copy at 4.00 TB/s and a bf16 product at 780 TFLOP/s" in below
    decoded = tables["x-cuda-decode"].splitlines()
    assert decoded[0].startswith("| model | dtype | B | S |") and "| share of copy |" in decoded[0]
    assert decoded[2] == "| m | bfloat16 | 8 | 4096 | 0.5 | 0.25 | 0.5 | 1.00 | 2.00 | 50 % | 0.5 | 0.5 |"
    assert "Left out" not in tables["x-cuda-decode"]


def test_cuda_plots_and_readme(model_m, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "r.json"
    readme.write_text("<!-- table: x-cuda-decode -->\n<!-- end -->\n")
    results.write_text(json.dumps([cuda_result()]))
    report.main([str(results), "--readme", str(readme), "--plots", str(tmp_path)])
    assert "| share of copy |" in readme.read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"x-cuda-forward.png", "x-cuda-decode.png"}


def test_many_cases_of_one_reason_are_counted():
    assert tables_cuda._some(list("abcdef")) == "a; b; c; d; and 2 more"
    assert tables_cuda._some(list("ab")) == "a; b"
