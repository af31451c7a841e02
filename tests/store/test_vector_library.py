"""VLibrary: what is put is got, found and combined, and every argument is checked."""

import dataclasses
import json
import os
import stat
import sys
import threading
import types

import numpy as np
import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods import ADAPTERS, LIVEConfig
from mmicl_kernels.store import read_adapter
from tests.store.vectors import BACKBONE, LAYERS, MAKERS, WIDTH, PlainAdapter, PlainConfig, assert_same, live

OTHER = dataclasses.replace(BACKBONE, fingerprint=(3.0, 2.0, 1.0))


@pytest.fixture(autouse=True)
def plain_method(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "plain", PlainAdapter)


@pytest.fixture
def library(tmp_path):
    return mk.VLibrary(tmp_path / "library")


def names(entries):
    return [entry.name for entry in entries]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", MAKERS)
def test_round_trip_is_bit_exact(library, method, dtype):
    adapter = MAKERS[method]().to(dtype)
    with torch.no_grad():
        first = next(adapter.parameters()).view(-1)
        first[:3] = torch.tensor([-0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max], dtype=dtype)
    library.put("a", adapter)
    got = mk.VLibrary(library.folder).get("a", BACKBONE)
    assert_same(got, adapter)
    assert all(x.requires_grad for x in got.parameters())
    assert_same(read_adapter(library.path("a")), adapter)
    assert library.verify() == []


def test_mixed_dtypes_and_views_of_one_tensor(library):
    adapter = live()
    adapter.layers["0"].half()
    shared = torch.randn(2 * WIDTH)
    adapter.layers["1"].vector.data = shared[:WIDTH]
    adapter.layers["2"].vector.data = shared[::2]
    library.put("a", adapter)
    assert_same(library.get("a"), adapter)


def test_got_adapter_is_ones_own(library):
    library.put("a", live(1.0))
    with torch.no_grad():
        library.get("a").layers["0"].vector.add_(1)
    assert_same(library.get("a"), live(1.0))


def test_entry_says_what_was_put(library):
    record = {"loss": [0.5, 0.25], "steps": 3, "note": "ü\n", "none": None}
    put = library.put(
        "vqa/α".replace("/", " "),
        live(2.0),
        task="vqa",
        tags=("b", "a", "b"),
        metrics={"accuracy": 0.5, "n": 3},
        record=record,
        embedding=[3.0, 4.0],
    )
    entry = mk.VLibrary(library.folder).entry("vqa α")
    assert entry == put
    assert (entry.method, entry.task, entry.tags) == ("live", "vqa", ("b", "a"))
    assert entry.metrics == {"accuracy": 0.5, "n": 3.0} and entry.record == record
    assert entry.backbone == BACKBONE and entry.config == dataclasses.asdict(LIVEConfig())
    assert (entry.num_parameters, entry.embedding_dim, entry.score) == (LAYERS * (WIDTH + 1), 2, None)
    assert torch.equal(library.embedding("vqa α"), torch.tensor([3.0, 4.0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.name = "b"


def test_put_get_list_remove(library):
    assert library.list() == [] and len(library) == 0 and "a" not in library
    for name in ("b", "a", "c"):
        library.put(name, live())
    assert library.list() == ["a", "b", "c"] and "a" in library
    library.remove("b")
    assert library.list() == ["a", "c"] and "b" not in library and len(library) == 2
    for call in (library.get, library.entry, library.embedding, library.path, library.remove):
        with pytest.raises(KeyError, match="no entry 'b' in"):
            call("b")
    assert library.verify() == []


def test_reading_makes_nothing(library):
    assert library.search() == [] and library.list() == [] and library.verify() == []
    with pytest.raises(KeyError, match="no entry 'a'"):
        library.remove("a")
    assert not library.folder.exists()
    library.folder.mkdir()
    with pytest.raises(KeyError, match="no entry 'a'"):
        library.remove("a")
    assert library.verify() == [] and list(library.folder.iterdir()) == []


def test_overwrite(library):
    library.put("a", live(1.0), tags=["old"], embedding=[1.0, 0.0])
    with pytest.raises(FileExistsError, match="an entry 'a'; overwrite replaces it"):
        library.put("a", live(2.0))
    assert_same(library.get("a"), live(1.0))
    library.put("a", live(2.0), tags=["new"], overwrite=True)
    assert_same(library.get("a"), live(2.0))
    assert names(library.search(tags=["new"])) == ["a"] and library.search(tags=["old"]) == []
    assert library.search(embedding=[1.0, 0.0]) == [] and library.verify() == []


@pytest.mark.parametrize(
    "name", ["a", "VQA v2 (α=0.5)", "質問応答", "x" * 128, "a.b", "[red]", "é", "con", "🦜"]
)
def test_names(library, name):
    library.put(name, live())
    assert library.list() == [name] and library.path(name).parent == library.folder / "entries"
    assert library.path(name).name.isascii()


def test_names_that_a_file_system_may_confuse(library):
    for value, name in enumerate(("a", "A", "a ".strip() + "-", "a_")):
        library.put(name, live(float(value + 1)))
    assert len({library.path(name).name.lower() for name in library.list()}) == 4
    assert_same(library.get("A"), live(2.0))


def test_normal_form_of_a_name(library):
    library.put("e\u0301", live())
    assert library.list() == ["\u00e9"]
    assert library.entry("e\u0301").name == "\u00e9" and "\u00e9" in library


BAD_NAMES = ["", ".", "..", ".a", "-a", "a/b", "a\\b", "../a", "/a", "a\n", "a\0", " a", "a ", "x" * 129,
             "\ud800", "a\x1b[31m", "a\u202eb"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(library, name):
    for call in (library.get, library.entry, library.remove, lambda name: library.put(name, live())):
        with pytest.raises(ValueError, match="name is"):
            call(name)
    assert not library.folder.exists()


LOOP = []
LOOP.append(LOOP)
BAD_ARGUMENTS = {
    "name": (dict(name=3), TypeError, "name is 3"),
    "adapter": (dict(adapter=torch.nn.Linear(2, 2)), TypeError, "adapter is a Linear"),
    "adapter of nan": (dict(adapter=live(float("nan"))), ValueError, "finite"),
    "task": (dict(task=""), ValueError, "task is ''"),
    "tags of one string": (dict(tags="vqa"), TypeError, "tags is 'vqa'"),
    "tag": (dict(tags=["a\tb"]), ValueError, "tag is"),
    "many tags": (dict(tags=list(map(str, range(65)))), ValueError, "at most 64"),
    "metric": (dict(metrics={"a": float("nan")}), ValueError, "metric 'a' is nan"),
    "metric beyond fp64": (dict(metrics={"x": 10**400}), ValueError, "metric 'x' is no finite number"),
    "metric of a word": (dict(metrics={"x": "high"}), ValueError, "metric 'x' is no finite number"),
    "metrics of a number": (dict(metrics=5), TypeError, "int"),
    "record of keys that JSON merges": (dict(record=[{1: "a", "1": "b"}]), TypeError, "has the key 1"),
    "embedding of a dict": (dict(embedding={"a": 1}), TypeError, "embedding is {'a': 1}, expected"),
    "embedding beyond fp64": (dict(embedding=[10**400, 1]), TypeError, r"expected \[D\] of real numbers"),
    "record of nan": (dict(record=[float("inf")]), ValueError, "record or config of 'a' is not JSON"),
    "record of a tensor": (dict(record=torch.ones(2)), ValueError, "is not JSON"),
    "record of a loop": (dict(record=LOOP), ValueError, "record is nested deeper than 64 levels"),
    "record too long": (dict(record="x" * 2**22), ValueError, "too long"),
    "embedding of nan": (dict(embedding=[1.0, float("nan")]), ValueError, "not finite"),
    "embedding too large": (dict(embedding=torch.tensor([1e300], dtype=torch.float64)), ValueError, "fp32"),
    "embedding of zeros": (dict(embedding=[0.0, 0.0]), ValueError, "all zeros"),
    "embedding of nothing": (dict(embedding=[]), ValueError, r"shape \[0\]"),
    "embedding of rows": (dict(embedding=torch.ones(1, 2)), ValueError, r"shape \[1, 2\]"),
    "embedding of another dimension": (
        dict(embedding=[1.0, 2.0, 3.0]),
        ValueError,
        "dimension 3, the library has 2",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(library, case):
    library.put("there", live(), embedding=[1.0, 2.0])
    change, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        library.put(**{"name": "a", "adapter": live(), **change})
    assert library.list() == ["there"] and library.verify() == []


def test_another_backbone_is_refused(library):
    library.put("a", live())
    with pytest.raises(mk.CheckpointError, match="'a' belongs to another backbone: the model's weights"):
        library.get("a", OTHER)
    with pytest.raises(TypeError, match="backbone is a Linear, expected a Backbone"):
        library.get("a", torch.nn.Linear(2, 2))


def test_unknown_method(library, monkeypatch):
    library.put("a", MAKERS["plain"]())
    monkeypatch.delitem(ADAPTERS, "plain")
    assert library.entry("a").method == "plain" and names(library.search(method="plain")) == ["a"]
    with pytest.raises(mk.CheckpointError, match="method 'plain', expected one of"):
        library.get("a")
    with pytest.raises(TypeError, match="adapter is a PlainAdapter"):
        library.put("b", MAKERS["plain"]())


def test_a_model_loads_an_entry(tmp_path):
    from mmicl_kernels.testing.tiny_models import tiny_model

    model, library = tiny_model("llava-llama"), mk.VLibrary(tmp_path)
    adapter = mk.create(model, mk.MimICConfig())
    library.put("a", adapter)
    assert_same(mk.load(library.path("a"), model), adapter)
    with pytest.raises(mk.CheckpointError, match="another backbone"):
        mk.load(library.path("a"), tiny_model("llava-llama", seed=1))


def test_a_file_is_no_library(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        mk.VLibrary(tmp_path / "file")


# Combination


def shifts(adapter):
    """What the adapter adds, in fp64: scale * vector by name."""
    state = {name: x.double() for name, x in adapter.state_dict().items()}
    return {
        name: x * state.get(name.replace("vector", "scale"), torch.ones(()))
        for name, x in state.items()
        if name.endswith("vector")
    }


@pytest.mark.parametrize("method", ["live", "m2iv", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_combine_is_the_weighted_sum_rounded_once(library, method, dtype):
    stored = {name: MAKERS[method]().to(dtype) for name in ("a", "b", "c")}
    for name, adapter in stored.items():
        with torch.no_grad():
            for key, x in adapter.named_parameters():
                if key.endswith("scale"):
                    x.uniform_(-2, 2)
        library.put(name, adapter)
    weights = {"a": 1.0, "b": -0.5, "c": 3}
    combined = library.combine(weights, BACKBONE)
    assert type(combined) is type(stored["a"]) and combined.backbone == BACKBONE
    parts = {name: shifts(adapter) for name, adapter in stored.items()}
    for key, actual in combined.state_dict().items():
        assert actual.dtype == dtype
        if key.endswith("scale"):
            assert actual == 1 and actual.shape == ()
        else:
            expected = sum(weight * parts[name][key] for name, weight in weights.items())
            assert torch.equal(actual, expected.to(dtype))
    library.put("sum", combined)
    assert_same(library.get("sum"), combined)


def test_sum_of_products_not_product_of_sums(library):
    library.put("a", live(2.0))
    library.put("b", live(3.0))
    assert torch.equal(library.combine({"a": 1, "b": 1}).layers["0"].vector, torch.full((WIDTH,), 13.0))
    assert torch.equal(library.combine({"a": 1, "b": -1}).layers["0"].vector, torch.full((WIDTH,), -5.0))
    assert torch.equal(library.combine({"a": 0.25}).layers["0"].vector, torch.ones(WIDTH))


def test_combine_takes_the_widest_dtype(library):
    for name, dtype in (("half", torch.float16), ("single", torch.float32), ("double", torch.float64)):
        library.put(name, live(2.0).to(dtype))
    for weights, dtype in (
        ({"half": 1}, torch.float32),
        ({"half": 1, "single": 1}, torch.float32),
        ({"half": 1, "double": 1}, torch.float64),
    ):
        combined = library.combine(weights)
        assert {x.dtype for x in combined.parameters()} == {dtype}


def test_combine_does_not_underflow_in_fp16(library):
    """The product of vector and scale is below what fp16 can hold, though either is not."""
    adapter = live(2.0**-13).half()
    library.put("small", adapter)
    assert torch.equal(library.combine({"small": 1}).layers["0"].vector, torch.full((WIDTH,), 2.0**-26))


def test_weights_may_be_of_numpy(library):
    library.put("a", live(2.0))
    for weight in (np.float32(0.5), np.float64(0.5), np.int64(2)):
        vector = library.combine({"a": weight}).layers["0"].vector
        assert torch.equal(vector, torch.full((WIDTH,), 4.0 * float(weight)))


def test_configs_may_differ_in_training_only(library):
    library.put("a", live(1.0))
    library.put("b", live(1.0, LIVEConfig(ce_weight=2.0)))
    library.put("layer", live(1.0, LIVEConfig(site="layer")))
    assert library.combine({"a": 1, "b": 1}).config == LIVEConfig()
    with pytest.raises(mk.CheckpointError, match="'a' and 'layer' cannot be combined: they act at"):
        library.combine({"a": 1, "layer": 1})


def test_combine_refuses(library):
    library.put("a", live())
    library.put("mimic", MAKERS["mimic"]())
    library.put("m2iv", MAKERS["m2iv"]())
    library.put("large", live(1e30))
    library.put("other", live(backbone=OTHER))
    for weights, error, message in (
        ({}, ValueError, "empty"),
        ({"a": float("nan")}, ValueError, "weight of 'a' is nan"),
        ({"a": "1"}, ValueError, "weight of 'a' is '1'"),
        ({"a": True}, ValueError, "weight of 'a' is True"),
        ({"mimic": 1.0}, ValueError, "mimic cannot be combined: .*depends on the query"),
        ({"a": 1, "m2iv": 1}, mk.CheckpointError, "methods are live and m2iv"),
        ({"a": 1, "other": 1}, mk.CheckpointError, "different backbones: the model's weights"),
        ({"a": 10**400}, ValueError, "weight of 'a' is 1000"),
        ({"a": np.float32("nan")}, ValueError, "weight of 'a' is"),
        ({"large": 1}, mk.CheckpointError, "overflows torch.float32"),
        ({"a": 1, "nowhere": 1}, KeyError, "nowhere"),
    ):
        with pytest.raises(error, match=message):
            library.combine(weights)
    with pytest.raises(mk.CheckpointError, match="another backbone"):
        library.combine({"a": 1.0}, OTHER)


def test_combine_refuses_what_it_does_not_know(library, monkeypatch):
    class Strange(PlainAdapter):
        def __init__(self, config, backbone):
            super().__init__(config, backbone)
            self.gate = torch.nn.Parameter(torch.ones(2))

        @staticmethod
        def tensor_shapes(config, backbone):
            return {**PlainAdapter.tensor_shapes(config, backbone), "gate": (2,)}

    monkeypatch.setitem(ADAPTERS, "plain", Strange)
    library.put("a", Strange(PlainConfig(), BACKBONE))
    with pytest.raises(ValueError, match=r"plain cannot be combined: they have the parameters \['gate'\]"):
        library.combine({"a": 1})


# Single files and the hub


def test_export_import(library, tmp_path):
    adapter = MAKERS["m2iv"]()
    put = library.put("a", adapter, task="t", tags=["x"], record=[1], embedding=[1.0, 2.0])
    library.export("a", tmp_path / "a.safetensors")
    other = mk.VLibrary(tmp_path / "other")
    assert other.import_file(tmp_path / "a.safetensors") == put == other.entry("a")
    assert_same(other.get("a"), adapter)
    assert torch.equal(other.embedding("a"), torch.tensor([1.0, 2.0]))
    assert other.path("a").read_bytes() == library.path("a").read_bytes()
    with pytest.raises(FileExistsError, match="an entry 'a'"):
        other.import_file(tmp_path / "a.safetensors")
    renamed = other.import_file(tmp_path / "a.safetensors", name="b")
    assert renamed == dataclasses.replace(put, name="b") and other.list() == ["a", "b"]
    assert_same(other.get("b"), adapter)
    other.import_file(tmp_path / "a.safetensors", overwrite=True)
    with pytest.raises(ValueError, match="name is '../b'"):
        other.import_file(tmp_path / "a.safetensors", name="../b")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        other.import_file(tmp_path / "nowhere")
    with pytest.raises(KeyError):
        library.export("nowhere", tmp_path / "x")
    assert other.verify() == []


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_files_follow_the_umask(library, tmp_path, umask, mode):
    library.put("a", live())
    before = os.umask(umask)
    try:
        library.export("a", tmp_path / "a.safetensors")
        live().save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(before)
    files = [tmp_path / "a.safetensors", *(tmp_path / "adapter").iterdir()]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [mode] * 3


def test_export_keeps_out_of_the_library(library, tmp_path):
    library.put("a", live())
    (tmp_path / "link").symlink_to(library.folder / "entries")
    own = ["entries/x.safetensors", "entries/../tmp/x", "index/index.sqlite3", "lock", "entries"]
    for file in (tmp_path / "link" / "x", library.path("a"), *(library.folder / x for x in own)):
        with pytest.raises(ValueError, match="file is .*, expected one outside of the library's own folders"):
            library.export("a", file)
    assert library.verify() == []
    library.export("a", library.folder / "a.safetensors")  # beside them it harms nothing
    assert library.verify() == [] and library.list() == ["a"]


def test_exported_file_is_plain_safetensors(library, tmp_path):
    from safetensors import safe_open

    library.put("a", live(2.0), embedding=[1.0])
    library.export("a", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["entry"])["name"] == "a"
        assert "embedding" in file.keys()  # noqa: SIM118
        assert torch.equal(file.get_tensor("adapter.layers.0.vector"), torch.full((WIDTH,), 2.0))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A huggingface_hub whose repositories are folders."""
    import shutil

    class HfApi:
        def create_repo(self, repo_id, *, exist_ok):
            (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, path_in_repo, allow_patterns):
            assert allow_patterns == ["*.safetensors"]
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id / path_in_repo, dirs_exist_ok=True)

    def snapshot_download(repo_id, *, revision, allow_patterns):
        assert allow_patterns == ["entries/*.safetensors"]
        return str(tmp_path / "hub" / repo_id)

    fake = types.ModuleType("huggingface_hub")
    fake.HfApi, fake.snapshot_download = HfApi, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return tmp_path / "hub"


def test_push_and_pull(library, hub, tmp_path):
    for value, name in enumerate(("a", "b"), 1):
        library.put(name, live(float(value)), embedding=[1.0, float(value)])
    library.push("me/shifts")
    other = mk.VLibrary(tmp_path / "other")
    assert sorted(names(other.pull("me/shifts"))) == other.list() == ["a", "b"]
    assert_same(other.get("b"), live(2.0))
    other.remove("a")
    with pytest.raises(FileExistsError, match=r"names are taken: \['b'\]"):
        other.pull("me/shifts")
    assert other.list() == ["b"]
    assert sorted(names(other.pull("me/shifts", overwrite=True))) == ["a", "b"] and other.verify() == []
    file = next((hub / "me" / "shifts" / "entries").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(mk.CheckpointError):
        mk.VLibrary(tmp_path / "third").pull("me/shifts")


def test_hub_is_optional(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (library.push, library.pull):
        with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
            call("me/shifts")


def test_threads_share_one_object(library):
    errors = []

    def work(thread):
        try:
            for number in range(8):
                library.put(f"{thread}-{number}", live(), embedding=torch.randn(4))
                assert library.search(embedding=torch.randn(4)) and f"{thread}-{number}" in library.list()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(x,)) for x in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(library) == 32 and library.verify() == []
