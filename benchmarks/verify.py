"""Right before fast: an op whose tests fail is not measured."""

import subprocess
import sys
from pathlib import Path

from benchmarks.registry import OpSpec

ROOT = Path(__file__).resolve().parents[1]


def is_green(spec: OpSpec) -> bool:
    """Whether pytest passes the op's tests; prints what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-m", "not slow", *spec.tests]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if completed.returncode != 0:
        print(completed.stdout + completed.stderr)
    return completed.returncode == 0
