"""Right before fast: an op whose tests fail is not measured, and a wrong result gets no ratio.

On a CPU the op's tests are run first. On a GPU they have a stage of their own (``make gpu STAGE=test``);
here the values of every measured case are compared with fp64 instead (values.py).
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.harness.spec import Spec

ROOT = Path(__file__).resolve().parents[2]


def is_green(spec: Spec) -> bool:
    """Whether pytest passes the op's tests; prints what failed."""
    print(f"{spec.name}: testing")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-m", "not slow", *spec.tests]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if completed.returncode != 0:
        print(completed.stdout + completed.stderr)
    return completed.returncode == 0


def why_not(row: dict) -> str | None:
    """Why a row gets no ratio, or None."""
    return row.get("error") or row.get("fault")


def is_right(result: dict) -> bool:
    """Whether every row of our implementations has a time and right values; prints those that do not."""
    wrong = [row for row in result["rows"] if row["provider"] in result["ours"] and why_not(row)]
    for row in wrong:
        case = f"{row['model']} B={row['B']} T={row['T']} S={row['S']}"
        print(f"{result['op']} {row['provider']} {case}: {why_not(row)}")
    return not wrong
