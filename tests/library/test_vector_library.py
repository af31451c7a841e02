"""VLibrary: what is put is got, found and combined, and every argument is checked."""

import dataclasses
import json
import math
import sys
import threading
import types

import pytest
import torch
from vectors import BACKBONE, LAYERS, MAKERS, WIDTH, PlainAdapter, PlainConfig, assert_same, live

import mmicl_kernels as mk
from mmicl_kernels.library import index as index_module
from mmicl_kernels.library import read_adapter
from mmicl_kernels.library import vector_library as module
from mmicl_kernels.library.index import CROWD, ROWS_AT_ONCE, SPARE_OPERATIONS, Index, score_error, unit
from mmicl_kernels.methods import ADAPTERS, LIVEConfig

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


# Search


@pytest.fixture
def shelf(library):
    library.put("caption-de", live(), task="Caption", tags=["German", "v1"])
    library.put("caption-en", live(), task="Caption", tags=["english", "v1"])
    library.put("vqa", MAKERS["m2iv"](), task="vqa", tags=["english", "v2"])
    return library


@pytest.mark.parametrize(
    "conditions, expected",
    [
        ({}, ["caption-de", "caption-en", "vqa"]),
        ({"text": "CAPTION"}, ["caption-de", "caption-en"]),
        ({"text": "german"}, ["caption-de"]),
        ({"text": "v1 en"}, ["caption-en"]),  # 'v1' is a tag, 'en' part of the name
        ({"text": "nothing"}, []),
        ({"text": ""}, ["caption-de", "caption-en", "vqa"]),
        ({"tags": ["english"]}, ["caption-en", "vqa"]),
        ({"tags": ["english", "v1"]}, ["caption-en"]),
        ({"tags": ["eng"]}, []),
        ({"task": "vqa"}, ["vqa"]),
        ({"task": "caption"}, []),
        ({"method": "live", "tags": ["v1"], "text": "de"}, ["caption-de"]),
        ({"limit": 2}, ["caption-de", "caption-en"]),
    ],
)
def test_search_by_words(shelf, conditions, expected):
    found = shelf.search(**conditions)
    # Words are looked for in all of an entry's labels.
    if conditions.get("text") == "v1 en":
        expected = [x for x in shelf.list() if all(w in labels(shelf.entry(x)) for w in ("v1", "en"))]
    assert names(found) == expected
    assert all(entry.score is None for entry in found)
    assert found == [shelf.entry(name) for name in expected]


def labels(entry):
    return " ".join([entry.name, entry.task, *entry.tags]).casefold()


@pytest.fixture
def gallery(library):
    """60 entries, of which 20 have one of two equal embeddings, and 5 have none."""
    twins = torch.randn(2, 7)
    for number in range(60):
        embedding = None if number % 12 == 5 else twins[number % 2] if number % 3 == 0 else torch.randn(7)
        library.put(f"n{number * 37 % 60:02}", live(), tags=[f"t{number % 4}"], embedding=embedding)
    return library


def brute_force(library, query, limit, tags):
    """``(name, cosine)``; what differs by rounding of the stored fp32 alone is a tie."""
    query, scored = torch.as_tensor(query).double(), []
    for name in library.list():
        vector = library.embedding(name)
        if vector is not None and set(tags or ()) <= set(library.entry(name).tags):
            vector = vector.double()
            scored.append((round(-float(vector @ query / vector.norm() / query.norm()), 6), name))
    return [(name, -score) for score, name in sorted(scored)[:limit]]


@pytest.fixture(params=[CROWD, 2])
def crowd(request, monkeypatch):
    """Few vectors pass for a crowd."""
    monkeypatch.setattr(index_module, "CROWD", request.param)


@pytest.mark.parametrize("limit", [1, 5, 10, 40, 55, 56, 1000])
def test_search_by_embedding_is_brute_force(gallery, crowd, limit):
    for query in (torch.randn(7), gallery.embedding("n00"), -gallery.embedding("n00") * 1e30, [1] + [0] * 6):
        for tags in (None, ["t1"]):
            found = gallery.search(embedding=query, tags=tags, limit=limit)
            expected = brute_force(gallery, query, limit, tags)
            assert names(found) == [name for name, _ in expected]
            actual = torch.tensor([entry.score for entry in found])
            torch.testing.assert_close(actual, torch.tensor([x for _, x in expected]), atol=2e-6, rtol=0)
    assert gallery.search(embedding=gallery.embedding("n00"), limit=1)[0].score == pytest.approx(1, abs=1e-7)


def test_ties_are_in_order_of_names(library, crowd):
    for name in ("c", "a", "d", "b"):
        library.put(name, live(), embedding=[1.0, 2.0, 3.0])
    library.put("better", live(), embedding=[1.0, 2.0, 2.9])
    found = library.search(embedding=[1.0, 2.0, 2.9], limit=3)
    assert names(found) == ["better", "a", "b"] and found[1].score == found[2].score < found[0].score


def test_fp64_decides_what_fp32_cannot(library, crowd):
    """Two vectors whose cosines with the query differ by less than a rounding of fp32."""
    near = 2.0**-14
    library.put("a", live(), embedding=[1.0, 1.5 * near])
    library.put("b", live(), embedding=[1.0, near])
    assert names(library.search(embedding=[1.0, 0.0])) == ["b", "a"]


def test_fp32_does_not_drop_the_best(library, crowd):
    """Among cosines as close as roundings of fp32, the best of fp64 is found."""
    base = torch.randn(512)
    for number in range(40):
        library.put(f"n{number:02}", live(), embedding=base * (1 + 2e-7 * torch.randn(512)))
    for query in (base, base + 0.1 * torch.randn(512), torch.randn(512)):
        rows = torch.stack([library.embedding(name) for name in library.list()]).double()
        rows = (rows / rows.norm(dim=1, keepdim=True)).float().double()  # as the matrix has them
        cosines = (rows @ query.double()) / rows.norm(dim=1)
        for limit in (1, 3):
            expected = [f"n{i:02}" for i in cosines.topk(limit).indices.tolist()]
            assert names(library.search(embedding=query, limit=limit)) == expected


def test_fp16_does_not_drop_the_best(library, crowd):
    """Cosines that fp16 puts in another order."""
    base, rows = torch.randn(512), {}
    for number in range(40):
        name = f"n{number:02}"
        library.put(name, live(), embedding=base + 2e-4 * torch.randn(512))
        rows[name] = unit(library.embedding(name)).float()
    index, misled = Index(library.folder), 0
    index.vectors = torch.stack(list(rows.values()))
    for _ in range(20):
        query = torch.randn(512)
        cosines = {
            name: float(row.double() @ unit(query) / row.double().norm()) for name, row in rows.items()
        }
        best = max(cosines, key=cosines.get)
        (found,) = library.search(embedding=query, limit=1)
        assert found.name == best and found.score == pytest.approx(cosines[best], abs=1e-15)
        scores = index._scores(unit(query))
        misled += bool(scores[list(rows).index(best)] < scores.max())
    assert misled > 2


def halfway_in_bf16(*shape):
    """bf16 rounds all elements but the first down by nearly 2^-8; fp16 does not."""
    element = (1 + 2**-8.1) * 2.0 ** -math.ceil(math.log2(shape[-1]) / 2)
    vectors = torch.full(shape, element)
    vectors[..., 0] = max(0.0, 1 - (shape[-1] - 1) * element**2) ** 0.5
    return vectors


VECTORS = {
    "random": lambda *shape: torch.randn(shape),
    "equal": lambda *shape: torch.ones(shape),
    "subnormal": lambda *shape: torch.cat([torch.ones(*shape[:-1], 1), 3e-6 * torch.rand(shape)], -1),
    "of one sign": lambda *shape: torch.rand(shape) ** 8,
    "halfway in bf16": halfway_in_bf16,
}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("rows, dimension", [(1, 1), (3, 2), (9, 63), (300, 513), (1, 4096), (2, 2**16 - 1)])
def test_fp16_stays_within_its_bound(tmp_path, kind, rows, dimension):
    """Summed in fp16, ones in 65535 dimensions would give a cosine of 0.1."""
    index = Index(tmp_path)
    index.vectors = unit_rows(VECTORS[kind](rows, dimension)).float()
    for query in (unit(VECTORS[kind](dimension)), unit(index.vectors[-1])):
        errors = (index._scores(query).double() - index.vectors.double() @ query).abs()
        assert float(errors.max()) <= score_error(torch.float16, len(query))


def unit_rows(vectors):
    return torch.stack([unit(vector) for vector in vectors])


def test_search_in_the_callers_contexts(gallery):
    """Autocast would compare in bf16; a tensor made in inference mode could not be changed outside."""
    query = gallery.embedding("n00") + 0.1
    expected = [(entry.name, entry.score) for entry in gallery.search(embedding=query, limit=60)]
    reader = mk.VLibrary(gallery.folder)
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with context:
            found = [(x.name, x.score) for x in reader.search(embedding=query, limit=60)]
            scores = reader._index._scores(unit(query))
        assert found == expected and torch.equal(scores, reader._index._scores(unit(query)))
        gallery.put("late", live(), embedding=query, overwrite=True)
        assert names(reader.search(embedding=query, limit=1)) == ["late"]
        gallery.remove("late")


def test_search_while_vectors_are_added(library):
    """What was rounded to fp16 before is kept, and follows every new row, whether there is room or not."""
    reader = mk.VLibrary(library.folder)
    for number in range(24):
        library.put(f"n{number % 19:02}", live(), tags=["t"], embedding=torch.randn(7), overwrite=True)
        if number % 3 != 1:  # one or two new rows
            query = torch.randn(7)
            expected = [name for name, _ in brute_force(library, query, 3, None)]
            assert names(reader.search(embedding=query, limit=3)) == expected
    library.remove("n03")
    library.rebuild()  # into other slots
    expected = [name for name, _ in brute_force(library, query, 3, None)]
    assert names(reader.search(embedding=query, limit=3)) == expected


def test_many_equal_vectors(library, crowd, monkeypatch):
    monkeypatch.setattr(index_module, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(index_module, "NUMBERS_AT_ONCE", 4)
    assert ROWS_AT_ONCE > 4
    for number in range(11):
        library.put(f"n{number:02}", live(), embedding=[1.0, 1.0])
    assert names(library.search(embedding=[2.0, 2.0], limit=6)) == [f"n{i:02}" for i in range(6)]
    library.rebuild()
    assert library.verify() == [] and len(library.search(embedding=[2.0, 2.0], limit=20)) == 11


def test_an_entry_replaced_during_a_search(library, monkeypatch):
    """Score and entry are of the same moment, and entries removed meanwhile are made up for."""
    for name in ("a", "b", "c"):
        library.put(name, live(), embedding=[1.0, 0.0])
    other, read, calls = mk.VLibrary(library.folder), module.read_entry, []

    def read_entry(path):
        calls.append(path)
        if len(calls) == 1:
            other.put("a", live(), embedding=[1.0, 1.0], overwrite=True)
        if len(calls) == 2:
            other.remove("b")
        return read(path)

    monkeypatch.setattr(module, "read_entry", read_entry)
    found = library.search(embedding=[0.0, 1.0], limit=2)
    assert names(found) == ["a", "c"] and found[0].score == pytest.approx(0.5**0.5)


def test_bad_queries(gallery):
    for embedding, message in (
        ([1.0] * 6, "dimension 6, the library has 7"),
        ([0.0] * 7, "all zeros"),
        ([float("inf")] * 7, "not finite"),
        (torch.ones(7, 1), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.search(embedding=embedding)
    for limit in (0, -1, 2.0, None, True):
        with pytest.raises(ValueError, match="limit is"):
            gallery.search(limit=limit)
    with pytest.raises(TypeError, match="tags is 'v1'"):
        gallery.search(tags="v1")


def test_empty_library_finds_nothing(library):
    assert library.search("a", ["b"], [1.0, 2.0]) == []
    library.put("a", live())
    assert library.search(embedding=[1.0, 2.0]) == []


def test_dimension_of_a_library_whose_embeddings_are_gone(library):
    library.put("a", live(), embedding=[1.0, 2.0])
    library.put("b", live())
    library.remove("a")
    library.put("c", live(), embedding=[1.0, 2.0, 3.0])
    assert names(library.search(embedding=[1.0, 0.0, 0.0])) == ["c"] and library.verify() == []


def test_log_is_written_anew_when_most_of_it_is_past(library):
    log = library.folder / "index" / "log.jsonl"
    library.put("keep", live(3.0), tags=["k"], embedding=[1.0, 0.0])
    reader = mk.VLibrary(library.folder)
    assert reader.list() == ["keep"]
    sizes = []
    for number in range(SPARE_OPERATIONS + 20):
        library.put("a", live(), embedding=[0.5, float(number)], overwrite=True)
        sizes.append(log.stat().st_size)
    assert sizes[-1] < max(sizes) / 4
    assert len(list((library.folder / "index").iterdir())) == 2
    assert reader.list() == ["a", "keep"] and names(reader.search(embedding=[1.0, 0.0])) == ["keep", "a"]
    assert library.verify() == []


def test_other_objects_see_every_change(library):
    reader = mk.VLibrary(library.folder)
    for number in range(5):
        library.put(f"n{number}", live(), embedding=[1.0, float(number)])
        assert len(reader) == number + 1
        assert names(reader.search(embedding=[0.0, 1.0], limit=1)) == [f"n{number}"]
    library.remove("n4")
    library.rebuild()
    assert names(reader.search(embedding=[0.0, 1.0], limit=1)) == ["n3"]


def test_reader_reads_only_what_is_new(library, monkeypatch):
    index = sys.modules["mmicl_kernels.library.index"]
    for number in range(20):
        library.put(f"n{number}", live())
    reader, parsed, lines = mk.VLibrary(library.folder), index._parsed, []
    monkeypatch.setattr(index, "_parsed", lambda line: lines.append(line) or parsed(line))
    assert len(reader) == 20 and len(lines) > 20
    lines.clear()
    reader.search("n1")
    assert len(lines) == 1  # the first, which says whether the rest is still the same
    library.put("new", live())
    lines.clear()
    assert len(reader) == 21 and len(lines) == 3


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
    library.put("half", live(2.0).half())
    library.put("brain", live(3.0).bfloat16())
    assert library.combine({"half": 1, "brain": 1}).layers["0"].vector.dtype == torch.float32
    assert library.combine({"half": 1, "half ".strip(): 1}).layers["0"].vector.dtype == torch.float16


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
    library.put("large", live(1e4).half())
    library.put("other", live(backbone=OTHER))
    for weights, error, message in (
        ({}, ValueError, "empty"),
        ({"a": float("nan")}, ValueError, "weight of 'a' is nan"),
        ({"a": "1"}, ValueError, "weight of 'a' is '1'"),
        ({"a": True}, ValueError, "weight of 'a' is True"),
        ({"mimic": 1.0}, ValueError, "mimic cannot be combined: .*depends on the query"),
        ({"a": 1, "m2iv": 1}, mk.CheckpointError, "methods are live and m2iv"),
        ({"a": 1, "other": 1}, mk.CheckpointError, "different backbones: the model's weights"),
        ({"large": 1}, mk.CheckpointError, "overflows torch.float16"),
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


def test_platform_without_locks(library, monkeypatch):
    library.put("a", live(1.0))
    monkeypatch.setattr(module, "fcntl", None)
    assert library.list() == ["a"]
    assert_same(library.get("a"), live(1.0))
    with pytest.raises(OSError, match="needs flock"):
        library.put("b", live())


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
