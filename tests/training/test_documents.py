"""Interleaved documents: what is read, what is skipped and why, which pairs become demonstrations."""

import json
import os
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

import mmicl_kernels as mk
from mmicl_kernels.data import Demonstration
from mmicl_kernels.data import documents as documents_module
from mmicl_kernels.data import lines as lines_module
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.methods.aim.objective import AIMObjective
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training import Documents, TrainingConfig, document_batches, train, trainable
from tests.support.example_images import png


def grey(value):
    return png((value,) * 3, (5, 4))


def record(*pairs, sentences=None):
    """A line of JSON; the pairs are names of images with numbers of sentences."""
    sentences = ["zero", "one", "two", "three"] if sentences is None else sentences
    infos = [{"image_name": name, "matched_text_index": index, "matched_sim": 0.3} for name, index in pairs]
    return json.dumps({"text_list": sentences, "image_info": infos, "url": "x"}).encode()


@pytest.fixture
def write(tmp_path):
    """Writes images named by their grey value, and lines into a file; returns both paths."""
    images = tmp_path / "images"
    images.mkdir()
    for value in range(6):
        (images / f"{value}.png").write_bytes(grey(value))

    def write(*lines, name="data.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join(lines))
        return tmp_path / name, images

    return write


def pair(value, sentence):
    return Demonstration((grey(value),), "", sentence)


def test_pairs_in_the_order_of_their_sentences(write):
    documents = Documents(*write(record(("3.png", 2), ("1.png", 0)), b"", record(("2.png", 1)), record()))
    expected = [(pair(1, "zero"), pair(3, "two")), (pair(2, "one"),)]
    assert list(documents) == expected
    assert list(documents) == expected  # and again
    assert documents.skipped == {} and documents.passes == 2


def test_several_files(write):
    first, images = write(record(("1.png", 0)), name="a")
    second, _ = write(record(("2.png", 0)), name="b")
    assert list(Documents([second, first], images)) == [(pair(2, "zero"),), (pair(1, "zero"),)]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "bad JSON"),
        (b"[1]", "bad JSON"),
        (b"\xff\xfe", "bad JSON"),
        (b"[" * 100_000, "bad JSON"),
        (b'{"text_list": ["a"]}', "missing field"),
        (b'{"text_list": "a", "image_info": []}', "missing field"),
        (b'{"text_list": ["a"], "image_info": [7]}', "missing field"),
        (b'{"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}', "missing field"),
        (b'{"text_list": ["a"], "image_info": [{"image_name": "1.png"}]}', "missing field"),
        (record(("1.png", True)), "missing field"),
        (record(("1.png", 4)), "index out of range"),
        (record(("1.png", -1)), "index out of range"),
        (record(("1.png", 0), sentences=[" "]), "empty sentence"),
        (record(("1.png", 0), sentences=[3]), "empty sentence"),
        (record(("1.png", 0), sentences=["\ud800"]), "not Unicode"),
        (record(("9.png", 0)), "missing image"),
        (record(("nul\0", 0)), "missing image"),
        (record(("x" * 5000, 0)), "missing image"),
        (record(("../secret.png", 0)), "path outside"),
        (record(("../images.png", 0)), "path outside"),
        (record(("link.png", 0)), "path outside"),
        (record(("folder/secret.png", 0)), "path outside"),
        (record(("broken.png", 0)), "unreadable image"),
        (record(("fifo", 0)), "missing image"),
        (record(("loop", 0)), "missing image"),
    ],
)
def test_what_is_skipped(write, tmp_path, line, reason):
    file, images = write(line, record(("1.png", 1)), line)
    secret = tmp_path / "secret.png"
    secret.write_bytes(grey(9))
    (tmp_path / "images.png").write_bytes(grey(9))
    (images / "link.png").symlink_to(secret)
    (images / "folder").symlink_to(tmp_path, target_is_directory=True)
    (images / "loop").symlink_to(images / "loop")
    (images / "broken.png").write_bytes(grey(1)[:-30])
    os.mkfifo(images / "fifo")
    documents = Documents(file, images)
    assert list(documents) == [(pair(1, "one"),)]
    assert documents.skipped == {reason: 2}


def test_absolute_paths_are_refused_links_within_are_not(write):
    _, images = write()
    (images / "link.png").symlink_to("1.png")
    file, _ = write(record((str(images / "1.png"), 0), ("link.png", 1)))
    documents = Documents(file, images)
    assert list(documents) == [(pair(1, "one"),)]
    assert documents.skipped == {"path outside": 1}


def test_a_bad_image_costs_its_pair_alone(write):
    documents = Documents(*write(record(("1.png", 0), ("9.png", 1), ("2.png", 2), ("3.png", 9))))
    assert list(documents) == [(pair(1, "zero"), pair(2, "two"))]
    assert documents.skipped == {"missing image": 1, "index out of range": 1}


def test_images_whose_colours_are_not_known_cost_their_pairs(write):
    file, images = write(record(("deep.png", 0), ("float.tiff", 1), ("clear.png", 2), ("3.png", 3)))
    Image.new("I;16", (4, 4), 30000).save(images / "deep.png")
    Image.new("F", (4, 4), 0.5).save(images / "float.tiff")
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(images / "clear.png")
    documents = Documents(file, images)
    (document,) = documents
    assert [x.answer for x in document] == ["zero", "three"]
    assert documents.skipped == {"unreadable image": 2}
    builder = PromptBuilder(tiny_processor("llava"))
    given, _ = builder.demonstrations([document[0], pair(117, "x")])  # 30000 / 257, rounded
    assert torch.equal(given["pixel_values"][0], given["pixel_values"][1])


def test_long_lines_are_not_kept(write, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 200)
    long = record(("1.png", 0), sentences=["a" * 1000])
    short = record(("2.png", 0), sentences=["a"])
    for lines in ([long, short], [short, long], [long, short, long]):
        documents = Documents(*write(*lines))
        assert list(documents) == [(pair(2, "a"),)]
        assert documents.skipped == {"line too long": len(lines) - 1}


def test_only_what_is_asked_for_is_read(write, monkeypatch):
    file, images = write(*[record((f"{i % 6}.png", 0)) for i in range(50)])
    read = []
    original = documents_module.parse_line
    monkeypatch.setattr(documents_module, "parse_line", lambda line: read.append(line) or original(line))
    assert len(list(islice(Documents(file, images), 3))) == 3 and len(read) == 3
    read.clear()
    assert len(list(islice(Documents(file, images, shuffle=10), 3))) == 3 and len(read) == 12


def names(documents, count=None):
    return [document[0].answer for document in islice(documents, count)]


def test_shuffle(write):
    file, images = write(*[record(("1.png", 0), sentences=[str(i)]) for i in range(40)])
    plain = [str(i) for i in range(40)]
    shuffled = names(Documents(file, images, shuffle=8, seed=3))
    assert shuffled != plain and sorted(shuffled, key=int) == plain
    assert all(int(name) < place + 8 for place, name in enumerate(shuffled))  # within the buffer
    assert names(Documents(file, images, shuffle=8, seed=3)) == shuffled
    other = names(Documents(file, images, shuffle=8, seed=4))
    assert len({tuple(x[:20]) for x in (plain, shuffled, other)}) == 3  # long before the buffer is emptied
    whole = names(Documents(file, images, shuffle=1000, seed=3))
    assert sorted(whole, key=int) == plain and whole != plain


def test_endless(write):
    file, images = write(*[record(("1.png", 0), sentences=[str(i)]) for i in range(5)], b"{")
    again = Documents(file, images, endless=True)
    assert names(again, 15) == names(again, 15)  # what was read before is no reason to stop
    documents = Documents(file, images, endless=True)
    assert names(documents, 12) == list("012340123401")
    assert documents.skipped == {"bad JSON": 2} and documents.passes == 2
    shuffled = names(Documents(file, images, shuffle=5, endless=True), 15)
    passes = [shuffled[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(x) == list("01234") for x in passes) and passes[0] != passes[1]
    with pytest.raises(ValueError, match="no usable document in .*bad JSON"):
        next(iter(Documents(*write(b"{"), endless=True)))


def test_errors(write, tmp_path):
    file, images = write(record(("1.png", 0)))
    with pytest.raises(FileNotFoundError, match="expected a file of JSON lines"):
        Documents(tmp_path / "none", images)
    with pytest.raises(FileNotFoundError, match="expected the folder of the images"):
        Documents(file, tmp_path / "none")
    with pytest.raises(ValueError, match="shuffle is -1"):
        Documents(file, images, shuffle=-1)
    builder = PromptBuilder(tiny_processor("llava"))
    for batch, shots, message in [
        (0, (1, 2), "batch is 0"),
        (1, (0, 2), "shots is"),
        (1, (3, 2), "shots is"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(document_batches(Documents(file, images), builder, batch, shots, torch.Generator()))
    documents = Documents(file, images, endless=True)
    with pytest.raises(ValueError, match=r"no usable document .*'fewer than 2 pairs': \d"):
        next(document_batches(documents, builder, 1, (1, 2), torch.Generator()))


def described(builder, batch):
    """The sentences of each document's demonstrations, and of its query by the labels."""
    decode = builder.processor.tokenizer.decode

    def last(ids, mask):
        return decode(ids[mask.bool()], skip_special_tokens=True).split()[-1]

    given = batch.demonstrations
    texts = [last(*x) for x in zip(given["input_ids"], given["attention_mask"], strict=True)]
    queries = [decode(row[row != -100], skip_special_tokens=True).strip() for row in batch.labels]
    prompts = batch.queries
    assert [last(*x) for x in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)] == queries
    return [([texts[i] for i in of], query) for of, query in zip(batch.chosen, queries, strict=True)]


def lengths_file(write, *lengths):
    """Documents whose sentences are their letter and number."""
    lines = []
    for letter, n in zip("abcdefgh", lengths, strict=False):
        pairs = [(f"{i}.png", i) for i in range(n)]
        lines.append(record(*pairs, sentences=[f"{letter}{i}" for i in range(n)]))
    return write(*lines)


def test_the_next_pair_is_the_query(write):
    builder = PromptBuilder(tiny_processor("llava"))
    documents = Documents(*lengths_file(write, 4, 1, 2, 6, 5))
    batches = list(document_batches(documents, builder, 2, (3, 3), torch.Generator()))
    assert [described(builder, batch) for batch in batches] == [
        [(["a0", "a1", "a2"], "a3"), (["c0"], "c1")],
        [(["d0", "d1", "d2"], "d3"), (["e0", "e1", "e2"], "e3")],
    ]
    assert documents.skipped == {"fewer than 2 pairs": 1}
    first = batches[0]
    assert first.positions.any(-1).all() and first.chosen == [[0, 1, 2], [3]]
    assert first.demonstrations["pixel_values"].shape[0] == 4 and first.queries["pixel_values"].shape[0] == 2
    means = first.demonstrations["pixel_values"].mean((1, 2, 3))
    assert means[0] < means[1] < means[2] and means[3] == means[0]


def test_number_of_demonstrations_is_random(write):
    builder = PromptBuilder(tiny_processor("llava"), positions="answer")

    def counts(seed):
        documents = Documents(*lengths_file(write, 6), endless=True)
        batches = document_batches(documents, builder, 1, (1, 3), torch.Generator().manual_seed(seed))
        return [len(batch.chosen[0]) for batch in islice(batches, 15)]

    assert set(counts(0)) == {1, 2, 3} and counts(0) == counts(0) != counts(1)


def test_sentences_that_a_prompt_cannot_have(write):
    builder = PromptBuilder(tiny_processor("llava"))
    sentences = ["a0", "b <image>", "</s>", "a3"]
    documents = Documents(*write(record(*[(f"{i}.png", i) for i in range(4)], sentences=sentences)))
    (batch,) = document_batches(documents, builder, 3, (2, 2), torch.Generator())
    assert described(builder, batch) == [(["a0"], "a3")]
    assert documents.skipped == {"refused sentence": 2}


def test_loss_falls(write):
    """Documents say one word over and over, so what a demonstration says is the answer."""
    lines = [
        record(*[(f"{i}.png", 0) for i in range(3)], sentences=[word]) for word in ("red", "blue", "cat")
    ]
    file, images = write(*lines)
    model = tiny_model("llava-llama")
    model.lm_head.weight.data.mul_(20.0)  # as it is drawn no state could make a word likely
    adapter = mk.create(model, mk.AIMConfig())
    builder = PromptBuilder(tiny_processor("llava"))

    def batches(endless):
        documents = Documents(file, images, shuffle=3, endless=endless)
        return document_batches(documents, builder, 3, (1, 2), torch.Generator().manual_seed(0))

    with mk.attach(model, adapter) as handle:
        objective = AIMObjective(handle)
        (batch,) = batches(endless=False)

        @torch.no_grad()
        def loss(chosen):
            return float(objective(replace(batch, chosen=chosen)).total)

        before = loss(batch.chosen)
        config = TrainingConfig(learning_rate=0.05)
        train(
            objective, trainable(adapter), batches(endless=True), 30, model=model, config=config,
            progress=False,
        )  # fmt: skip
        others = batch.chosen[1:] + batch.chosen[:1]
        assert 2 * loss(batch.chosen) < min(before, loss(others))
