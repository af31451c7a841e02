"""Demonstrations that a batch shares: the states, targets and gradients of whole prompts, fewer tokens."""

from functools import partial

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prefix import PrefixedBatch, prefixed_batch
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.methods.answers import answer_logits
from mmicl_kernels.methods.teaching import SHARING, after_prefix, new_cache, teach
from mmicl_kernels.patch import attach
from mmicl_kernels.testing.budgets import assert_within_budget
from mmicl_kernels.testing.real_processors import tiny_vlm
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training import (
    Draw,
    DrawnEpisodes,
    EpisodeBatch,
    EpisodeCollator,
    NearestShots,
    RandomShots,
    TrainedModule,
    episode_batch,
    trainable,
)
from mmicl_kernels.training.recipes import Recipe
from mmicl_kernels.training.run import Training
from tests.support.example_images import RED
from tests.support.example_processors import processor_of
from tests.support.published import in_double, random_adapter
from tests.support.records_of_colours import write_records
from tests.support.residuals import random_shift
from tests.training.example_questions import PLAIN, QUERIES, SHOTS

SEQUENCES = ("input_ids", "attention_mask")
ADAPTERS = {
    "mimic": random_adapter,
    "live": lambda model: random_shift(model, mk.LIVEConfig()),
    "m2iv": lambda model: random_shift(model, mk.M2IVConfig(synergy_weight=0.125)),
}
# Roundings of an update, as in test_trainer.py: the same sums in another order through three layers.
ROUNDINGS = 64


def _internvl(name):
    processor, model = processor_of("internvl"), tiny_model(name)
    processor.image_seq_length = 4
    processor.image_processor.crop_to_patches = True
    processor.image_processor.max_patches = 4
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return processor, model


def _idefics3():
    processor = processor_of("idefics3")
    processor.image_seq_len = 4
    return processor, tiny_model("idefics3")


def _real(split):
    name = "real-smolvlm" if split else "real-smolvlm-whole"
    return processor_of(name), tiny_vlm("smolvlm")


# A processor and a model that fits it.
MADE = {
    "llava-llama": lambda: (processor_of("llava"), tiny_model("llava-llama")),
    "llava-qwen2": lambda: (processor_of("llava"), tiny_model("llava-qwen2")),
    "idefics2": lambda: (processor_of("idefics2"), tiny_model("idefics2")),
    "idefics3": _idefics3,
    "internvl": partial(_internvl, "internvl"),
    "internvl-qwen3_moe": partial(_internvl, "internvl-qwen3_moe"),
    "real-smolvlm": partial(_real, True),
    "real-smolvlm-whole": partial(_real, False),
}
QUICK = {("llava-llama", "mimic-llava"), ("idefics2", "chat"), ("idefics3", PLAIN)}
OFFICIAL = {name: "mimic-idefics" if "real" in name else "mimic-llava" for name in MADE}
MATRIX = [
    pytest.param(name, template, marks=() if (name, template) in QUICK else pytest.mark.slow)
    for name in MADE
    for template in ("chat", PLAIN, OFFICIAL[name], "live")
]


def batches(processor, template, dtype=None):
    """With the demonstrations once, and before each query."""
    builder = PromptBuilder(processor, template, dtype=dtype)
    shared = prefixed_batch(builder, QUERIES, SHOTS)
    return shared, episode_batch(builder, QUERIES, [SHOTS] * len(QUERIES))


def losses_of(model, method, batch):
    """The teacher's part, the loss, and gradients by the last part of their names."""
    torch.manual_seed(0)
    module = TrainedModule(model, ADAPTERS[method](model)).train()
    with torch.no_grad():
        taught = module.objective._teach(batch) if method == "mimic" else [teach(module.handle, batch, 1.0)]
    loss = module(**batch.arguments())["loss"]
    loss.backward()
    made = {"taught": torch.cat([x.flatten() for x in taught]), "loss": loss.detach()}
    for name, x in trainable(module.adapter).items():
        kind = name.rpartition(".")[2]
        if kind == "scale":  # whose gradient is the vector's times the vector, a sum that cancels
            continue
        made[kind] = torch.cat([made.get(kind, x.grad.new_zeros(0)), x.grad.flatten()])
    module.handle.detach()
    return made


@pytest.mark.parametrize("name, template", MATRIX)
def test_the_same_as_whole_prompts(name, template):
    """States at the query's tokens, the answer's probabilities, and the adapter's gradients."""
    processor, model = MADE[name]()
    assert model.config.model_type in SHARING
    shared, whole = batches(processor, template)
    _, exact = batches(processor, template, torch.float64)
    double = in_double(model)
    for method in ADAPTERS:
        mine, plain, reference = (
            losses_of(*pair)
            for pair in ((model, method, shared), (model, method, whole), (double, method, exact))
        )
        for kind, x in mine.items():
            assert_within_budget(f"{method} {kind}", x, plain[kind], reference[kind].double(), ROUNDINGS)


@pytest.mark.parametrize("name, template", MATRIX)
def test_the_tokens_are_those_of_whole_prompts(name, template):
    processor, _ = MADE[name]()
    shared, whole = batches(processor, template)
    P, T, S = (x["input_ids"].shape[1] for x in (shared.prefix, shared.teacher, whole.teacher))
    assert type(shared) is PrefixedBatch and P + T == S and P > 2 * T / 3
    rows = len(QUERIES)
    for key in SEQUENCES:
        joined = torch.cat([shared.prefix[key].expand(rows, -1), shared.teacher[key]], 1)
        assert torch.equal(joined, whole.teacher[key])
    assert torch.equal(shared.teacher_query, whole.teacher_query[:, P:])
    assert not whole.teacher_query[:, :P].any()
    assert torch.equal(shared.labels, whole.labels) and torch.equal(shared.student_query, whole.student_query)


@pytest.mark.parametrize("method", ADAPTERS)
def test_demonstrations_are_read_once(method):
    """P + B T tokens pass a layer of the teacher, where whole prompts are B (P + T)."""
    processor, model = MADE["llava-llama"]()
    shared, whole = batches(processor, "chat")
    handle = attach(model, ADAPTERS[method](model))
    objective = handle.single.objective_class()(handle)
    seen = []
    layer = handle.anchors[0].layer
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))

    def read(batch):
        seen.clear()
        objective(batch)
        return sum(seen[:-1])  # the last call is the student's

    (B, T), P = shared.teacher["input_ids"].shape, shared.prefix["input_ids"].shape[1]
    assert read(shared) == P + B * T
    assert read(whole) == B * (P + T) and seen == [B * (P + T), shared.student["input_ids"].numel()]
    handle.detach()


def test_images_of_pixtral():
    """A LLaVA whose images have sizes of their own; its processor needs torchvision, so ids are made up."""
    model = tiny_model("llava-pixtral")
    made = tiny_inputs(model, batch=3, length=14)
    prefix, tails = ({name: x[rows] for name, x in made.items()} for rows in (slice(1), slice(1, 3)))
    whole = {name: torch.cat([prefix[name].expand(2, -1), tails[name]], 1) for name in SEQUENCES}
    for name in made.keys() - whole.keys():
        whole[name] = torch.cat([prefix[name], tails[name][:1], prefix[name], tails[name][1:]])
    own = torch.ones_like(tails["input_ids"], dtype=torch.bool)
    own[:, 0] = False  # which a student would begin with, too
    batch = PrefixedBatch(tails, tails, own, own, tails["input_ids"], prefix=prefix)
    with torch.no_grad():
        logits = answer_logits(model, after_prefix(model, batch, tails), own)
        plain, exact = (
            x(**{name: y.to(x.dtype) if y.is_floating_point() else y for name, y in whole.items()}).logits
            for x in (model, in_double(model))
        )
    assert_within_budget("logits", logits, *(x[:, 14:][own] for x in (plain, exact)), ROUNDINGS)


def test_gradient_checkpointing():
    """A cache is kept by the teacher, whose layers are not checkpointed."""
    processor, model = MADE["llava-llama"]()
    shared, _ = batches(processor, PLAIN)
    plain = losses_of(model, "live", shared)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for kind, x in losses_of(model, "live", shared).items():
        assert torch.equal(x, plain[kind]), kind


def test_white_space_before_a_query():
    """SmolLM2's "\\n\\n" is one token before an image and two before a word: the query gets both."""
    processor, _ = MADE["real-smolvlm-whole"]()
    shared, whole = batches(processor, "live")
    decode = processor.tokenizer.decode
    assert decode(shared.prefix["input_ids"][0]).endswith("Short answer:do.")
    assert [decode(x)[:4] for x in shared.teacher["input_ids"]] == ["\n\n<f", "\n\n<f", "\n\nQu"]
    assert torch.equal(
        whole.teacher["input_ids"][:, shared.prefix["input_ids"].shape[1] :], shared.teacher["input_ids"]
    )


def test_an_instruction_that_ends_as_demonstrations_do():
    """It is no part of a query: the cut is not before "red." but after it."""
    processor = tiny_processor("llava")
    builder = PromptBuilder(processor, "{image}{text} {answer}.", instruction="say red.")
    shared = prefixed_batch(builder, QUERIES, SHOTS[:1])
    assert processor.tokenizer.decode(shared.prefix["input_ids"][0]).endswith("what? red.")
    assert torch.equal(shared.teacher_query, shared.teacher["attention_mask"].bool())


@pytest.mark.parametrize(
    "template, shot, query, message",
    [
        (
            "{image}{text} {answer}",
            Demonstration((), "a", "nod"),
            Demonstration((), "hi", "red"),
            "begin with",
        ),
        # The line's end goes to the query, whose first letter it takes up.
        (
            PLAIN,
            Demonstration((), "a", "red"),
            Demonstration((), "hi is", "red"),
            "only the last 6 tokens are",
        ),
        # One image ends where another begins, and some processors write one token for both.
        (
            "{image}{text}{answer}",
            Demonstration((RED,), "", ""),
            Demonstration((RED,), "", "red"),
            "after text",
        ),
    ],
)
def test_tokens_of_both_parts_are_refused(template, shot, query, message):
    builder = PromptBuilder(tiny_processor("llava", words=("▁red", "dh", "\nh")), template)
    with pytest.raises(ValueError, match=message):
        prefixed_batch(builder, [query], [shot])


@pytest.mark.parametrize(
    "name", ["gemma3", "glm4v", "idefics", "llava_onevision", "mllama", "paligemma", "qwen2_vl", "qwen2_5_vl"]
)
def test_other_families_are_refused(name):
    model = tiny_model(name)
    with pytest.raises(ValueError, match=rf"the model a {name}, expected one of idefics2, idefics3, "):
        new_cache(model)


def test_windows_are_refused():
    model = tiny_model("llava-qwen2")
    new_cache(model)
    text = model.config.text_config
    text.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    text.sliding_window = 4
    with pytest.raises(
        ValueError, match=r"cache has \['DynamicSlidingWindowLayer'\], expected layers of full"
    ):
        new_cache(model)


@pytest.fixture(scope="module")
def builder():
    return PromptBuilder(tiny_processor("llava", chat=True), "chat")


POOL = [Demonstration((RED,), f"a {i}", "red") for i in range(8)]


def shown(builder, batch):
    """Which of ``POOL`` are the batch's demonstrations, and which its queries."""
    texts = [
        builder.processor.tokenizer.decode(x)
        for x in (batch.prefix["input_ids"][0], *batch.teacher["input_ids"])
    ]
    found = [[int(x[2]) for x in text.split("\n") if x.startswith("a ")] for text in texts]
    return found[0], [x for row in found[1:] for x in row]


@pytest.mark.parametrize("replacement", [False, True])
def test_draws(builder, replacement):
    """By the seed, the epoch and the batch's queries, which are never among them."""
    draw = RandomShots(replacement=replacement)
    collate = EpisodeCollator(builder, POOL, 3, shared_shots=True, draw=draw)
    seen = []
    for epoch in range(10):
        collate.set_epoch(epoch)
        shots, queries = shown(builder, collate(POOL[2:5]))
        assert queries == [2, 3, 4] and len(shots) == 3 and not {*shots} & {*queries}
        assert replacement or len({*shots}) == 3
        assert shown(builder, collate(POOL[4:1:-1])) == (shots, [4, 3, 2])
        seen.append(shots)
    assert {x for row in seen for x in row} == {0, 1, 5, 6, 7} and len({*map(tuple, seen)}) > 6
    assert not replacement or any(len({*row}) < 3 for row in seen)
    collate.set_epoch(0)
    assert shown(builder, collate(POOL[2:5]))[0] == seen[0]
    other = EpisodeCollator(builder, POOL, 3, shared_shots=True, draw=draw, seed=1)
    assert shown(builder, other(POOL[2:5]))[0] != seen[0] != shown(builder, collate(POOL[2:4]))[0]
    assert shown(builder, EpisodeCollator(builder, POOL, 5, shared_shots=True)(POOL[:3]))[0]
    with pytest.raises(
        ValueError, match="8 examples, 5 of them others than the queries, expected at least 6"
    ):
        EpisodeCollator(builder, POOL, 6, shared_shots=True)(POOL[:3])


def test_pairs_and_no_shots_are_whole_prompts(builder):
    collate = EpisodeCollator(builder, POOL, 2, shared_shots=True)
    assert type(collate([(POOL[0], POOL[1:3]), (POOL[1], POOL[3:5])])) is EpisodeBatch
    assert type(EpisodeCollator(builder, POOL, 0, shared_shots=True)(POOL[:2])) is EpisodeBatch


def test_batches_are_checked(builder):
    batch = EpisodeCollator(builder, POOL, 2, shared_shots=True)(POOL[:2])
    with pytest.raises(ValueError, match="prefix has 2 rows, expected 1"):
        PrefixedBatch(**{**vars(batch), "prefix": batch.teacher})
    without = {"input_ids": batch.prefix["input_ids"]}
    with pytest.raises(ValueError, match=r"prefix has \['input_ids'\], expected an attention_mask"):
        PrefixedBatch(**{**vars(batch), "prefix": without})


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"shots_per_pass": 2},
            "shots 2, shots_per_pass 2 and padding_side 'right', expected a number, None",
        ),
        ({"padding_side": "left"}, "padding_side 'left', expected a number, None and 'right'"),
        ({"shots": (1, 2)}, r"shots \(1, 2\), shots_per_pass None"),
        (
            {"draw": NearestShots(torch.eye(8))},
            "draw is a NearestShots and shared_shots True, expected Random",
        ),
    ],
)
def test_what_it_does_not_go_with(builder, options, message):
    with pytest.raises(ValueError, match=message):
        EpisodeCollator(builder, POOL, **{"shots": 2, "shared_shots": True, **options})


@pytest.fixture
def records(tmp_path):
    return mk.Records(write_records(tmp_path))


def refused(records, message, *, model="llava-llama", config=None, **options):
    recipe = Recipe(shots=options.pop("shots", 2), shared_shots=True)
    with pytest.raises(ValueError, match=message):
        Training.of(
            tiny_model(model), tiny_processor("llava", chat=True), records, config or mk.LIVEConfig(),
            recipe=recipe, **options,
        )  # fmt: skip


def test_refused_before_training_begins(records):
    refused(records, "shared_shots is True and the model a gemma3", model="gemma3")
    refused(records, "shared_shots is True and method 'aim'", config=mk.AIMConfig(), shots=(1, 2))
    refused(DrawnEpisodes(records, [Draw(0, (1, 2))]), "shared_shots is True and records are DrawnEpisodes")
    refused(records, "draw is a function", draw=lambda *_: [0, 1])
    with pytest.raises(ValueError, match="shots_per_pass is 2 with shared_shots, expected None"):
        Recipe(shared_shots=True, shots_per_pass=2)
    with pytest.raises(TypeError, match="shared_shots is 1, expected True or False"):
        Recipe(shared_shots=1)


def test_mk_train(records, monkeypatch):
    """The adapter of whole prompts with the same draws; episodes of the validation stay whole."""
    pytest.importorskip("accelerate")
    demonstrations = [x.demonstration() for x in records]
    recipe = Recipe(steps=2, batch_size=4, accumulate=1, shots=2, shared_shots=True)

    def trained():
        return mk.train(
            tiny_model("llava-llama"), tiny_processor("llava", chat=True), demonstrations, mk.LIVEConfig(),
            recipe=recipe, validation=demonstrations[:3], progress=False, arguments={"optim": "sgd"},
        )  # fmt: skip

    adapter, made = trained(), []

    def whole(builder, queries, shots):
        made.append(len(queries))
        return episode_batch(builder, queries, [shots] * len(queries))

    monkeypatch.setattr("mmicl_kernels.data.collate.prefixed_batch", whole)
    other = trained()
    assert len(made) >= 2 and {*made} == {4}
    torch.manual_seed(0)
    start = mk.create(tiny_model("llava-llama"), mk.LIVEConfig())
    x, y, z = (torch.cat([p.detach().flatten() for p in a.parameters()]) for a in (adapter, other, start))
    eps = torch.finfo(torch.float32).eps
    assert (x - y).norm() <= ROUNDINGS * eps * (y - z).norm() + eps * y.norm() < (y - z).norm()
