"""GGUF files, read as the ``gguf`` package reads them."""

import numpy as np
import pytest

from mmicl_kernels.testing.gguf import read_metadata, read_tensors

gguf = pytest.importorskip("gguf")
KINDS = {"F32": (3, 5), "F16": (7,), "Q4_1": (3, 64), "Q8_0": (2, 5, 32)}  # shapes, of whole blocks


@pytest.fixture
def file(tmp_path):
    """Every kind of tensor that is read, some with an odd number of bytes before the next."""
    path, generator = tmp_path / "model.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a naïve model")
    writer.add_uint32("count", 7)
    writer.add_float32("share", 0.5)
    writer.add_bool("tied", True)
    writer.add_array("words", ["one", "two"])
    for kind, shape in KINDS.items():
        values, kind = generator.standard_normal(shape).astype(np.float32), gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_kind_of_tensor(file):
    expected = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in gguf.GGUFReader(file).tensors}
    found = dict(read_tensors(file))
    assert list(found) == list(expected) == list(KINDS)
    for name, x in found.items():
        assert x.dtype == np.float32 and x.shape == KINDS[name]
        np.testing.assert_array_equal(x, expected[name].astype(np.float32).reshape(x.shape), err_msg=name)
        assert np.unique(x).size > 4


def test_metadata(file):
    fields = read_metadata(file)
    assert fields["general.name"] == "a naïve model" and fields["words"] == ["one", "two"]
    assert (fields["count"], fields["share"], fields["tied"]) == (7, 0.5, True)


def test_another_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 and more")
    for read in (read_metadata, lambda x: list(read_tensors(x))):
        with pytest.raises(ValueError, match=r"model.gguf begins with b'PK.*expected b'GGUF'"):
            read(path)


def test_another_kind_of_tensor(tmp_path):
    path, kind = tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q5_0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("weight", gguf.quantize(np.ones((2, 32), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"weight is of kind 6, expected one of \[0, 1, 3, 8\]"):
        list(read_tensors(path))


@pytest.mark.parametrize("length", [6, 40, -600, -100])
def test_a_file_that_ends_early(length, file, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="short.gguf ends within"):
        list(read_tensors(path))


def test_another_version(file, tmp_path):
    path = tmp_path / "old.gguf"
    path.write_bytes(b"GGUF\x01\x00\x00\x00" + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"version 1, expected one of \(2, 3\)"):
        read_metadata(path)
