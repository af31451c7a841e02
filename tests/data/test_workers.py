"""Records in a DataLoader's workers. A file of its own: spawned ones import it, and should import little."""

import json
import multiprocessing

import pytest
from torch.utils.data import DataLoader, Dataset

from mmicl_kernels.data import Records


class Read(Dataset):
    """As a training set has it: an item reads its images."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self.records[i]
        return record.id, record.image_bytes()


def same(item):
    return item


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(tmp_path, context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} here")
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(name.encode())
    lines = [{"image": f"{i % 2 + 1}.png", "text": "", "answer": ""} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = Records(tmp_path / "data.jsonl")
    assert records[0].id == "1"
    options = {"batch_size": None, "num_workers": 2 if context == "fork" else 1, "collate_fn": same}
    loader = DataLoader(Read(records), multiprocessing_context=context, **options)
    assert list(loader) == [(str(i + 1), (f"{i % 2 + 1}.png".encode(),)) for i in range(40)]
