"""A bank of 100,000 demonstrations of 30 tokens of width 1024, 6 GB: what opening and using it reads."""

import os
from dataclasses import replace

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels import ops
from tests.store.banks import adapter, hollow
from tests.store.crashes import told_by_child
from tests.store.vectors import BACKBONE

DEMONSTRATIONS, TOKENS, WIDTH = 100_000, 30, 1024
ROW_BYTES = 2 * WIDTH
PAGES_AROUND = 2**16  # what Linux maps around a page that is touched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = adapter()
    made.backbone = replace(BACKBONE, hidden_size=WIDTH)
    return hollow(tmp_path_factory.mktemp("large"), made, torch.bfloat16, DEMONSTRATIONS, TOKENS)


def usage():
    """Resident bytes, and bytes read by calls, of this process."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/io") as file:
        read = dict(line.split(": ") for line in file.read().splitlines())["rchar"]
    return torch.tensor([resident, int(read)])


@pytest.mark.slow
def test_opening_reads_the_index_alone(folder):
    index = (folder / "index.bin").stat().st_size

    def work():
        before = usage()
        bank = mk.DemonstrationBank(folder)
        fused = bank.fused
        assert fused.rows.shape == (DEMONSTRATIONS * TOKENS, WIDTH) and len(bank) == DEMONSTRATIONS
        return (usage() - before).tolist()

    resident, read = told_by_child(work)
    assert index <= read < index + 2**16  # and bank.json, and what is measured with
    assert resident < 10 * index, "more is in memory than what was made of the records"


@pytest.mark.slow
def test_splicing_reads_what_it_splices(folder):
    requests, shots = 32, 16

    def work():
        fused = mk.DemonstrationBank(folder).fused
        ids = torch.randint(DEMONSTRATIONS, (requests * shots,))
        cu_demos = torch.arange(0, requests * shots + 1, shots)
        prompt = torch.ones(requests, 8, WIDTH, dtype=torch.bfloat16)
        before = usage()
        length = shots * TOKENS + 8
        out = ops.prefix_splice(fused.rows, fused.offsets, ids, cu_demos, prompt, length=length)
        assert out.embeddings.shape == (requests, length, WIDTH)
        assert int(out.attention_mask.sum()) == requests * length
        return [*(usage() - before).tolist(), out.embeddings.nbytes]

    resident, _, result = told_by_child(work)
    touched = requests * shots * (TOKENS * ROW_BYTES + 2 * PAGES_AROUND)
    assert resident < 2 * result + touched < DEMONSTRATIONS * TOKENS * ROW_BYTES / 20
