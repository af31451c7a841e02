"""Instructions that a decoded token costs a layer: the same number whatever else the machine does.

``python -m benchmarks.instructions --out FOLDER`` writes ``FOLDER/<device>/instructions.json``. It decodes
under valgrind's callgrind, which must be installed with a C compiler; one thread, some minutes. Python's own
instructions count too, but not those of its garbage collector, which comes when it likes.
"""

import argparse
import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from benchmarks.harness.decoders import machine_line, made_by, new_result, path_of, save
from benchmarks.layers import OFFICIAL, OURS, Answer, Cell, variants

CELLS = (
    Cell(576, 9, 3, 2, "float32", 1, False, prompt=64),
    Cell(576, 9, 3, 2, "float32", 1, True, prompt=64),
)
COUNTED = [*product(range(len(CELLS)), ("plain", *OURS, OFFICIAL))]  # cells by number, and their variants
WARM_UPS, TOKENS = 3, 4
# valgrind's requests are macros of its header.
MARKS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


@torch.no_grad()
def decode(marks: ctypes.CDLL) -> None:
    """Every variant of every cell, token by token, between two marks; within callgrind."""
    torch.set_num_threads(1)
    gc.disable()
    for number, cell in enumerate(CELLS):
        with ExitStack() as patched:
            for name, model in variants(cell.model(), cell, patched).items():
                answer = Answer(model, cell, WARM_UPS + TOKENS)
                for _ in range(WARM_UPS):
                    answer()
                gc.collect()
                marks.begin()
                for _ in range(TOKENS):
                    answer()
                marks.end(f"{number} {name}".encode())


def counted() -> dict[tuple[int, str], int]:
    """Instructions between the marks, by cell and variant. Raises RuntimeError: valgrind or cc failed."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "marks.c"), Path(folder, "marks.so")
        source.write_text(MARKS)
        _run(["cc", "-shared", "-fPIC", "-o", library, source])
        tool = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts"]
        # Addresses and hashes decide how tables are laid out.
        fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"}
        worker = [sys.executable, "-m", "benchmarks.instructions", "--marks", library]
        _run(["setarch", "--addr-no-randomize", "valgrind", *tool, *worker], {**os.environ, **fixed})
        found = {}
        for path in Path(folder).glob("counts.*"):
            text = path.read_text()
            trigger = re.search(r"^desc: Trigger: Client Request: (\d+) (.+)$", text, re.MULTILINE)
            total = re.search(r"^(?:summary|totals): (\d+)$", text, re.MULTILINE)
            if trigger and total:
                found[int(trigger[1]), trigger[2]] = int(total[1])
    missing = [one for one in COUNTED if one not in found]
    if missing:
        raise RuntimeError(f"callgrind has no counts of {missing}")
    return found


def _run(command: list[object], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}: {done.stderr[-2000:]}")


def rows_of(found: dict[tuple[int, str], int]) -> list[dict]:
    """Of a layer and a token; the head and the embedding, which all variants have, are shared out."""
    rows = []
    for number, name in COUNTED:
        cell, total = CELLS[number], found[number, name]
        share = TOKENS * cell.layers
        ratio = total / found[number, "plain"]
        rows.append({"variant": name, **asdict(cell), "instructions": total / share, "ratio": ratio})
    return rows


def tables(result: dict) -> dict[str, str]:
    lines = [
        "| decoder | variant | instructions of a token, a layer's share | to plain |",
        "|---|---|--:|--:|",
    ]
    for row in result["rows"]:
        mask = "padded" if row["padded"] else "no mask"
        lines.append(
            f"| {row['hidden']}, {row['dtype']}, {mask} | {row['variant']} | {row['instructions']:,.0f} | "
            f"{row['ratio']:.3f} |"
        )
    line, prompt = machine_line(result, "AVX2, one thread", made_by(result["machine"])), CELLS[0].prompt
    lines.append(f"\n{line}; a token after a prompt of {prompt}, counted by callgrind")
    return {"instructions": "\n".join(lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    parser.add_argument("--marks", type=Path, help=argparse.SUPPRESS)  # of what runs within callgrind
    options = parser.parse_args(arguments)
    if options.marks:
        decode(ctypes.CDLL(str(options.marks)))
        return 0
    result = new_result()
    result["rows"] = rows_of(counted())
    save(result, path_of(result, options.out, "instructions"))
    print(*tables(result).values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
