"""mk.train: the same updates as written out, accumulation, resuming, the best checkpoint, what is refused."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerState, get_cosine_schedule_with_warmup
from transformers.modeling_layers import GradientCheckpointingLayer

import mmicl_kernels as mk
from mmicl_kernels.data import Demonstration
from mmicl_kernels.data.prompts.builder import builder_of
from mmicl_kernels.methods import ADAPTERS
from mmicl_kernels.models.pretrained import load_model
from mmicl_kernels.patch import attach, handle_of
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training import (
    AggregationCollator,
    EpisodeCollator,
    RandomShots,
    TrainedModule,
    epochs,
    trainable,
)
from mmicl_kernels.training.optimizer import decay_to_identity, parameter_groups
from mmicl_kernels.training.recipes import RECIPES, Recipe
from mmicl_kernels.training.run import Training
from mmicl_kernels.training.trainer import last_checkpoint
from tests.support.records_of_colours import write_records
from tests.support.same_adapter import assert_same

pytest.importorskip("accelerate")
# The same sums in another order, through three or four layers: see test_trainer.py.
EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 64 * EPS
CONFIGS = {
    "mimic": mk.MimICConfig(),
    "live": mk.LIVEConfig(),
    "m2iv": mk.M2IVConfig(),
    "aim": mk.AIMConfig(),
    "prompt_tuning": mk.PromptTuningConfig(),
    "hificl": mk.HiFICLConfig(),
    "stave": mk.STAVEConfig(),
}
METHODS = [pytest.param(x, marks=[] if x == "mimic" else pytest.mark.slow) for x in CONFIGS]
SHORT = Recipe(steps=5, batch_size=4, accumulate=1, shots=2, warmup=0.4, weight_decay=0.1, shuffle=False)


def recipe_for(method, **options):
    return replace(SHORT, **({"shots": (1, 2)} if method == "aim" else {}), **options)


@pytest.fixture
def records(tmp_path):
    return write_records(tmp_path)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model("llava-llama")


@pytest.fixture
def processor():
    return tiny_processor("llava", chat=True)


def demonstrations(records):
    return [x.demonstration() for x in mk.Records(records)]


def written_out(model, processor, records, config, recipe, seed):
    """The same training without a Trainer."""
    records = mk.Records(records)
    collate = {"aim": AggregationCollator}.get(type(config).__name__[:3].lower(), EpisodeCollator)(
        builder_of(processor), records, recipe.shots, seed=seed
    )
    loader = torch.utils.data.DataLoader(records, batch_size=recipe.batch_size, collate_fn=collate)
    torch.manual_seed(seed)
    module = TrainedModule(model, mk.create(model, config)).train()
    parameters = trainable(module.adapter)
    groups = parameter_groups(parameters, recipe.learning_rate, recipe.weight_decay, module.objective)
    optimizer = torch.optim.AdamW(groups, fused=True)
    decay_to_identity(optimizer, parameters, module.objective)
    rising = math.ceil(recipe.warmup * recipe.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, rising, recipe.steps)
    for _, batch in zip(range(recipe.steps), epochs(loader), strict=False):
        optimizer.zero_grad()
        module(**batch.arguments())["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
        optimizer.step()
        schedule.step()
    module.handle.detach()
    return module.adapter


@pytest.mark.parametrize("method", METHODS)
def test_the_same_updates_as_written_out(model, processor, records, method, tmp_path):
    recipe, config = recipe_for(method), CONFIGS[method]
    options = {"recipe": recipe, "seed": 3, "progress": False}
    adapter = mk.train(model, processor, records, config, out=tmp_path / "out", **options)
    expected = written_out(tiny_again(), processor, records, config, recipe, 3)
    assert_same(adapter, expected)
    assert_same(adapter, mk.load(tmp_path / "out", model))
    assert_same(adapter, mk.load(tmp_path / "out" / "checkpoint-5", model))
    assert not any(x.requires_grad for x in adapter.parameters())
    assert (tmp_path / "out" / "training.png").stat().st_size > 5000
    sizes = [x.stat().st_size for x in (tmp_path / "out" / "checkpoint-5").iterdir()]
    assert sum(sizes) < 100_000, "a checkpoint is the adapter, its optimizer and the log"


def tiny_again():
    torch.manual_seed(0)
    return tiny_model("llava-llama")


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_batches_are_one(model, processor, records, method, tmp_path):
    """Whatever the lengths of their answers: all tokens of an update count the same."""
    config = CONFIGS[method] if method != "m2iv" else mk.M2IVConfig(synergy_weight=0)
    steps = {"steps": 1, "warmup": 0.0, "learning_rate": 0.5}
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    start = Training.of(model, processor, records, config, recipe=recipe_for(method))
    with start.module() as module:
        before = {name: x.detach().clone() for name, x in module.adapter.named_parameters()}
    made = [
        mk.train(
            model, processor, records, config,
            recipe=recipe_for(method, batch_size=size, accumulate=4 // size, **steps),
            arguments=plain, progress=False,
        )
        for size in (4, 1, 2)
    ]  # fmt: skip
    for kind in {name.rpartition(".")[2] for name in before}:
        whole, *others, old = (
            torch.cat([x.flatten() for name, x in of.items() if name.endswith(kind)])
            for of in (*(dict(x.named_parameters()) for x in made), before)
        )
        # A scale's gradient is a sum over C terms, about sqrt(C) times smaller than they are.
        cancellation = 32**0.5 if kind == "scale" else 1.0
        allowed = ROUNDINGS * cancellation * (whole - old).norm() + EPS * old.norm()
        for other in others:
            assert (other - whole).norm() <= allowed < (whole - old).norm(), kind


def test_a_finished_training_is_left_alone(model, processor, records, tmp_path):
    """Also where it was killed between its last checkpoint and its end, and with the best one before it."""
    arguments = {"lr_scheduler_type": "constant"}
    recipe = recipe_for("mimic", batch_size=1, learning_rate=2.0)  # ends within an epoch
    others = [Demonstration(x.images, x.text, "what is it what is it") for x in demonstrations(records)]
    options = {"recipe": recipe, "progress": False, "arguments": arguments, "validation": others}
    whole = mk.train(model, processor, records, mk.MimICConfig(), out=tmp_path / "out", **options)
    options |= {"out": tmp_path / "out", "resume": True}
    files = {x: x.read_bytes() for x in (tmp_path / "out").rglob("*") if x.is_file()}
    for _ in range(2):
        assert_same(mk.train(model, processor, records, mk.MimICConfig(), **options), whole)
    assert files == {x: x.read_bytes() for x in (tmp_path / "out").rglob("*") if x.is_file()}
    with pytest.raises(ValueError, match=r"trained with arguments \{'lr_scheduler_type': 'constant'\}"):
        mk.train(model, processor, records, mk.MimICConfig(), **(options | {"arguments": {}}))
    names = ["training.json", "mmicl_adapter.safetensors", "mmicl_adapter.json"]
    for count in (1, 3):  # what a kill leaves, in the order of their writing
        for name in names[:count]:
            (options["out"] / name).unlink()
        options["out"] = options["out"].rename(tmp_path / f"moved{count}")
        assert_same(mk.train(model, processor, records, mk.MimICConfig(), **options), whole)
        again = {x.name: x.read_bytes() for x in options["out"].glob("mmicl*")}
        assert again == {
            x.name: files[x] for x in files if x.parent == tmp_path / "out" and "mmicl" in x.name
        }


def test_what_decides_the_adapter_cannot_change(model, processor, records, tmp_path):
    options = {"recipe": recipe_for("live"), "progress": False, "out": tmp_path / "out"}
    with pytest.raises(Killed):
        mk.train(model, processor, records, mk.LIVEConfig(), callbacks=[Kill(3)], **options)
    options["resume"] = True
    changed = records.read_text().replace('"answer": "blue"', '"answer": "red"', 1)
    (records.parent / "changed.jsonl").write_text(changed)
    for change, message in [
        ({"records": records.parent / "changed.jsonl"}, "trained with examples"),
        ({"arguments": {"learning_rate": 0.5}}, r"trained with arguments \{\}, expected \{'learning_rate'"),
        ({"draw": RandomShots(replacement=True)}, "trained with draw RandomShots"),
        ({"validation": records}, "trained with examples"),
        ({"config": mk.LIVEConfig(ce_weight=0.25)}, "trained with config"),
        ({"processor": mk.PromptBuilder(processor)}, "trained with prompt"),
    ]:
        given = {"records": records, "config": mk.LIVEConfig(), "processor": processor} | change
        with pytest.raises(ValueError, match=message):
            mk.train(model, **given, **{x: y for x, y in options.items() if x not in given})
    (last_checkpoint(options["out"]) / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="expected optimizer.pt too"):
        mk.train(model, processor, records, mk.LIVEConfig(), **options)


def test_an_adapter_is_not_written_over(model, processor, records, tmp_path):
    mk.create(model, mk.MimICConfig()).save_pretrained(tmp_path)
    before = (tmp_path / "mmicl_adapter.safetensors").read_bytes()
    for resume, message in ((False, "has an adapter or a training already"), (True, "no training.json")):
        with pytest.raises(ValueError, match=message):
            mk.train(
                model, processor, records, mk.LIVEConfig(), out=tmp_path, resume=resume, progress=False,
                recipe=recipe_for("live"),
            )  # fmt: skip
    assert (tmp_path / "mmicl_adapter.safetensors").read_bytes() == before


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_the_same(model, processor, records, method, tmp_path):
    """Shuffled queries, with demonstrations of their epoch, from the middle of an epoch."""
    recipe = recipe_for(method, steps=8, batch_size=2, accumulate=2, shuffle=True)
    options = {"recipe": recipe, "progress": False, "seed": 1, "validation": records}
    whole = mk.train(model, processor, records, CONFIGS[method], out=tmp_path / "whole", **options)
    options["out"] = tmp_path / "killed"
    with pytest.raises(Killed):
        mk.train(model, processor, records, CONFIGS[method], callbacks=[Kill(5)], **options)
    assert handle_of(model) is None and last_checkpoint(options["out"]).name == "checkpoint-4"
    with pytest.raises(ValueError, match="has an adapter or a training already: expected resume=True"):
        mk.train(model, processor, records, CONFIGS[method], **options)
    with pytest.raises(ValueError, match=r"was trained with seed 1, expected 2"):
        mk.train(model, processor, records, CONFIGS[method], resume=True, **(options | {"seed": 2}))
    again = mk.train(model, processor, records, CONFIGS[method], resume=True, **options)
    assert_same(again, whole)
    logs = [json.loads((tmp_path / x / "training.json").read_text())["log"] for x in ("whole", "killed")]
    losses = [[x["loss"] for x in log if "loss" in x] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_half_written_checkpoint_is_none(model, processor, records, monkeypatch, tmp_path):
    """Killed before the last of its files was there, or was whole: the one before it is the last."""
    recipe = recipe_for("live", steps=6)
    options = {"recipe": recipe, "progress": False, "arguments": {"save_steps": 2}}
    whole = mk.train(model, processor, records, mk.LIVEConfig(), out=tmp_path / "whole", **options)
    options["out"] = tmp_path / "killed"
    save = TrainerState.save_to_json

    def killed(state, path):
        if state.global_step == 4:
            raise Killed
        save(state, path)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(TrainerState, "save_to_json", killed)
        mk.train(model, processor, records, mk.LIVEConfig(), **options)
    files = {x.name for x in (options["out"] / "checkpoint-4").iterdir()}
    written = {x.name for x in (tmp_path / "whole" / "checkpoint-4").iterdir()}
    assert files == written - {"trainer_state.json"}, "it is the last one"
    (options["out"] / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 1.')
    assert last_checkpoint(options["out"]).name == "checkpoint-2"
    again = mk.train(model, processor, records, mk.LIVEConfig(), resume=True, **options)
    assert_same(again, whole)
    assert last_checkpoint(options["out"]).name == "checkpoint-6"
    assert last_checkpoint(tmp_path / "nothing") is None


def test_the_best_checkpoint_is_the_result(model, processor, records, tmp_path):
    """The least cross-entropy of the validation's answers, whose words are never learnt."""
    others = [Demonstration(x.images, x.text, "what is it what is it") for x in demonstrations(records)]
    recipe = recipe_for("mimic", learning_rate=2.0)
    options = {"recipe": recipe, "progress": False, "out": tmp_path / "out"}
    config = mk.MimICConfig(alignment="mean_square")
    adapter = mk.train(model, processor, records, config, validation=others, **options)
    log = logged(tmp_path / "out")
    found = {x["step"]: x["eval_ce"] for x in log if "eval_ce" in x}
    best = min(found, key=found.get)
    assert len(found) == 5 and best != 5, "otherwise the last one is the best, and nothing is shown"
    assert_same(adapter, mk.load(tmp_path / "out" / f"checkpoint-{best}", model))

    collate = EpisodeCollator(builder_of(processor), mk.Records(records), 2)
    module = TrainedModule(model, adapter).eval()
    with torch.no_grad():
        whole = module(**collate(others).arguments())
    module.handle.detach()
    for name, value in whole.items():
        (found,) = [x[f"eval_{name}"] for x in log if "eval_ce" in x and x["step"] == best]
        assert found == pytest.approx(float(value), rel=ROUNDINGS), name


def logged(folder):
    return json.loads((folder / "training.json").read_text())["log"]


def test_evaluations_do_not_depend_on_their_batches(model, processor, records, tmp_path):
    """Of which the answers' tokens and the queries' are other shares."""
    losses = []
    for size in (1, 5):
        mk.train(
            model, processor, records, mk.MimICConfig(align_weight=1e7), out=tmp_path / str(size),
            validation=records, recipe=recipe_for("mimic", steps=2), progress=False,
            arguments={"per_device_eval_batch_size": size},
        )  # fmt: skip
        losses.append([x for x in logged(tmp_path / str(size)) if "eval_loss" in x][-1])
    for name in ("eval_loss", "eval_align", "eval_ce"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=ROUNDINGS), name
    assert losses[0]["eval_align"] * 1e7 > 0.1 * losses[0]["eval_loss"], "a part that shows"


def test_the_logged_parts_are_those_of_the_loss(model, processor, records, tmp_path):
    """Where an epoch's last update has fewer batches, and a line of the log several updates."""
    mk.train(
        model, processor, list(mk.Records(records))[:7], mk.MimICConfig(align_weight=1e7),
        out=tmp_path / "out", recipe=recipe_for("mimic", steps=5, batch_size=2, accumulate=3), progress=False,
        arguments={"logging_steps": 2},
    )  # fmt: skip
    lines = [x for x in logged(tmp_path / "out") if "loss" in x]
    assert [x["step"] for x in lines] == [2, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(1e7 * line["align"] + 0.5 * line["ce"], rel=ROUNDINGS)


def test_a_gradient_that_is_not_finite_stops(model, processor, records):
    def spoil(module, args, output):
        if output.logits.requires_grad:
            output.logits.register_hook(lambda x: x * math.inf)

    handle = model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 0"):
        mk.train(model, processor, records, mk.LIVEConfig(), recipe=recipe_for("live"), progress=False)
    handle.remove()


def test_the_model_is_left_as_it_was(model, processor, records):
    def state():
        flags = {n: (x.requires_grad, x.data_ptr()) for n, x in model.named_parameters()}
        modes = {n: (x.training, type(x)) for n, x in model.named_modules()}
        checkpointed = [getattr(x, "gradient_checkpointing", None) for x in model.modules()]
        hooks = [x for module in model.modules() for x in (*module._forward_hooks.values(),)]
        hooks = [x.__qualname__ for x in hooks if "capturing_hook" not in x.__qualname__]
        grads = [x.grad is None for x in model.parameters()]
        draws = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return flags, modes, checkpointed, hooks, grads, draws, model.config.use_cache

    model.get_input_embeddings().weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.config.use_cache = True
    model.model.language_model.train()
    before = state()
    recipe, checkpointing = recipe_for("live"), {"gradient_checkpointing": True}
    options = {"recipe": recipe, "progress": False}
    plain = mk.train(model, processor, records, mk.LIVEConfig(), **options)
    assert state() == before
    cheaper = mk.train(model, processor, records, mk.LIVEConfig(), arguments=checkpointing, **options)
    assert state() == before and handle_of(model) is None
    assert_same(plain, cheaper)
    with pytest.raises(Killed):
        mk.train(model, processor, records, mk.LIVEConfig(), callbacks=[Kill(1)], **options)
    assert state() == before and handle_of(model) is None


def test_bf16(model, processor, records):
    options = {"recipe": recipe_for("mimic"), "progress": False}
    exact = mk.train(model, processor, records, mk.MimICConfig(), **options)
    rounded = mk.train(model, processor, records, mk.MimICConfig(), arguments={"bf16": True}, **options)
    half = tiny_again().bfloat16()
    loaded = mk.train(half, processor, records, mk.MimICConfig(), **options)
    for x, y, z in zip(exact.parameters(), rounded.parameters(), loaded.parameters(), strict=True):
        assert y.dtype == z.dtype == torch.float32
        # AdamW's updates are as large as the rate, whatever the gradient's size: of five, none is far off.
        for other in (y, z):
            assert not torch.equal(x, other) and (x - other).abs().max() <= 5 * SHORT.learning_rate


def test_demonstrations_are_drawn_anew_each_epoch(model, processor, records):
    asked = []

    def draw(pool, query, shots, generator):
        asked.append((query.id, int(torch.randint(1000, (), generator=generator))))
        return range(shots)

    mk.train(
        model, processor, records, mk.LIVEConfig(), draw=draw, progress=False, validation=records,
        recipe=recipe_for("live", steps=9, batch_size=4), arguments={"eval_steps": 3, "save_steps": 3},
    )  # fmt: skip
    names = [f"r{i}" for i in range(12)]
    passes = [asked[i : i + 12] for i in range(0, len(asked), 12)]
    assert [[name for name, _ in x] for x in passes] == [names] * 6
    training, validation = passes[::2], passes[1::2]
    assert training[0] != training[1] != training[2] and validation == [training[0]] * 3


def test_examples_of_any_kind(model, processor, records):
    """A path, rows, Records, demonstrations and drawn episodes are the same examples."""
    rows = [json.loads(x) for x in records.read_text().splitlines()]
    for row in rows:
        row["image"] = str(records.parent / row["image"])
    of = mk.Records(records)
    options = {"recipe": recipe_for("live", steps=2), "progress": False, "draw": lambda *_: [0, 1]}
    made = [
        mk.train(model, processor, x, mk.LIVEConfig(), **options)
        for x in (records, str(records), rows, of, demonstrations(records))
    ]
    for other in made[1:]:
        assert_same(other, made[0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"recipe": "fast"},
            ValueError,
            r"recipe is 'fast', expected one of mimic, live, m2iv, aim, prompt_tuning, hificl, stave, mimic-",
        ),
        ({"recipe": 3}, TypeError, "recipe is a int, expected a Recipe or its name"),
        ({"shots": -1}, ValueError, "shots is -1, expected at least 0"),
        ({"shots": 12}, ValueError, "the pool has 12 examples, 11 of them others than the query"),
        ({"shots": (1, 2)}, ValueError, r"shots is \(1, 2\), expected a number for method 'live'"),
        (
            {"shots": (0, 1), "config": mk.AIMConfig()},
            ValueError,
            r"shots is \(0, 1\), expected at least 1 for method 'aim'",
        ),
        ({"seed": -1}, ValueError, "seed is -1, expected 0 to"),
        ({"seed": None}, TypeError, "seed is None, expected an integer"),
        (
            {"arguments": {"label_smoothing_factor": 0.1}},
            ValueError,
            "label_smoothing_factor is 0.1, expected 0",
        ),
        ({"records": [Demonstration((), "what?", "")]}, ValueError, "records, .*answer is '', expected"),
        (
            {"records": [{"image": b"no", "text": x, "answer": "red"} for x in "ab"], "shots": 1},
            ValueError,
            r"no image that Pillow knows .*\[\['[01]', '[01]'\]",
        ),
        ({"steps": 0}, ValueError, "steps is 0, expected at least 1"),
        ({"steps": 1.5}, TypeError, "steps is 1.5, expected an integer"),
        ({"arguments": {"lr": 1}}, ValueError, r"arguments has \['lr'\], expected fields of transformers"),
        ({"config": "mimic"}, TypeError, "config is a str, expected one of MimICConfig, M2IVConfig"),
        ({"records": []}, ValueError, "records is empty, expected at least one example"),
        ({"validation": []}, ValueError, "validation is empty, expected at least one example"),
        ({"processor": "llava"}, TypeError, "processor is a str, expected one with an image_token"),
        (
            {"records": [{"image": [], "text": "what?", "answer": " "}]},
            ValueError,
            "records, id 0: answer is ' ', expected one with tokens",
        ),
        (
            {"validation": [{"image": [], "text": "<image>?", "answer": "red"}]},
            ValueError,
            "validation, id 0: text '<image>[?]' has '<image>', expected no special token",
        ),
    ],
)
def test_errors(model, processor, records, change, error, message):
    given = {"processor": processor, "records": records, "config": mk.LIVEConfig(), "steps": 1} | change
    with pytest.raises(error, match=message):
        mk.train(model, progress=False, **given)
    assert handle_of(model) is None
    attach(model, mk.create(model, mk.LIVEConfig())).detach()


def test_a_loss_that_is_not_finite_stops(model, processor, records, tmp_path):
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0, expected finite"):
        mk.train(
            model, processor, records, mk.LIVEConfig(), out=tmp_path / "out",
            recipe=recipe_for("live"), progress=False,
        )  # fmt: skip
    assert last_checkpoint(tmp_path / "out") is None


@pytest.mark.parametrize(
    "change, error",
    [
        ({"epochs": 0}, ValueError), ({"epochs": "3"}, TypeError), ({"warmup": 1.5}, ValueError),
        ({"learning_rate": math.nan}, ValueError), ({"clip": -1}, ValueError),
        ({"batch_size": True}, TypeError),
        ({"accumulate": 0}, ValueError), ({"shots": (3, 1)}, ValueError), ({"shots": (1, 2, 3)}, ValueError),
        ({"shots_per_pass": 0}, ValueError), ({"weight_decay": None}, TypeError),
    ],
)  # fmt: skip
def test_recipes_are_checked(change, error):
    ((name, value),) = change.items()
    with pytest.raises(error, match=f"{name} is "):
        Recipe(**change)
    assert json.loads(json.dumps(Recipe().description()))["shots"] == 8


def test_recipes_name_templates_that_exist():
    from mmicl_kernels.data.prompts.presets import PRESETS

    assert set(ADAPTERS) <= RECIPES.keys()
    assert all(x.template in {None, *PRESETS} for x in RECIPES.values())


def test_one_process_has_one_device(model, processor, records, tmp_path):
    """nn.DataParallel, which a Trainer makes of several, has copies that call the first one's model."""
    training = Training.of(model, processor, records, mk.LIVEConfig(), recipe=recipe_for("live"))
    arguments = training.arguments({}, tmp_path, kept=False, progress=False)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2
    with training.module() as module:
        trainer = training._trainer(module, arguments, {}, ())
        assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == SHORT.batch_size
        trainer.train()
        assert trainer.model_wrapped is module


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_bases(processor, records, monkeypatch, tmp_path, method, kind):
    """The same updates as written out, with checkpointed layers or without, and the base as it was."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    # Its kernel for some CPUs has no gradient where there is a bias, and wants wider layers.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    tiny_again().save_pretrained(tmp_path / "model")
    config = mk.MimICConfig(align="layer") if method == "mimic" else CONFIGS[method]
    config = mk.M2IVConfig(synergy_weight=0) if method == "m2iv" else config
    recipe = recipe_for(method)

    def trained(model, **arguments):
        return mk.train(
            model, processor, records, config, recipe=recipe, seed=3, progress=False, arguments=arguments
        )

    model = load_model(tmp_path / "model", dtype="float32", device="cpu", quantization=kind)
    before = {name: x.clone() for name, x in model.named_parameters()}
    assert any(x.dtype in (torch.uint8, torch.int8) for x in before.values())
    adapter = trained(model)
    assert_same(adapter, written_out(model, processor, records, config, recipe, 3))
    if method != "mimic" or GradientCheckpointingLayer.__call__ is torch.nn.Module.__call__:
        assert_same(adapter, trained(model, gradient_checkpointing=True))
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    plain = trained(tiny_again())
    for x, y in zip(adapter.parameters(), plain.parameters(), strict=True):
        assert x.dtype == torch.float32 and x.isfinite().all() and not torch.equal(x, y)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dataloader_drop_last": True}, "dataloader_drop_last is True, expected False: every query"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches is True, expected False"),
        ({"train_sampling_strategy": "group_by_length"}, "is 'group_by_length', expected 'random' or"),
    ],
)
def test_other_orders_of_queries_are_refused(model, processor, records, arguments, message):
    options = {"recipe": recipe_for("live"), "progress": False, "arguments": arguments}
    with pytest.raises(ValueError, match=message):
        mk.train(model, processor, records, mk.LIVEConfig(), **options)
    assert handle_of(model) is None


def test_the_readme_s_first_line(model, processor, records, monkeypatch):
    text = (Path(mk.__file__).parent / "training" / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("shots=8", "shots=2, steps=1")
    monkeypatch.chdir(records.parent)
    names = {"mk": mk, "model": model, "processor": processor}
    exec(block, names)
    assert_same(names["adapter"], mk.load("adapters/vqa", model))
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert list(Path(mk.__file__).parent.rglob(name)), name
