"""The faster interpreter says what Triton's own does, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import sys, torch, triton, triton.language as tl

if sys.argv[1] == "faster":
    from tests.support import triton_interpreter
    triton_interpreter.install()

@triton.jit
def kernel(x, y, n, out, wide_out, N: tl.constexpr, M: tl.constexpr):
    rows, columns = tl.arange(0, N), tl.arange(0, M)
    offsets = rows[:, None] * M + columns
    mask = (rows[:, None] < n) & (columns != 3)
    a = tl.load(x + offsets, mask=mask, other=0.5)
    b = tl.load(y + offsets)
    whole = (a * b + a / (1 + b * b) + 2).to(tl.float32) - 0.1 / (1 + tl.abs(b))
    whole = tl.where(mask | (whole > b), tl.maximum(whole, -1), 1e-3 * rows[:, None])
    whole += tl.sum(whole, 1)[:, None] + tl.max(whole, 0)
    numbers = (offsets - n) % 5 + (offsets // 3 << 2) + (n > 2) * 7 + (offsets ^ 6) + (-columns)
    numbers += tl.minimum(offsets, n) + tl.cdiv(n, 2) + (~columns & 3) + (n == 3.0) + 2**31 * (columns >= 1)
    numbers += (offsets < 9) + (offsets < 2**33) + tl.where((columns < 9) & ~(rows[:, None] == n), 1, 0)
    tl.store(out + offsets, whole)
    tl.store(wide_out + offsets, numbers)

torch.manual_seed(0)
for dtypes in ((torch.float16,) * 2, (torch.float32,) * 2, (torch.float16, torch.float32),
               (torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
    for n in (3, 5):
        x, y = (torch.randn(8, 16).to(dtype) for dtype in dtypes)
        out, wide_out = torch.empty(8, 16), torch.empty(8, 16, dtype=torch.int64)
        for _ in range(2):  # once noted, once remembered
            kernel[(1,)](x, y, n, out, wide_out, N=8, M=16)
            print(out.view(torch.int32).tolist(), wide_out.tolist())
"""


def test_the_same_bits(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[1]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    own, faster = (
        subprocess.run([sys.executable, program, which], env=env, check=True, capture_output=True, text=True)
        for which in ("own", "faster")
    )
    assert len(own.stdout.splitlines()) == 20
    assert own.stdout == faster.stdout
