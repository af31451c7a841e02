"""VLibrary's search and its index: what is found, in which order, and by whom."""

import math

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.store import vector_library as module
from mmicl_kernels.store import vectors as vectors_module
from mmicl_kernels.store.vectors import ROWS_AT_ONCE, Vectors, scaled, score_error, unit
from tests.store.vectors import MAKERS, assert_same, live

ROUNDING = 8 * torch.finfo(torch.float64).eps  # of a cosine in fp64, summed in whatever order


@pytest.fixture
def library(tmp_path):
    return mk.VLibrary(tmp_path / "library")


def names(entries):
    return [entry.name for entry in entries]


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


def test_normal_forms_of_labels(library):
    """What is typed in one normal form is found in the other, whichever was stored."""
    nfd, nfc = "cafe\u0301", "caf\u00e9"
    library.put("a", live(), task=nfd, tags=[nfd, nfc])
    assert (library.entry("a").task, library.entry("a").tags) == (nfc, (nfc,))
    for label in (nfd, nfc, nfd.upper()):
        assert names(library.search(label)) == ["a"]
    for label in (nfd, nfc):
        assert names(library.search(tags=[label], task=label)) == ["a"]


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


@pytest.mark.parametrize("limit", [1, 5, 10, 40, 55, 56, 1000])
def test_search_by_embedding_is_brute_force(gallery, limit):
    for query in (torch.randn(7), gallery.embedding("n00"), -gallery.embedding("n00") * 1e30, [1] + [0] * 6):
        for tags in (None, ["t1"]):
            found = gallery.search(embedding=query, tags=tags, limit=limit)
            expected = brute_force(gallery, query, limit, tags)
            assert names(found) == [name for name, _ in expected]
            actual = torch.tensor([entry.score for entry in found])
            torch.testing.assert_close(actual, torch.tensor([x for _, x in expected]), atol=2e-6, rtol=0)
    assert gallery.search(embedding=gallery.embedding("n00"), limit=1)[0].score == pytest.approx(1, abs=1e-7)


def test_ties_are_in_order_of_names(library):
    for name in ("c", "a", "d", "b"):
        library.put(name, live(), embedding=[1.0, 2.0, 3.0])
    library.put("better", live(), embedding=[1.0, 2.0, 2.9])
    found = library.search(embedding=[1.0, 2.0, 2.9], limit=3)
    assert names(found) == ["better", "a", "b"] and found[1].score == found[2].score < found[0].score


def test_fp64_decides_what_fp32_cannot(library):
    """Two vectors whose cosines with the query differ by less than a rounding of fp32."""
    near = 2.0**-14
    library.put("a", live(), embedding=[1.0, 1.5 * near])
    library.put("b", live(), embedding=[1.0, near])
    assert names(library.search(embedding=[1.0, 0.0])) == ["b", "a"]


def test_cosines_are_those_of_the_stored_embeddings(library):
    """Unit vectors rounded to fp32 have others, and another order."""
    generator, query = torch.Generator().manual_seed(0), torch.tensor([0.3, -0.7, 0.2])
    base = torch.tensor([0.4, -0.3, 0.7])
    for number in range(60):
        noise = 1e-8 * torch.randn(3, generator=generator)
        library.put(f"n{number:02}", live(), embedding=(base * (1 + 0.01 * number) + noise) * 3.7**number)
    stored = {name: library.embedding(name) for name in library.list()}
    cosines = {name: float(unit(x) @ unit(query)) for name, x in stored.items()}
    rounded = {name: float(unit(x).float().double() @ unit(query)) for name, x in stored.items()}
    assert sorted(rounded, key=rounded.get) != sorted(cosines, key=cosines.get)
    found = library.search(embedding=query, limit=60)
    for better, worse in zip(found, found[1:], strict=False):
        assert cosines[better.name] >= cosines[worse.name] - ROUNDING
    for entry in found:
        assert entry.score == pytest.approx(cosines[entry.name], abs=ROUNDING)


def test_scaled_keeps_every_bit():
    for size in (1e-44, 1e-30, 1.0, 3e38):
        x = size * torch.tensor([0.3, -0.7, 0.0, 1.0])
        y = scaled(x)
        assert y.dtype == torch.float32 and 0.5 <= float(y.double().norm()) < 1
        ratio = float(y[3].double() / x[3].double())
        assert math.frexp(ratio)[0] == 0.5 and torch.equal(y.double(), x.double() * ratio)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_search_under_the_callers_defaults(library, device):
    """A default device or dtype is for the caller's tensors."""
    library.put("a", live(), embedding=[1.0, 0.1])
    library.put("b", live(), embedding=[0.0, 1.0])
    adapter = live()
    torch.set_default_device(device)
    torch.set_default_dtype(torch.float16)
    try:
        library.put("c", adapter, embedding=[1.0, 1.0 + 2.0**-20])
        for reader in (library, mk.VLibrary(library.folder)):
            found = reader.search(embedding=[1.0, 0.1], limit=2)
        assert names(reader.search("a")) == ["a"]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert names(found) == ["a", "c"] and found[0].score == pytest.approx(1, abs=1e-15)
    assert library.embedding("c").tolist() == [1.0, 1.0 + 2.0**-20]


def test_fp32_does_not_drop_the_best(library):
    """Among cosines as close as roundings of fp32, the best of fp64 is found."""
    base = torch.randn(512)
    for number in range(40):
        library.put(f"n{number:02}", live(), embedding=base * (1 + 2e-7 * torch.randn(512)))
    for query in (base, base + 0.1 * torch.randn(512), torch.randn(512)):
        rows = torch.stack([library.embedding(name) for name in library.list()]).double()
        cosines = (rows @ query.double()) / (rows.norm(dim=1) * query.double().norm())
        for limit in (1, 3):
            found = [int(entry.name[1:]) for entry in library.search(embedding=query, limit=limit)]
            behind = cosines.topk(limit).values - cosines[found]
            assert len(set(found)) == limit and float(behind.abs().max()) <= ROUNDING


VECTORS = {
    "random": lambda *shape: torch.randn(shape),
    "equal": lambda *shape: torch.ones(shape),
    "subnormal": lambda *shape: torch.cat([torch.ones(*shape[:-1], 1), 1e-40 * torch.rand(shape)], -1),
    "of one sign": lambda *shape: torch.rand(shape) ** 8,
}


def in_memory(vectors):
    """``Vectors`` that have read ``vectors``."""
    found = Vectors()
    found.clear(room=len(vectors), dimension=vectors.shape[1])
    found._vectors[:], found._norms[:] = vectors, vectors.double().norm(dim=-1)
    found._count = len(vectors)
    return found


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("rows, dimension", [(1, 1), (3, 2), (9, 63), (300, 513), (1, 4096), (2, 2**16 - 1)])
def test_fp32_stays_within_its_bound(kind, rows, dimension):
    vectors = torch.stack([scaled(x) for x in VECTORS[kind](rows, dimension)])
    for query in (unit(VECTORS[kind](dimension + (kind == "subnormal"))), unit(vectors[-1])):
        query = query[: vectors.shape[1]]
        query = query / query.norm()
        exact = unit_rows(vectors) @ query
        errors = (in_memory(vectors)._scores(query).double() - exact).abs()
        assert float(errors.max()) <= score_error(len(query))


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
            scores = reader._index.vectors._scores(unit(query))
        assert found == expected and torch.equal(scores, reader._index.vectors._scores(unit(query)))
        gallery.put("late", live(), embedding=query, overwrite=True)
        assert names(reader.search(embedding=query, limit=1)) == ["late"]
        gallery.remove("late")


def test_search_while_vectors_are_added(library):
    """What was read before is kept, and follows every new row, whether there is room or not."""
    reader = mk.VLibrary(library.folder)
    for number in range(24):
        library.put(f"n{number % 19:02}", live(), tags=["t"], embedding=torch.randn(7), overwrite=True)
        if number % 3 != 1:  # one or two new rows
            query = torch.randn(7)
            expected = [name for name, _ in brute_force(library, query, 3, None)]
            assert names(reader.search(embedding=query, limit=3)) == expected
    library.remove("n03")
    library.rebuild()  # under other ids
    expected = [name for name, _ in brute_force(library, query, 3, None)]
    assert names(reader.search(embedding=query, limit=3)) == expected


def test_many_equal_vectors(library, monkeypatch):
    monkeypatch.setattr(vectors_module, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(vectors_module, "NUMBERS_AT_ONCE", 4)
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
    for condition in ({"text": 5}, {"task": 5}, {"method": 5}):
        with pytest.raises(TypeError, match="is 5, expected a string"):
            gallery.search(**condition)


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


def test_the_only_embedding_may_change_its_dimension(library):
    library.put("a", live(1.0), embedding=[1.0, 2.0])
    library.put("b", live())
    reader = mk.VLibrary(library.folder)
    assert names(reader.search(embedding=[1.0, 0.0])) == ["a"]
    library.put("a", live(2.0), embedding=[1.0, 2.0, 3.0], overwrite=True)
    assert_same(library.get("a"), live(2.0))
    for one in (library, reader, mk.VLibrary(library.folder)):
        assert names(one.search(embedding=[1.0, 0.0, 0.0])) == ["a"] and one.list() == ["a", "b"]
    library.put("b", live(), embedding=[3.0, 2.0, 1.0], overwrite=True)
    with pytest.raises(ValueError, match="dimension 2, the library has 3"):
        library.put("a", live(), embedding=[1.0, 2.0], overwrite=True)
    assert names(reader.search(embedding=[1.0, 0.0, 0.0])) == ["b", "a"] and library.verify() == []


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
    for number in range(20):
        library.put(f"n{number}", live(), embedding=[1.0, float(number)])
    reader, read = mk.VLibrary(library.folder), []
    frombuffer = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda x, **kw: read.append(len(x)) or frombuffer(x, **kw))
    for number, expected in ((20, 20 * 8), (21, 8), (22, 8)):
        reader.search(embedding=[1.0, 1.0])
        assert read == [expected], number
        library.put(f"n{number}", live(), embedding=[1.0, float(number)])
        read.clear()
    library.put("n3", live(), embedding=[0.0, 1.0], overwrite=True)
    library.remove("n4")
    read.clear()
    assert names(reader.search(embedding=[0.0, 1.0], limit=1)) == ["n3"] and read == [16]
    assert len(reader.search(embedding=[0.0, 1.0], limit=99)) == 22 and read == [16]
