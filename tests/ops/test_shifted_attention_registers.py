"""Machine code of every launch in the table, without a GPU: no spills, tensor cores, TMA, known registers.

``registers.json`` holds what the assembler of Triton 3.6.0 made of each row, and a digest of the kernels that
it made it of: where they have changed, a test says so. To renew it, half an hour of a core:
``UPDATE_REGISTERS=1 pytest tests/ops/test_shifted_attention_registers.py -m "slow or not slow"``.
"""

import functools
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from mmicl_kernels.ops._core import _triton, _triton_keys  # noqa: E402
from mmicl_kernels.ops.attention_shift._triton import bwd as shift_bwd  # noqa: E402
from mmicl_kernels.ops.attention_shift._triton import keys as shift_keys  # noqa: E402
from mmicl_kernels.ops.attention_shift.kernels import VirtualKeys  # noqa: E402
from mmicl_kernels.ops.shifted_attention._triton import bwd, fwd, launch, tiles  # noqa: E402
from mmicl_kernels.ops.shifted_attention.options import Options, new_results  # noqa: E402
from mmicl_kernels.testing.cross_compile import (  # noqa: E402
    SHARED_MEMORY,
    compiling_for,
    machine_code,
)
from mmicl_kernels.testing.inputs import ints  # noqa: E402
from tests.ops.triton_process import compiles  # noqa: E402

pytestmark = compiles

TABLE = Path(__file__).with_name("registers.json")
UPDATE = os.environ.get("UPDATE_REGISTERS") == "1"
DTYPES = {2: torch.bfloat16, 4: torch.float32}
B, H, G = 2, 8, 2
# Virtual keys: heads that have their own, keys of each, whether they are a prefix.
KEYS = {"keys_8": (H, 8, False), "prefix_8": (H, 8, True), "prefix_128": (G, 128, True)}
SIZES = {"decode": (1, 4096), "chunk": (16, 4096)}  # queries and keys; (512, 512) for the others
NAMES = {
    "dq": bwd.shifted_attention_dq_kernel,
    "dkdv": bwd.shifted_attention_dkdv_kernel,
    "combine": fwd.shifted_attention_combine_kernel,
    **dict.fromkeys(("fwd", "decode", "chunk"), fwd.shifted_attention_fwd_kernel),
}
ALL = (
    *dict.fromkeys(NAMES.values()),
    shift_bwd.attention_shift_bwd_kernel,
    shift_bwd.attention_shift_reduce_kernel,
    shift_keys.virtual_keys_bwd_kernel,
)
# Rows of sm_89 are those of sm_80 that fit its shared memory; the code is the same.
ROWS = [row for row in launch.CONFIGS if row[2] in (launch.SM_80, launch.SM_90)]


def variants(is_general, T, S, dtype):
    """Options of the calls that a row of the table serves."""
    bounds = {"kv_start": ints(1, 1), "kv_end": ints(S, S)}
    added = torch.zeros(B, 1, T, S, dtype=dtype)
    packed = {"cu_seqlens_q": ints(0, T), "cu_seqlens_k": ints(0, S), "max_seqlen_q": T, "max_seqlen_k": S}
    if is_general:
        return {
            "mask": {"mask": torch.ones(B, 1, T, S, dtype=torch.bool), **bounds},
            "bias": {"mask": added},
            "softcap": {"softcap": 30.0, "causal": True, "window": 100, **bounds},
            "all_keys": {"all_keys": True, "causal": True, **bounds},
            "all_keys_softcap": {"all_keys": True, "softcap": 30.0, "causal": True, **bounds},
            "packed": {"causal": True, "adapter_ids": ints(0), **packed},
            "training": {"causal": True, "training": True, **bounds},
        }
    return {
        "causal": {"causal": True},
        "window": {"causal": True, "window": 100, "adapter_ids": ints(0, 0)},
        "training": {"causal": True, "training": True},
        **{name: {"causal": True, "prefix": prefix} for name, (_, _, prefix) in KEYS.items()},
    }


def compiled(row, name, options, monkeypatch):
    """Machine code of the row's kernel (and of the combine, in a decode), as launched for ``options``."""
    kernel, _, generation, itemsize, BD = row
    monkeypatch.setattr(launch, "generation", lambda device: generation)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    options = Options(scale=0.1, impl="triton", **options)
    batch = B if options.cu_seqlens_q is None else 1
    (T, S), dtype = SIZES.get(kernel, (512, 512)), DTYPES[itemsize]
    q = torch.empty(batch, T, H, BD, dtype=dtype).transpose(1, 2)
    k = torch.empty(batch, S, G, BD, dtype=dtype).transpose(1, 2)
    P, N, prefix = KEYS.get(name, (H, 1, False))
    weight, bias, lse = torch.empty(1, P, N, BD), torch.empty(1, P, N), torch.empty(batch, H, T)
    which = torch.ones(1, dtype=torch.bool) if prefix else None
    keys = VirtualKeys(weight, bias, weight, options.adapter_ids, which)
    wanted = (NAMES[kernel], NAMES["combine"])
    others = [x for x in ALL if x not in wanted]
    with compiling_for(generation, wanted, others) as done:
        if kernel in ("dq", "dkdv"):
            saved = (q, lse, lse, new_results(q, options)[3])
            bwd.backward(q, None, saved, True, (q, k, k), keys, options)
        else:
            fwd.forward(q, k, k, keys, options)
    return [machine_code(x) for x in done]


def name_of(row):
    kernel, is_general, generation, itemsize, BD = row
    return f"{kernel}{'_general' if is_general else ''}-sm_{generation}-{8 * itemsize}_bit-D{BD}"


def check(row, name, monkeypatch):
    """Assert what holds of one variant; returns registers per thread by kernel."""
    kernel, is_general, generation, itemsize, _ = row
    config, (T, S) = launch.CONFIGS[row], SIZES.get(kernel, (512, 512))
    options = variants(is_general, T, S, DTYPES[itemsize])[name]
    codes = compiled(row, name, options, monkeypatch)
    launched = (NAMES[kernel], NAMES["combine"]) if kernel in SIZES else (NAMES[kernel],)
    assert [code.name for code in codes] == [x.__name__ for x in launched]
    for code in codes:
        assert code.spilled_bytes == 0, code.name
        assert code.shared_bytes <= SHARED_MEMORY[generation], code.name
    main = codes[0]
    if itemsize == 2:
        # wgmma takes 64 rows of queries, or in dK and dV of keys; fewer go through mma.sync
        rows = config.BN if kernel == "dkdv" else config.BM
        assert main.count("HGMMA" if generation == launch.SM_90 and rows >= 64 else "HMMA") > 0
    assert (main.count("UTMALDG") > 0) == config.TMA
    assert config.TMA or config.num_stages == 1 or main.count("LDGSTS") > 0
    return {code.name: code.registers for code in codes}


def known_registers():
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


@functools.cache
def kernels_digest():
    """Of the kernels' text, but for comments, of their modules' constants, and of how they are launched."""
    names = {k: x for y in (_triton, _triton_keys, tiles, fwd, bwd) for k, x in vars(y).items()}
    kernels = {x.src for x in names.values() if isinstance(x, triton.JITFunction)}
    constants = {f"{k} = {getattr(x, 'value', x)!r}" for k, x in names.items() if k.isupper()}
    text = "\n".join((*sorted(kernels), *sorted(constants), *map(str, sorted(launch.CONFIGS.items()))))
    return hashlib.sha256(re.sub(r"\s*#.*", "", text).encode()).hexdigest()[:16]


def variants_of(row):
    """The names of a row's variants; in a backward, "training" is the same code. What virtual keys cost is
    known of rows that models use."""
    kernel, is_general, _, itemsize, BD = row
    names = [x for x in variants(is_general, 1, 1, torch.float32) if x not in KEYS]
    keys = KEYS if kernel != "dkdv" and not is_general and itemsize == 2 and BD <= 128 else {}
    return [*keys, *(x for x in names if x != "training" or kernel not in ("dq", "dkdv"))]


def cases():
    """All variants where the table is made (UPDATE_REGISTERS=1). Else, as the digest speaks for the others,
    the first of rows that models use, of which those of sm_90 are quick."""
    for row in ROWS:
        _, _, generation, itemsize, BD = row
        names = variants_of(row)
        first = next(x for x in names if x not in KEYS)
        for name in names:
            typical = itemsize == 2 and BD <= 128 and name in (first, "prefix_8")
            if typical or UPDATE:
                quick = typical and generation == launch.SM_90 and BD == 128
                yield pytest.param(
                    row, name, marks=[] if quick else [pytest.mark.slow], id=f"{name_of(row)}-{name}"
                )


@pytest.mark.parametrize(("row", "name"), list(cases()))
def test_machine_code(row, name, monkeypatch):
    registers = check(row, name, monkeypatch)
    table = known_registers()
    if UPDATE:
        known = table.get(name_of(row), {})
        if known.get("kernels") != kernels_digest():
            known = {"kernels": kernels_digest(), "registers": {}}
        known["registers"][name] = registers
        TABLE.write_text(json.dumps({**table, name_of(row): known}, indent=1, sort_keys=True) + "\n")
    elif triton.__version__ == "3.6.0":
        assert registers == table[name_of(row)]["registers"][name]


def test_the_registers_are_of_these_kernels():
    """A change of a kernel, or of its launch, asks for the table anew (the first lines of this file)."""
    stale = [name for name, known in known_registers().items() if known["kernels"] != kernels_digest()]
    assert not stale


def test_the_table_is_complete():
    """All kernels, kinds, generations, sizes of elements and head dims; nothing that is not launched."""
    names = ("fwd", "decode", "chunk", "dq", "dkdv")
    generations = (launch.SM_80, launch.SM_89, launch.SM_90)
    expected = {
        (kernel, is_general, generation, itemsize, BD)
        for kernel in names for is_general in (False, True) for generation in generations
        for itemsize in (2, 4) for BD in (64, 128, 256)
    }  # fmt: skip
    assert launch.CONFIGS.keys() == expected


def test_the_registers_are_of_the_rows_there_are():
    found = {name: {*known["registers"]} for name, known in known_registers().items()}
    assert found == {name_of(row): {*variants_of(row)} for row in ROWS}
