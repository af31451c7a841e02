"""What is saved can be loaded: the values of tied and viewed parameters, and nothing that load refuses."""

import os

import pytest
import torch
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.methods import (
    AIMAdapter,
    AIMConfig,
    HiFICLAdapter,
    LIVEAdapter,
    M2IVAdapter,
    MimICAdapter,
    PromptTuningAdapter,
    STAVEAdapter,
)
from mmicl_kernels.methods.base import Backbone
from mmicl_kernels.methods.official import read_official
from mmicl_kernels.store import read_adapter
from tests.store.vectors import BACKBONE, assert_same

# As a file of the official code is read.
OFFICIAL = mk.MimICConfig("all_keys", alignment="mean_square", ffn_shift=True)
MAKERS = {
    "mimic": lambda: MimICAdapter(OFFICIAL, BACKBONE),
    "m2iv": lambda: M2IVAdapter(mk.M2IVConfig(), BACKBONE),
    "live": lambda: LIVEAdapter(mk.LIVEConfig(), BACKBONE),
    "aim": lambda: AIMAdapter(AIMConfig(layer_norm=True), BACKBONE),
    "prompt_tuning": lambda: PromptTuningAdapter(mk.PromptTuningConfig(), BACKBONE),
    "hificl": lambda: HiFICLAdapter(mk.HiFICLConfig(), BACKBONE),
    "stave": lambda: STAVEAdapter(mk.STAVEConfig(), BACKBONE),
}


def parameters(adapter):
    """``(module, name, parameter)``, of every name."""
    for path, parameter in list(adapter.named_parameters(remove_duplicate=False)):
        parent, _, name = path.rpartition(".")
        yield adapter.get_submodule(parent), name, parameter


def placed(adapter, view):
    """``adapter`` with every parameter a ``view`` of one storage: the same numbers, laid out otherwise."""
    for module, name, parameter in parameters(adapter):
        setattr(module, name, nn.Parameter(view(parameter.detach())))
    return adapter


SHARED = torch.arange(1000, dtype=torch.float32)


def tied(adapter):
    """One parameter for all that have its shape."""
    first = {}
    for module, name, parameter in parameters(adapter):
        setattr(module, name, first.setdefault(parameter.shape, parameter))
    return adapter


VIEWS = {
    "tied": tied,
    "slices of one storage": lambda a: placed(a, lambda x: SHARED[7 : 7 + x.numel()].view(x.shape)),
    "every third": lambda a: placed(a, lambda x: SHARED[: 3 * x.numel() : 3].view(x.shape)),
    "expanded": lambda a: placed(a, lambda x: torch.tensor(2.5).expand(x.shape)),
    "transposed": lambda a: placed(a, lambda x: x.clone().T.contiguous().T if x.dim() == 2 else x.clone()),
    "a column": lambda a: placed(a, lambda x: torch.stack([x, x + 1], -1)[..., 1]),
    "negated lazily": lambda a: placed(a, lambda x: torch.complex(x, x).conj().imag),
    "one dtype each": lambda a: placed(
        a, lambda x: x.to([torch.float16, torch.bfloat16, torch.float32, torch.float64][x.dim() * 2 % 4])
    ),
}


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("view", VIEWS)
def test_shared_memory_is_stored_apart(tmp_path, method, view):
    adapter = VIEWS[view](MAKERS[method]())
    adapter.save_pretrained(tmp_path / "saved")
    library = mk.VLibrary(tmp_path / "library")
    library.put("a", adapter)
    loaded = [read_adapter(tmp_path / "saved"), library.get("a"), read_adapter(library.path("a"))]
    if method == "mimic":
        mk.save_official(adapter, tmp_path / "encoder.pth")
        loaded.append(read_official(tmp_path / "encoder.pth", BACKBONE))
    for other in loaded:
        assert_same(other, adapter)
        with torch.no_grad():  # each has memory of its own
            first, *others = other.parameters()
            before = [x.clone() for x in others]
            first.add_(1)
        assert all(torch.equal(x, y) for x, y in zip(others, before, strict=True))
    size = sum(x.numel() * x.element_size() for x in adapter.state_dict().values())
    assert (tmp_path / "saved" / "mmicl_adapter.safetensors").stat().st_size < size + 4096


def freed(x):
    """A parameter that FSDP has given back: its shape is there, its memory is not."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


class Sharded(torch.Tensor):
    """A tensor whose numbers are elsewhere, as a DTensor's are."""


BAD = {
    "NaN": lambda x: x.clone().fill_(torch.nan),
    "one infinity": lambda x: torch.cat([x.flatten()[:-1], -torch.tensor([torch.inf])]).view(x.shape),
    "ZeRO-3's placeholder": lambda x: torch.empty(0),
    "an empty one of as many dimensions": lambda x: torch.empty(0, *x.shape[1:]),
    "freed": freed,
    "another shape": lambda x: torch.zeros(*x.shape, 2),
    "a row too few": lambda x: x[:-1].clone(),
    "flattened": lambda x: x.flatten()[None],
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "int64": lambda x: x.long(),
    "int8": lambda x: x.to(torch.int8),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "fp8": lambda x: x.to(torch.float8_e4m3fn),
    "a subclass": lambda x: x.clone().as_subclass(Sharded),
}


def spoiled(adapter, bad):
    """``adapter`` with its last parameter of one dimension at least made ``bad``."""
    module, name, parameter = [x for x in parameters(adapter) if x[2].dim() > 0][-1]
    delattr(module, name)
    setattr(module, name, nn.Parameter(BAD[bad](parameter.detach()), requires_grad=False))
    return adapter


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("bad", BAD)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, method, bad):
    """Refused before anything is written, so what was good stays."""
    good, adapter = MAKERS[method](), spoiled(MAKERS[method](), bad)
    good.save_pretrained(tmp_path / "saved")
    library = mk.VLibrary(tmp_path / "library")
    library.put("a", good)
    before = contents(tmp_path)
    works = [
        lambda: adapter.save_pretrained(tmp_path / "saved"),
        lambda: adapter.save_pretrained(tmp_path / "new" / "folder"),
        lambda: library.put("a", adapter, overwrite=True),
        lambda: mk.VLibrary(tmp_path / "other").put("a", adapter),
    ]
    if method == "mimic":
        mk.save_official(good, tmp_path / "encoder.pth")
        before = contents(tmp_path)
        works += [
            lambda path=path: mk.save_official(adapter, tmp_path / path) for path in ("encoder.pth", "x.pth")
        ]
    for work in works:
        with pytest.raises(mk.CheckpointError, match="adapter: .*(expected|finite floating)"):
            work()
        assert contents(tmp_path) == before
    assert_same(read_adapter(tmp_path / "saved"), good)
    assert_same(library.get("a"), good)


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("method", MAKERS)
def test_descriptions_that_could_not_be_loaded_are_not_saved(tmp_path, method):
    good = MAKERS[method]()
    good.save_pretrained(tmp_path / "saved")
    library = mk.VLibrary(tmp_path / "library")
    library.put("a", good)
    before = contents(tmp_path)
    fields = BACKBONE.__dict__
    for change in (
        {"fingerprint": (float("nan"),)},
        {"fingerprint": (float("inf"),)},
        {"name": None},
        {"revision": 3},
        {"hidden_size": 8.0},
        {"layers": {i: (2.0, 4) for i in range(3)}},
    ):
        adapter = MAKERS[method]()
        adapter.backbone = Backbone(**{**fields, **change})
        for work in (
            lambda a=adapter: a.save_pretrained(tmp_path / "saved"),
            lambda a=adapter: library.put("a", a, overwrite=True),
        ):
            with pytest.raises((ValueError, TypeError)):
                work()
            assert contents(tmp_path) == before
    adapter = MAKERS[method]()
    wrong = {
        "aim": ("positions", "nowhere"),
        "prompt_tuning": ("std", -1.0),
        "hificl": ("normalizer", "none"),
        "stave": ("readout", 0),
    }
    name, value = wrong.get(method, ("ce_weight", -1.0))
    object.__setattr__(adapter.config, name, value)
    for work in (
        lambda: adapter.save_pretrained(tmp_path / "saved"),
        lambda: library.put("a", adapter, overwrite=True),
    ):
        with pytest.raises(ValueError, match=name):
            work()
        assert contents(tmp_path) == before


def test_parameters_beside_the_methods_own(tmp_path):
    adapter = MAKERS["live"]()
    adapter.layers["0"].register_parameter("extra", nn.Parameter(torch.zeros(2)))
    with pytest.raises(mk.CheckpointError, match="unknown .*extra"):
        adapter.save_pretrained(tmp_path / "saved")
    del adapter.layers["0"]
    with pytest.raises(mk.CheckpointError, match=r"lacks .*layers\.0"):
        adapter.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


BAD_TOKENS = [
    x for x in BAD if x not in ("ZeRO-3's placeholder", "an empty one of as many dimensions", "a row too few")
]


@pytest.mark.parametrize("bad", BAD_TOKENS)
def test_tokens_that_could_not_be_read_back(tmp_path, bad):
    bank = mk.DemonstrationBank.create(tmp_path / "bank", MAKERS["aim"]())
    sizes = {path: path.stat().st_size for path in bank.folder.iterdir()}
    demonstrations = [mk.Demonstration((), text, "") for text in "ab"]
    with pytest.raises((ValueError, TypeError), match=r"tokens\[1\]"):
        bank.add(demonstrations, [torch.ones(2, 8), BAD[bad](torch.ones(2, 8))])
    assert {path: path.stat().st_size for path in bank.folder.iterdir()} | {bank.folder / "lock": 0} == sizes
    assert bank.add(demonstrations, [torch.ones(2, 8)] * 2) == [0, 1]


def test_a_saved_adapter_is_on_the_disk(tmp_path, monkeypatch):
    """Both files are waited for before they take their places, and their folder after."""
    steps, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
        steps.append(".".join(name.split(".")[:2]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        os, "replace", lambda *x, **kw: (steps.append(f"to {os.path.basename(x[1])}"), replace(*x))
    )
    MAKERS["live"]().save_pretrained(tmp_path / "saved")
    json, tensors = "mmicl_adapter.json", "mmicl_adapter.safetensors"
    assert steps == [json, tensors, f"to {json}", f"to {tensors}", "saved"]


@pytest.mark.parametrize("which", ["json", "safetensors"])
def test_a_disk_that_is_full_at_the_last_moment(tmp_path, monkeypatch, which):
    """Either file's: neither takes its place."""
    good, fsync = MAKERS["live"](), os.fsync
    good.save_pretrained(tmp_path)
    before = contents(tmp_path)

    def full(handle):
        if f".{which}." in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        MAKERS["m2iv"]().save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    assert_same(read_adapter(tmp_path), good)


BAD_EMBEDDINGS = ("NaN", "one infinity", "freed", "meta", "sparse", "complex", "a subclass", "another shape")


@pytest.mark.parametrize("bad", BAD_EMBEDDINGS)
def test_embeddings_that_could_not_be_read_back(tmp_path, bad):
    library = mk.VLibrary(tmp_path / "library")
    with pytest.raises((ValueError, TypeError), match="embedding"):
        library.put("a", MAKERS["live"](), embedding=BAD[bad](torch.ones(4)))
    assert not library.folder.exists()


@pytest.mark.parametrize("which", ["json", "safetensors"])
@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_cannot_take_its_place(tmp_path, monkeypatch, which, links):
    """Either one's rename fails: both are what they were, under their own names alone."""
    good = MAKERS["live"]()
    good.save_pretrained(tmp_path)
    before, rename, failed = contents(tmp_path), os.replace, []

    def refused(source, target, **options):
        if os.fspath(target).endswith(which) and not failed:
            failed.append(target)
            raise PermissionError(1, "Operation not permitted", os.fspath(target))
        rename(source, target, **options)

    def no_links(*args, **options):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", refused)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(PermissionError, match="not permitted"):
        MAKERS["m2iv"]().save_pretrained(tmp_path)
    assert failed and contents(tmp_path) == before
    assert_same(read_adapter(tmp_path), good)
    MAKERS["m2iv"]().save_pretrained(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["mmicl_adapter.json", "mmicl_adapter.safetensors"]


def test_the_first_save_into_a_folder_leaves_nothing_where_it_fails(tmp_path, monkeypatch):
    rename = os.replace

    def refused(source, target, **options):
        if os.fspath(target).endswith("safetensors"):
            raise PermissionError(1, "Operation not permitted", os.fspath(target))
        rename(source, target, **options)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):
        MAKERS["live"]().save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
