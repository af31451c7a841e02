"""DemonstrationBank: what is stored comes back, what is the same is found, and ops take it as it lies."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels import ops
from mmicl_kernels.methods.sites import FusedTokens
from tests.store.banks import DTYPES, adapter, add, assert_holds, demonstration, filled, tokens
from tests.store.vectors import BACKBONE, WIDTH, bits, live

LENGTHS = (3, 0, 1, 7, 63)


@pytest.fixture
def bank(tmp_path):
    return mk.DemonstrationBank.create(tmp_path / "bank", adapter(), torch.float32)


def expected_rows(x, dtype):
    """Rows and scales that a bank of ``dtype`` has of ``x``."""
    if dtype != torch.int8:
        return x.to(dtype), None
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale[scale == 0] = 1
    return (x / scale).round().to(torch.int8), scale.view(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(tmp_path, dtype):
    values = [torch.randn(n, WIDTH) * 10.0 ** torch.randint(-3, 4, (n, 1)) for n in LENGTHS]
    values[3][2] = 0
    made = mk.DemonstrationBank.create(tmp_path / "bank", adapter(), dtype)
    assert made.add([demonstration(i) for i in range(5)], values) == [0, 1, 2, 3, 4]
    for bank in (made, mk.DemonstrationBank(tmp_path / "bank")):
        assert (len(bank), bank.dtype, bank.hidden_size, bank.backbone) == (5, dtype, WIDTH, BACKBONE)
        assert bank.digest == adapter().digest()
        assert bank.lengths.tolist() == list(LENGTHS) and bank.lengths.dtype == torch.int64
        rows, scales = zip(*(expected_rows(x, dtype) for x in values), strict=True)
        fused = bank.fused
        assert isinstance(fused, FusedTokens)
        assert fused.offsets.tolist() == [0, 3, 3, 4, 11, 74] and fused.offsets.dtype == torch.int64
        assert fused.rows.dtype == dtype and torch.equal(bits(fused.rows), bits(torch.cat(rows)))
        if dtype == torch.int8:
            assert fused.scale.dtype == torch.float32 and torch.equal(fused.scale, torch.cat(scales))
        else:
            assert fused.scale is None
        for i, x in enumerate(values):
            found, stored = bank.tokens(i), rows[i] if dtype != torch.int8 else rows[i] * scales[i][:, None]
            assert found.dtype == stored.dtype and torch.equal(bits(found), bits(stored))
            assert torch.equal(bank.mean(i), x.double().mean(0).float() if len(x) else torch.zeros(WIDTH))
        assert bank.verify() == []


def test_int8_is_within_half_a_step(tmp_path):
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter(), torch.int8)
    x = torch.randn(100, WIDTH)
    x[7], x[8] = 1e-45, torch.finfo(torch.float32).max / 2
    bank.add([demonstration(0)], [x])
    step = x.double().abs().amax(-1, keepdim=True) / 127
    step[7] = 1  # so small that the scale would be zero
    error = (bank.tokens(0).double() - x.double()).abs()
    assert bool((error <= step * (0.5 + 127 * 2.0**-22)).all())  # and the roundings of quotient and product
    assert bool((bank.tokens(0)[7] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tokens_of_other_dtypes_layouts_and_modes(tmp_path, bank, dtype):
    x = torch.randn(WIDTH, 3, dtype=dtype).t().requires_grad_()
    with torch.inference_mode():
        assert bank.add([demonstration(0)], [x]) == [0]
    assert torch.equal(bank.tokens(0), x.detach().float()) and not bank.tokens(0).requires_grad
    other, working_set = tokens(1), bank.working_set("cpu", 1000)
    with torch.device("meta"):  # as a caller's default
        assert bank.add([demonstration(1)], [other]) == [1]
        reader = mk.DemonstrationBank(bank.folder)
        assert torch.equal(reader.tokens(1), other) and torch.equal(bank.tokens(1), other)
        assert [id for _, id in reader.nearest(other, 1)] == [1]
        assert working_set.load([1])[0].offsets.tolist() == [0, 1] and working_set.load([0])[1] == [1]


def test_made_in_inference_mode_used_outside(tmp_path, bank):
    with torch.inference_mode():
        add(bank, 1, 2)
        fused = mk.DemonstrationBank(bank.folder).fused
    prompt = torch.randn(1, 2, WIDTH, requires_grad=True)
    ids, cu_demos = torch.tensor([1, 0]), torch.tensor([0, 2])
    out = ops.prefix_splice(fused.rows, fused.offsets, ids, cu_demos, prompt, length=5)
    out.embeddings.sum().backward()
    assert torch.equal(prompt.grad, torch.ones(1, 2, WIDTH))


def test_writing_into_the_rows_does_not_reach_the_file(bank):
    add(bank, 3)
    bank.fused.rows.fill_(7.0)
    assert_holds(mk.DemonstrationBank(bank.folder), 0, 3)
    assert mk.DemonstrationBank(bank.folder).verify() == []


EXAMPLE = mk.Demonstration((b"ab", b"c"), "text", "answer")
OTHERS = {
    "image": mk.Demonstration((b"ab", b"d"), "text", "answer"),
    "images joined": mk.Demonstration((b"abc",), "text", "answer"),
    "images divided otherwise": mk.Demonstration((b"a", b"bc"), "text", "answer"),
    "images in another order": mk.Demonstration((b"c", b"ab"), "text", "answer"),
    "no image": mk.Demonstration((), "text", "answer"),
    "an empty image more": mk.Demonstration((b"ab", b"c", b""), "text", "answer"),
    "text as an image": mk.Demonstration((b"ab", b"c", b"text"), "", "answer"),
    "text": mk.Demonstration((b"ab", b"c"), "text ", "answer"),
    "answer": mk.Demonstration((b"ab", b"c"), "text", "Answer"),
    "text and answer divided otherwise": mk.Demonstration((b"ab", b"c"), "texta", "nswer"),
    "all text": mk.Demonstration((b"ab", b"c"), "textanswer", ""),
}


def test_content(bank):
    """Whatever differs makes another demonstration; whatever does not, the same."""
    assert bank.find(EXAMPLE) is None
    assert bank.add([EXAMPLE], [tokens(1)]) == [0]
    for number, other in enumerate(OTHERS.values(), 1):
        assert bank.find(other) is None
        assert bank.add([other], [tokens(2)]) == [number]
    for found in (bank, mk.DemonstrationBank(bank.folder)):
        assert found.find(mk.Demonstration((b"ab", b"c"), "text", "answer")) == 0
        assert [found.find(other) for other in OTHERS.values()] == list(range(1, len(OTHERS) + 1))
        assert found.text(0) == ("text", "answer") and found.text(len(OTHERS)).text == "textanswer"


def test_content_depends_on_the_adapter(tmp_path, bank):
    add(bank, 1)
    other = mk.DemonstrationBank.create(tmp_path / "other", adapter(0.25), torch.float32)
    add(other, 1)
    digests = [(x.folder / "index.bin").read_bytes()[32:64] for x in (bank, other)]
    assert digests[0] != digests[1] and bank.digest != other.digest


def test_duplicates_keep_their_first_id(bank):
    values = [tokens(3), tokens(4), tokens(8)]
    assert bank.add([demonstration(n) for n in (3, 4, 3)], values) == [0, 1, 0]
    assert bank.add([demonstration(n) for n in (4, 2, 3, 2)], [tokens(9)] * 4) == [1, 2, 0, 2]
    assert len(bank) == 3
    assert_holds(bank, 0, 3)
    assert_holds(bank, 1, 4)
    assert torch.equal(bank.tokens(2), tokens(9))
    sizes = [path.stat().st_size for path in sorted(bank.folder.iterdir())]
    assert add(bank, 3, 4) == [0, 1] and bank.add([], []) == []
    assert [path.stat().st_size for path in sorted(bank.folder.iterdir())] == sizes


def test_two_objects(bank):
    """Another object sees what was added when it asks, and its own additions come after."""
    other = mk.DemonstrationBank(bank.folder)
    before = other.fused
    add(bank, 3, 4)
    assert len(other) == 0 and other.find(demonstration(3)) is None and len(other.fused.rows) == 0
    other.refresh()
    assert_holds(other, 1, 4)
    add(bank, 1)
    assert add(other, 2, 1) == [3, 2]
    bank.refresh()
    for id, number in enumerate((3, 4, 1, 2)):
        assert_holds(bank, id, number)
        assert_holds(other, id, number)
    assert before.offsets.tolist() == [0] and bank.verify() == []


def test_texts(bank):
    odd = [
        mk.Demonstration((), text, answer)
        for text in ("", "ä\n\0\u202e", "猫" * 10_000)
        for answer in ("", "é")
    ]
    assert bank.add(odd, [tokens(n) for n in range(6)]) == [0, 1, 2, 3, 4, 5]
    reader = mk.DemonstrationBank(bank.folder)
    assert [reader.text(id) for id in range(6)] == [(x.text, x.answer) for x in odd]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_is_exact(tmp_path, dtype):
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter(), dtype)
    values = [torch.randn(n % 4, WIDTH) * 10.0 ** (n % 7 - 3) for n in range(60)]
    values[7], values[9] = torch.zeros(2, WIDTH), torch.tensor([[1.0], [-1.0]]).expand(2, WIDTH)
    values[30], values[45] = values[5] * 4, values[5].flip(0)
    add(bank, 101)
    bank.nearest(tokens(3), 1)  # so that norms are known of some
    bank.add([demonstration(n) for n in range(60)], values)
    means = torch.stack([bank.mean(id).double() for id in range(61)])
    query = torch.randn(3, WIDTH)
    cosines = torch.nn.functional.cosine_similarity(means, query.double().mean(0), dim=-1)
    there = [id for id in range(61) if bool(means[id].any())]
    assert len(there) == 61 - 15 - 2
    expected = sorted(there, key=lambda id: (-float(cosines[id]), id))
    for limit in (1, 10, 44, 100):
        found = bank.nearest(query, limit)
        assert [id for _, id in found] == expected[:limit]
        error = (WIDTH + 4) * torch.finfo(torch.float64).eps
        assert all(abs(cosine - float(cosines[id])) <= error for cosine, id in found)
    assert bank.nearest(query.double().mean(0), 61) == bank.nearest(query, 61)
    # One and the same vector, in other lengths: the first comes first.
    ties = [id for cosine, id in bank.nearest(bank.mean(6), 3)]
    assert ties == [6, 31, 46]


def test_nearest_of_nothing(bank):
    assert bank.nearest(torch.ones(WIDTH), 3) == []
    add(bank, 0, 5)
    assert bank.nearest(torch.ones(WIDTH), 3) == []


def requests(counts, total):
    """Ids of random requests and their bounds."""
    ids = torch.randint(total, (sum(counts),))
    return ids, torch.tensor([0, *counts]).cumsum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_splice_from_the_mapped_rows(tmp_path, dtype, layout):
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter(), dtype)
    bank.add([demonstration(n) for n in range(40)], [torch.randn(n % 6, WIDTH) for n in range(40)])
    fused = mk.DemonstrationBank(bank.folder).fused
    ids, cu_demos = requests((4, 0, 7), 40)
    prompt = torch.randn(3, 5, WIDTH)
    length = 40 if layout == "left" else 100

    def spliced(rows, offsets, scale):
        bank = (rows, offsets, ids, cu_demos)
        return ops.prefix_splice(*bank, prompt, length=length, layout=layout, max_length=40, bank_scale=scale)

    stored = [bank.tokens(id).float() for id in range(40)]
    offsets = torch.tensor([0, *map(len, stored)]).cumsum(0)
    actual, expected = spliced(*fused), spliced(torch.cat(stored), offsets, None)
    for name, x in zip(actual._fields[:4], actual[:4], strict=True):
        assert torch.equal(x, getattr(expected, name)), name
    assert int(actual.cu_seqlens[-1]) == 15 + sum(len(stored[id]) for id in ids)


def test_threads_share_one_bank(bank):
    """Four add what partly is the same while two look."""
    done = threading.Event()

    def look():
        while not done.is_set():
            fused, count = bank.fused, len(bank)
            assert len(fused.offsets) - 1 <= count and int(fused.offsets[-1]) == len(fused.rows)
            bank.nearest(torch.ones(WIDTH), 3)

    with ThreadPoolExecutor(6) as pool:
        looks = [pool.submit(look) for _ in range(2)]
        adds = [
            pool.submit(lambda k=k: [add(bank, n, n + 1)[0] for n in range(k, k + 20)])
            for k in (0, 5, 10, 15)
        ]
        ids = [x.result() for x in adds]
        done.set()
        assert [x.result() for x in looks] == [None, None]
    assert len(bank) == 36 and bank.verify() == []
    for k, found in zip((0, 5, 10, 15), ids, strict=True):
        for n, id in enumerate(found, k):
            assert_holds(bank, id, n)


BAD_ADDS = {
    "not a list of the same length": (lambda: ([demonstration(1)], []), "tokens has 0 items"),
    "not a demonstration": (lambda: (["text"], [tokens(1)]), "demonstrations has a str"),
    "not a tensor": (lambda: ([demonstration(1)], [[1.0]]), r"tokens\[0\] is list"),
    "integers": (lambda: ([demonstration(1)], [torch.zeros(1, WIDTH).int()]), r"tokens\[0\] is torch.int32"),
    "another width": (
        lambda: ([demonstration(1)], [torch.zeros(1, 3)]),
        r"has shape \[1, 3\], expected \[n, 8\]",
    ),
    "one dimension": (lambda: ([demonstration(1)], [torch.zeros(WIDTH)]), r"has shape \[8\]"),
}


@pytest.mark.parametrize("case", BAD_ADDS)
def test_bad_arguments_of_add(bank, case):
    make, message = BAD_ADDS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        bank.add(*make())
    assert len(bank) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bank, value):
    bad = tokens(4)
    bad[2, 3] = value
    with pytest.raises(ValueError, match=r"tokens\[1\] has NaN or infinities, first in row 2"):
        bank.add([demonstration(3), demonstration(4)], [tokens(3), bad])
    assert len(bank) == 0 and (bank.folder / "rows.bin").stat().st_size == 0


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 65520.0), (torch.bfloat16, 3.4e38), (torch.float32, 1e39), (torch.int8, 1e39)],
    ids=str,
)
def test_overflow_is_refused(tmp_path, dtype, value):
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter(), dtype)
    x = torch.full((1, WIDTH), value, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=rf"tokens\[1\] has numbers up to .*, too large for a bank of {dtype}"
    ):
        bank.add([demonstration(1), demonstration(2)], [tokens(1), x])
    assert len(bank) == 0


def test_demonstrations_are_checked():
    for images in ([b"a"], "a", (b"a", "b"), None):
        with pytest.raises(TypeError, match="images is a .*, expected a tuple of bytes"):
            mk.Demonstration(images, "", "")
    with pytest.raises(TypeError, match="answer is 3"):
        mk.Demonstration((), "", 3)
    with pytest.raises(ValueError, match="text is .*, expected Unicode"):
        mk.Demonstration((), "\ud800", "")
    assert "image" not in repr(demonstration(1))  # which may be megabytes


def test_bad_queries_and_ids(bank):
    add(bank, 1, 2)
    for query in (torch.zeros(WIDTH), torch.ones(3), torch.ones(0, WIDTH), torch.full((WIDTH,), torch.nan)):
        with pytest.raises(ValueError, match="query has"):
            bank.nearest(query, 1)
    with pytest.raises(TypeError, match="query is a list"):
        bank.nearest([1.0] * WIDTH, 1)
    with pytest.raises(ValueError, match="limit is 0"):
        bank.nearest(torch.ones(WIDTH), 0)
    for id in (-1, 2):
        for read in (bank.tokens, bank.text, bank.mean, lambda id: bank.prefetch([0, id])):
            with pytest.raises(IndexError, match=f"id is {id}, expected 0 to 1"):
                read(id)


def test_create(tmp_path):
    folder = tmp_path / "a" / "bank"
    with pytest.raises(FileNotFoundError, match="expected the folder of a demonstration bank"):
        mk.DemonstrationBank(folder)
    assert mk.DemonstrationBank.create(folder, adapter()).dtype == torch.bfloat16
    with pytest.raises(FileExistsError, match="bank.json is there already"):
        mk.DemonstrationBank.create(folder, adapter())
    add(mk.DemonstrationBank(folder), 1)
    (folder / "bank.json").unlink()
    with pytest.raises(FileExistsError, match="index.bin is there already"):
        mk.DemonstrationBank.create(folder, adapter())
    with pytest.raises(TypeError, match="adapter is a LIVEAdapter, expected one that fuses"):
        mk.DemonstrationBank.create(tmp_path / "b", live())
    for dtype in (torch.float64, torch.uint8, "bfloat16"):
        with pytest.raises(ValueError, match="dtype is .*, expected one of float32"):
            mk.DemonstrationBank.create(tmp_path / "b", adapter(), dtype)
    wide = adapter()
    wide.backbone = replace(BACKBONE, hidden_size=2**16 + 1)
    with pytest.raises(ValueError, match="hidden_size is 65537"):
        mk.DemonstrationBank.create(tmp_path / "b", wide)
    assert not (tmp_path / "b").exists()


def test_a_bank_made_anew_is_seen(tmp_path, bank):
    """Not even one that looks the same is continued with what was known of the old one."""
    add(bank, 1, 2)
    for path in bank.folder.iterdir():
        path.unlink()
    fresh = filled(bank.folder)
    for call in (bank.refresh, lambda: add(bank, 9)):
        with pytest.raises(mk.CheckpointError, match="holds another bank than when it was opened"):
            call()
    fresh.refresh()
    assert len(fresh) == 7 and fresh.verify() == []
