"""Batches from queries: what is drawn, and that it depends on the seed, the epoch and the query alone."""

import copy
import json
import pickle
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

import mmicl_kernels as mk
from mmicl_kernels.data import Demonstration, as_records
from mmicl_kernels.data.prompts.builder import PromptBuilder, builder_of
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training import (
    AggregationBatch,
    AggregationCollator,
    Draw,
    DrawnEpisodes,
    EpisodeBatch,
    EpisodeCollator,
    ManyShotBatch,
    NearestShots,
    RandomShots,
    TrainedModule,
    TrainingConfig,
    draw_demonstrations,
    episode_batch,
    epochs,
    train,
    trainable,
)
from tests.support.example_images import BLUE, GREEN, RED
from tests.training.test_batches import tensors_of

IMAGES = {"red": RED, "blue": BLUE, "do": GREEN}
TEXTS = ["a", "b c", "what?", "0.1", "so", "it", "go", "x y z"]
POOL = [Demonstration((IMAGES[w],), t, w) for t, w in zip(TEXTS, ["red", "blue", "do"] * 3, strict=False)]


@dataclass
class Record:
    """As of a file: read when asked for."""

    id: str
    inner: Demonstration
    reads: int = 0

    def demonstration(self):
        self.reads += 1
        return self.inner


@pytest.fixture(scope="module")
def builder():
    return PromptBuilder(tiny_processor("llava"), "{image}{text} {answer}\n")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_equal(x, y):
    assert type(x) is type(y)
    if isinstance(x, torch.Tensor):
        assert torch.equal(x, y)
    elif isinstance(x, dict):
        assert x.keys() == y.keys()
        [assert_equal(x[name], y[name]) for name in x]
    elif isinstance(x, list | tuple):
        assert len(x) == len(y)
        [assert_equal(*pair) for pair in zip(x, y, strict=True)]
    elif isinstance(x, EpisodeBatch | AggregationBatch):
        assert_equal(vars(x), vars(y))
    else:
        assert x == y


def test_an_episode_is_what_was_drawn(builder):
    collate = EpisodeCollator(builder, POOL, 3, padding_side="left")
    batch = collate(POOL[:2])
    drawn = [collate.drawn(x) for x in POOL[:2]]
    assert_equal(batch, episode_batch(builder, POOL[:2], drawn, padding_side="left"))
    assert all(len(row) == 3 and x not in row for x, row in zip(POOL, drawn, strict=False))
    many = EpisodeCollator(builder, POOL, 3, shots_per_pass=2)(POOL[:2])
    assert isinstance(many, ManyShotBatch)
    assert_equal(many, episode_batch(builder, POOL[:2], drawn, shots_per_pass=2))
    assert_equal(collate.arguments(POOL[:2]), batch.arguments())


def test_what_a_draw_depends_on(builder):
    """Not on the other queries of the batch, nor on their order, nor on how often there was one before."""
    one = EpisodeCollator(builder, POOL, 4, seed=5)
    first = {x.text: one.drawn(x) for x in POOL}
    again = {x.text: one.drawn(x) for x in POOL[::-1]}
    assert first == again
    assert first != {x.text: EpisodeCollator(builder, POOL, 4, seed=6).drawn(x) for x in POOL}
    seen = [first]
    for epoch in (1, 2):
        one.set_epoch(epoch)
        assert one.epoch == epoch
        seen.append({x.text: one.drawn(x) for x in POOL})
    assert seen[0] != seen[1] != seen[2] != seen[0]
    one.set_epoch(0)
    assert {x.text: one.drawn(x) for x in POOL} == first
    # Not the same demonstrations for every query.
    assert len({tuple(y.text for y in row) for row in first.values()}) > 4
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert {x.text: other.drawn(x) for x in POOL} == first
        other.set_epoch(1)
        assert one.epoch == 0


class Epochs(SequentialSampler):
    """A sampler that is told the epoch, as a distributed one is."""

    heard = ()

    def set_epoch(self, epoch):
        self.heard += (epoch,)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("make", [EpisodeCollator, AggregationCollator])
def test_workers(builder, make, persistent):
    """None and two workers make the same batches in every epoch; those that persist hear of epochs."""
    for workers in (0, 2):
        sampler = Epochs(POOL)
        loader = DataLoader(
            POOL, batch_size=2, collate_fn=make(builder, POOL, 2, seed=1), num_workers=workers,
            persistent_workers=persistent and workers > 0, sampler=sampler,
        )  # fmt: skip
        found, here = list(islice(epochs(loader), 12)), make(builder, POOL, 2, seed=1)
        for i, batch in enumerate(found):
            here.set_epoch(i // 4)
            assert_equal(batch, here(POOL[2 * (i % 4) :][:2]))
        assert sampler.heard == (0, 1, 2)
    with pytest.raises(AssertionError):
        assert_equal(found[0], found[4])


@pytest.mark.slow
def test_spawned_workers(builder):
    loader = DataLoader(
        POOL[:4], batch_size=2, num_workers=1, multiprocessing_context="spawn", persistent_workers=True,
        collate_fn=EpisodeCollator(builder, POOL, 1),
    )  # fmt: skip
    here = EpisodeCollator(builder, POOL, 1)
    for i, batch in enumerate(islice(epochs(loader), 4)):
        here.set_epoch(i // 2)
        assert_equal(batch, here(POOL[:4][2 * (i % 2) :][:2]))


def test_epochs_of_a_loader_without_batches(builder):
    with pytest.raises(ValueError, match="loader has no batches"):
        next(epochs(DataLoader([], collate_fn=EpisodeCollator(builder, POOL, 1))))


def test_random_shots():
    counts = Counter()
    for seed in range(400):
        drawn = RandomShots()(POOL, POOL[2], 4, generator(seed))
        assert len(set(drawn)) == 4 and 2 not in drawn
        counts.update(drawn)
        order = RandomShots(replacement=True)(POOL, POOL[2], 9, generator(seed))
        assert len(order) == 9 and 2 not in order and len(set(order)) < 9
    # 400 * 4 / 7 each; five standard deviations of that number are 50.
    assert len(counts) == 7 and all(abs(x - 400 * 4 / 7) < 50 for x in counts.values())
    own = [RandomShots(replacement=True, own_query=True)(POOL, POOL[2], 9, generator(i)) for i in range(20)]
    assert any(2 in drawn for drawn in own)
    assert sorted(RandomShots(own_query=True)(POOL, POOL[2], 8, generator())) == list(range(8))
    assert RandomShots()([], POOL[2], 0, generator()) == []
    outside = Demonstration((RED,), "else", "red")
    assert sorted(RandomShots()(POOL, outside, 8, generator())) == list(range(8))


@pytest.mark.parametrize("replacement", [False, True])
def test_pools_that_are_too_small(replacement):
    draw = RandomShots(replacement=replacement)
    least = 1 if replacement else 2
    with pytest.raises(ValueError, match=f"the pool has 2 examples, 0 of them .* at least {least}"):
        draw([POOL[0], copy.copy(POOL[0])], POOL[0], 2, generator())
    with pytest.raises(ValueError, match="the pool has 0 examples"):
        draw([], POOL[0], 2, generator())
    if not replacement:
        with pytest.raises(ValueError, match="the pool has 2 examples, 1 of them"):
            draw(POOL[:2], POOL[0], 2, generator())


def test_the_query_is_known_by_its_id_or_its_content():
    """Two records of the same content are two examples; without ids they are one."""
    records = [Record(str(i), POOL[0]) for i in range(3)]
    assert sorted(RandomShots()(records, records[1], 2, generator())) == [0, 2]
    with pytest.raises(ValueError, match="0 of them others than the query"):
        RandomShots()([x.inner for x in records], POOL[0], 1, generator())
    same = Demonstration((RED,), "a", "red")
    assert same is not POOL[0] and 0 not in RandomShots()(POOL, same, 7, generator())
    # Where one text ends and the next begins is content, too.
    other = Demonstration((RED,), "ar", "ed")
    assert sorted(RandomShots()(POOL, other, 8, generator())) == list(range(8))


def test_a_record_is_never_its_own_demonstration(tmp_path):
    """Whatever its id: of the same file, of a part of it, as rows, with its images under other names."""
    lines = []
    for i, data in enumerate((RED, BLUE) * 2):
        (tmp_path / f"{i}.png").write_bytes(data)
        (tmp_path / f"copy{i}.png").write_bytes(data)
        lines.append({"image": f"{i}.png", "text": f"what {i // 2}", "answer": "red"})
    copies = [{**x, "image": f"copy{x['image']}", "answer": "another", "id": i} for i, x in enumerate(lines)]
    for name, rows in {"all": lines, "part": lines[2:], "copies": copies}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    pool = mk.Records(tmp_path / "all.jsonl")
    features = torch.eye(4)
    near = NearestShots(features, lambda x: features[2])  # the first of "part" is the pool's third
    for name, first in (("all", 0), ("part", 2), ("copies", 0)):
        for i, query in enumerate(mk.Records(tmp_path / f"{name}.jsonl")):
            assert sorted(RandomShots()(pool, query, 3, generator())) == sorted({0, 1, 2, 3} - {first + i})
            with pytest.raises(ValueError, match="others than the query"):
                RandomShots()(pool, query, 4, generator())
    (query, *_) = mk.Records(tmp_path / "part.jsonl")
    assert 2 not in near(pool, query, 3, generator())
    # Line 1 of another file is no example of the pool, though its number is one's id.
    other = as_records([{"image": RED, "text": "else", "answer": "red", "id": "1"}])[0]
    assert sorted(RandomShots()(pool, other, 4, generator())) == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="the query id 1 is not in the pool, expected embed"):
        NearestShots(features)(pool, other, 1, generator())


def test_only_what_is_drawn_is_read(builder):
    records = [Record(str(i), x) for i, x in enumerate(POOL)]
    EpisodeCollator(builder, records, 2)([records[0]])
    assert sum(x.reads for x in records) == 3
    nearest = NearestShots(torch.eye(8))
    EpisodeCollator(builder, records, 2, draw=nearest)([records[0]])
    assert sum(x.reads for x in records) == 6


FEATURES = torch.tensor([[1.0, 0.0], [2.0, 0.2], [0.9, 0.5], [0.0, 3.0], [-1.0, 0.0], [5.0, 5.0]])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [2, 1]),  # cosines .996 and .874, the nearest beside the query
        ({"nearest": "first"}, [1, 2]),
        ({"similarity": "inner"}, [1, 5]),  # 2 and 5
        ({"similarity": "inner", "nearest": "first"}, [5, 1]),
    ],
)
def test_nearest_shots(options, expected):
    pool = POOL[:6]
    assert NearestShots(FEATURES, **options)(pool, pool[0], 2, generator()) == expected
    new = Demonstration((RED,), "new", "red")
    embed = {new.text: FEATURES[0].half(), pool[0].text: FEATURES[0]}
    by = NearestShots(FEATURES, lambda x: embed[x.text], **options)
    assert by(pool, pool[0], 2, generator()) == expected  # itself left out
    found = by(pool, new, 6, generator())
    assert sorted(found) == list(range(6))
    assert (found[-1] if options.get("nearest") != "first" else found[0]) == (
        5 if "similarity" in options else 0
    )


def test_nearest_shots_errors():
    nearest = NearestShots(FEATURES)
    with pytest.raises(ValueError, match="features has 6 rows, expected 8 like the pool"):
        nearest(POOL, POOL[0], 1, generator())
    with pytest.raises(KeyError, match="is not in the pool, expected embed"):
        nearest(POOL[:6], POOL[7], 1, generator())
    with pytest.raises(ValueError, match="the pool has 5 other examples than the query, expected at least 6"):
        nearest(POOL[:6], POOL[0], 6, generator())
    with pytest.raises(ValueError, match="similarity is 'l2', expected 'cosine' or 'inner'"):
        NearestShots(FEATURES, similarity="l2")
    with pytest.raises(ValueError, match="nearest is 'middle', expected 'last' or 'first'"):
        NearestShots(FEATURES, nearest="middle")
    for bad in (FEATURES[0], FEATURES / 0):
        with pytest.raises(ValueError, match="expected finite ones"):
            NearestShots(bad)


def test_episodes_that_are_drawn_already(builder):
    draws = [Draw(3, (0, 1)), Draw(3, (1, 0))]
    episodes = DrawnEpisodes(POOL, draws)
    (batch,) = DataLoader(episodes, batch_size=2, collate_fn=EpisodeCollator(builder))
    rows = [[POOL[0], POOL[1]], [POOL[1], POOL[0]]]
    assert_equal(batch, episode_batch(builder, [POOL[3]] * 2, rows))


def test_aggregation(builder):
    """Each demonstration once, and every query's in its order."""
    queries, shots = POOL[:2], [(POOL[4], POOL[3], POOL[4]), (POOL[3],)]
    batch = AggregationCollator(builder)(list(zip(queries, shots, strict=True)))
    assert batch.chosen == [[0, 1, 0], [1]]
    assert_equal(batch.demonstrations, builder.demonstrations([POOL[4], POOL[3]])[0])
    assert_equal(batch.positions, builder.demonstrations([POOL[4], POOL[3]])[1])
    assert_equal((batch.queries, batch.labels), builder.queries(queries))
    collate = AggregationCollator(builder, POOL, (1, 4))
    lengths = Counter()
    for epoch in range(30):
        collate.set_epoch(epoch)
        lengths.update(map(len, collate(POOL[:4]).chosen))
    assert sorted(lengths) == [1, 2, 3, 4] and min(lengths.values()) > 10
    with pytest.raises(ValueError, match="demonstrations is empty"):
        AggregationCollator(builder, POOL, 0)(POOL[:2])


@pytest.mark.parametrize(
    "positions, after", [("text", ["red", "\n"]), ("answer", ["red"]), ("answer_end", ["red", "\n"])]
)
def test_aggregation_points_out_what_the_builder_says(builder, positions, after):
    builder = builder_of(builder, positions=positions)
    batch = AggregationCollator(builder)([(POOL[4], (POOL[0], POOL[3]))])
    ids, fused = batch.demonstrations["input_ids"][0], batch.positions[0]
    own = builder.processor.tokenizer.convert_ids_to_tokens(ids[fused])
    assert own[-len(after) :] == [x.replace("red", "▁red") for x in after]
    assert (len(own) > len(after)) == (positions == "text")


def test_errors(builder):
    with pytest.raises(TypeError, match="builder is a LlavaProcessor, expected a PromptBuilder"):
        EpisodeCollator(builder.processor, POOL)
    for shots in (-1, (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="shots is .*expected a number or"):
            AggregationCollator(builder, POOL, shots)
    with pytest.raises(ValueError, match="shots_per_pass is 0, expected at least 1"):
        EpisodeCollator(builder, POOL, 2, shots_per_pass=0)
    with pytest.raises(ValueError, match="padding_side is 'both', expected"):
        EpisodeCollator(builder, POOL, 2, padding_side="both")
    with pytest.raises(TypeError, match="an example is a dict, expected Demonstration or"):
        EpisodeCollator(builder, POOL, 2)([{"text": "a"}])


@pytest.mark.parametrize("kind", ["episodes", "many", "aggregation"])
def test_pinned_memory(builder, kind, monkeypatch):
    """Every tensor of a batch, those of further passes too; the loader asks the batch to do it."""
    pinned = []

    def pin(x):
        pinned.append(x)
        return x + 0

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    make = AggregationCollator if kind == "aggregation" else EpisodeCollator
    options = {"shots_per_pass": 1} if kind == "many" else {}
    batch = make(builder, POOL, 3, **options)(POOL[:2])
    found = batch.pin_memory()
    assert_equal(found, batch)
    tensors = tensors_of(vars(batch))
    assert {id(x) for x in tensors} == {id(x) for x in pinned} and len(tensors) == len(pinned) > 6
    moved = found.to("meta")
    assert moved.labels.device.type == "meta" and found.labels.device.type == "cpu"


CONFIGS = {
    "mimic": mk.MimICConfig(),
    "live": mk.LIVEConfig(site="layer"),  # the tiny model's MLP alone moves little
    "m2iv": mk.M2IVConfig(),
    "aim": mk.AIMConfig(),
}
RATES = {"aim": 0.02}


@pytest.mark.parametrize("method", ["mimic", "live"])
def test_official_prompts_of_idefics_train(method):
    """The first Idefics, with MimIC's own prompts: padding that nothing sees stands before its answers."""
    model = tiny_model("idefics")
    module = TrainedModule(model, mk.create(model, CONFIGS[method]))
    collate = EpisodeCollator(PromptBuilder(tiny_processor("idefics"), "mimic-idefics"), POOL, 2)
    loader = DataLoader(POOL, batch_size=4, collate_fn=collate)
    config = TrainingConfig(learning_rate=0.05)
    log = train(module, trainable(module.adapter), epochs(loader), 10, config=config, progress=False)
    assert log[-1]["ce"] < log[1]["ce"] and log[-2]["ce"] < log[0]["ce"]  # of the same queries


@pytest.mark.parametrize("method", CONFIGS)
def test_from_examples_to_an_adapter(method, builder):
    """Eight examples, a tiny model, its processor: the loss of a fixed batch falls."""
    model = tiny_model("llava-llama")
    adapter = mk.create(model, CONFIGS[method])
    module = TrainedModule(model, adapter)
    collate = {"aim": AggregationCollator(builder, POOL, (1, 2))}.get(
        method, EpisodeCollator(builder, POOL, 2)
    )
    items = POOL
    if method == "m2iv":
        draws = draw_demonstrations(torch.eye(8), 4, 2, seed=1)
        items = DrawnEpisodes(POOL, draws)
    loader = DataLoader(items, batch_size=4, shuffle=True, generator=generator(1), collate_fn=collate)
    collate.set_epoch(1000)
    fixed = collate([items[i] for i in range(len(items))])
    with torch.no_grad():
        before = module(**fixed.arguments())["loss"]
    config = TrainingConfig(learning_rate=RATES.get(method, 0.05))
    log = train(module, trainable(adapter), epochs(loader), 20, config=config, progress=False)
    with torch.no_grad():
        after = module(**fixed.arguments())["loss"]
    assert len(log) == 20 and after < 0.98 * before, (before, after)


@pytest.mark.slow
def test_a_trainer_collates_with_it(builder, tmp_path):
    """Its steps are those of a loop over the same batches."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def module():
        model = tiny_model("llava-llama")
        torch.manual_seed(0)
        return TrainedModule(model, mk.create(model, mk.LIVEConfig()))

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=0.5, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, remove_unused_columns=False, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    collate, one, other = EpisodeCollator(builder, POOL, 2), module(), module()
    Trainer(one, arguments, train_dataset=POOL, data_collator=collate.arguments).train()
    optimizer = torch.optim.SGD(trainable(other.adapter).values(), lr=0.5)
    for queries in (POOL[:4], POOL[4:]):
        optimizer.zero_grad()
        other(**collate.arguments(queries))["loss"].backward()
        optimizer.step()
    for x, y in zip(one.adapter.parameters(), other.adapter.parameters(), strict=True):
        assert torch.equal(x, y)
