"""`mmicl train`: an adapter for a model of one's own, out of a file of examples."""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from mmicl_kernels.cli.models import add_import, import_modules
from mmicl_kernels.cli.printing import complain
from mmicl_kernels.cli.shell import reported

if TYPE_CHECKING:  # torch is imported when the command runs
    from collections.abc import Sequence

    import torch

    from mmicl_kernels.data import Record, Records
    from mmicl_kernels.training.recipes import Recipe
    from mmicl_kernels.training.run import Training

# Of the recipe, by the option's name.
RECIPE = (
    "epochs",
    "steps",
    "batch_size",
    "accumulate",
    "learning_rate",
    "shots_per_pass",
    "shared_shots",
    "template",
)


def add_parser(commands: Any) -> None:
    """Add `train` to the subparsers of `mmicl`."""
    train = commands.add_parser(
        "train",
        help="train an adapter on a file of your own examples",
        description="Each line of the data is JSON: image, text, answer (mmicl data converts benchmarks'). "
        "What is not given is the recipe's. An interrupted run goes on with --resume. On several GPUs: "
        "accelerate launch -m mmicl_kernels.cli train ...",
    )
    train.add_argument("--model", required=True, metavar="PATH", help="of the model and its processor")
    add_import(train)
    train.add_argument("--data", required=True, metavar="FILE", help="queries and demonstrations, JSON lines")
    train.add_argument("--out", metavar="FOLDER", help="of the adapter and its checkpoints")
    train.add_argument(
        "--method", metavar="NAME", help="mimic, live, m2iv, aim; needed unless --recipe names one"
    )
    train.add_argument(
        "--recipe", "--preset", metavar="NAME", help="mimic-vqa-idefics2, ...: as a paper's code"
    )
    train.add_argument("--dry-run", action="store_true", help="print an episode, its tokens and the cost")
    train.add_argument("--resume", action="store_true", help="go on where a run with this --out was killed")
    train.add_argument("--validation", metavar="FILE", help="other examples, which choose the checkpoint")
    train.add_argument("--images", metavar="FOLDER", help="where the images are (default: beside the data)")
    train.add_argument("--skip-bad", action="store_true", help="leave out bad lines, and count them")
    train.add_argument("--seed", type=int, default=0)

    prompts = train.add_argument_group("prompts")
    prompts.add_argument("--shots", metavar="N", help="demonstrations; for aim also LOW-HIGH")
    prompts.add_argument("--shots-per-pass", type=int, metavar="N", help="of them in one prompt, at most")
    prompts.add_argument(
        "--shared-shots", action="store_true", default=None, help="all queries of a batch have the same ones"
    )
    prompts.add_argument("--template", help='"chat", a preset, or a format (default: the chat template)')
    prompts.add_argument("--instruction", metavar="TEXT", help="what prompts begin with")
    prompts.add_argument("--image-marker", metavar="TEXT", help="of an image (default: the chat template's)")

    updates = train.add_argument_group("updates")
    length = updates.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="updates")
    length.add_argument("--epochs", type=float, metavar="N", help="passes over the data")
    updates.add_argument("--batch-size", type=int, metavar="N", help="queries at once, in each process")
    updates.add_argument("--accumulate", type=int, metavar="N", help="batches for one update")
    updates.add_argument("--learning-rate", "--lr", type=float, metavar="X")
    updates.add_argument("--bf16", action="store_true", help="autocast")
    updates.add_argument("--fp16", action="store_true", help="autocast, with a scaled loss")
    updates.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    updates.add_argument("--dtype", default="auto", help="of the model: bfloat16, ... (default: its own)")
    updates.add_argument("--quantization", choices=("4bit", "8bit"), help="of the model, by bitsandbytes")
    updates.add_argument("--workers", type=int, default=0, metavar="N", help="processes that make batches")

    others = train.add_argument_group("others")
    others.add_argument(
        "--config", action="append", default=[], metavar="NAME=VALUE", help="of the method: align_weight=0.02"
    )
    others.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a field of transformers.TrainingArguments: report_to=wandb",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Train and return the exit code; an error is one line on stderr."""
    from safetensors import SafetensorError

    expected = (
        OSError,
        ValueError,
        TypeError,
        ImportError,
        FloatingPointError,
        RuntimeError,
        SafetensorError,
    )
    return reported("mmicl train", lambda: _train(options), expected)


def _train(options: argparse.Namespace) -> int:
    from mmicl_kernels.training.arguments import require_accelerate, training_arguments
    from mmicl_kernels.training.preview import preview

    require_accelerate()
    import_modules(options)
    given, config, recipe = _arguments(options), _config(options), _recipe(options)
    if options.out is None and not options.dry_run:
        raise ValueError("--out is missing, expected a folder, or --dry-run")
    # What is wrong with these is said first: a model takes minutes to load.
    validated = options.validation is not None
    training_arguments(recipe, given, options.out or "", kept=True, validated=validated, seed=options.seed)
    training = _training(options, config, recipe)
    if options.dry_run:
        print(preview(training, given))
        return 0
    try:
        adapter = training.run(options.out, resume=options.resume, arguments=given)
    except Exception:
        print(file=sys.stderr)  # a progress bar has not ended its line
        raise
    if _is_main_process():
        print(f"{options.out}: {type(adapter).__name__}, {adapter.num_parameters():,} parameters")
    return 0


def _device() -> torch.device:
    """This process's, of those that accelerate started."""
    from accelerate import PartialState

    return PartialState().device


def _is_main_process() -> bool:
    """Whether this is the first of the processes that accelerate started, or the only one."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _training(options: argparse.Namespace, config: object, recipe: Recipe) -> Training:
    from mmicl_kernels.data import Records
    from mmicl_kernels.data.prompts.builder import PromptBuilder, builder_of
    from mmicl_kernels.models.pretrained import load_model, load_processor
    from mmicl_kernels.training.run import Training

    files = [Path(x) for x in (options.data, options.validation) if x is not None]
    records = [Records(x, options.images, skip_bad=options.skip_bad) for x in files]
    if options.skip_bad:
        records = [_good(path, found) for path, found in zip(files, records, strict=True)]
    processor = load_processor(options.model)
    settings = {"instruction": options.instruction, "image_marker": options.image_marker}
    builder = builder_of(processor)
    if recipe.template is not None or any(settings.values()):
        builder = PromptBuilder(processor, recipe.template or builder.template, **settings)
    model = load_model(
        options.model, dtype=options.dtype, device=_device(), quantization=options.quantization
    )
    others = records[1] if options.validation is not None else None
    return Training.of(
        model, builder, records[0], config, recipe=recipe, validation=others, seed=options.seed
    )


def _good(path: Path, records: Records) -> Sequence[Record]:
    """Those with an answer to learn; how many others there are is said."""
    missing = sum(1 for x in records if not x.answer.strip())
    if records.skipped or missing:
        bad, without = sum(records.skipped.values()), f" and {missing} without an answer" if missing else ""
        complain("mmicl train", f"{path}: left out {bad} bad lines{without}")
    return [x for x in records if x.answer.strip()] if missing else records


def _recipe(options: argparse.Namespace) -> Recipe:
    from mmicl_kernels.training.recipes import RECIPES, Recipe

    name = options.recipe or options.method
    if options.method is not None and not f"{name}-".startswith(f"{options.method}-"):
        raise ValueError(f"--recipe is {name!r}, expected one of {options.method}'s, as --method says")
    if options.recipe is not None and name not in RECIPES:
        raise ValueError(f"--recipe is {name!r}, expected one of {', '.join(RECIPES)}")
    given = {name: getattr(options, name) for name in RECIPE if getattr(options, name) is not None}
    if options.shots is not None:
        given["shots"] = _shots(options.shots)
    return replace(RECIPES.get(name, Recipe()), **given)


def _shots(text: str) -> int | tuple[int, int]:
    low, dash, high = text.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash)):
        raise ValueError(f"--shots is {text!r}, expected a number, or LOW-HIGH")
    return (int(low), int(high)) if dash else int(low)


def _config(options: argparse.Namespace) -> object:
    """The method's, with what ``--config`` changes, each value of its default's type."""
    from mmicl_kernels.methods import ADAPTERS

    method = options.method or (options.recipe or "").partition("-")[0]
    if method not in ADAPTERS:
        raise ValueError(f"--method is {options.method!r}, expected one of {', '.join(ADAPTERS)}")
    kind = ADAPTERS[method].config_class
    known = {field.name: field for field in fields(kind) if field.init}
    pairs = dict(_pair("--config", text, known) for text in options.config)
    values = {name: _converted("--config", name, x, _type_of(kind, known[name])) for name, x in pairs.items()}
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in values:
            raise ValueError(f"--config {name}=VALUE is missing, {kind.__name__} needs it")
    return kind(**values)


def _type_of(kind: type, field: Field) -> object:
    """Of the field's default; where it has none, what its annotation says."""
    if field.default is not MISSING:
        return type(field.default)
    if field.default_factory is not MISSING:
        return type(field.default_factory())
    try:
        return get_type_hints(kind)[field.name]
    except NameError as error:
        raise ValueError(f"--config {field.name} cannot be given, its type is not known: {error}") from error


def _converted(flag: str, name: str, value: str, kind: object) -> object:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{flag} {name} is {value!r}, expected true or false")
        return value.lower() == "true"
    if kind not in (int, float, str):
        raise ValueError(f"{flag} {name} is a {kind}, expected a field that is a number, a string or a bool")
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{flag} {name} is {value!r}, expected {kind.__name__}") from None


def _pair(flag: str, text: str, known: Any) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{flag} is {text!r}, expected NAME=VALUE")
    if name not in known:
        raise ValueError(f"{flag} is {text!r}, expected one of {', '.join(sorted(known))}")
    return name, value


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``TrainingArguments``; what ``--set`` gives is read as that reads a command line."""
    from transformers import HfArgumentParser, TrainingArguments

    made: dict[str, Any] = {"dataloader_num_workers": options.workers}
    made |= {name: True for name in ("bf16", "fp16") if getattr(options, name)}
    if options.checkpointing:
        made["gradient_checkpointing"] = True
    pairs = dict(_pair("--set", x, TrainingArguments.__dataclass_fields__) for x in options.set)
    if pairs:
        parser = HfArgumentParser(TrainingArguments, exit_on_error=False)
        words = [word for name, value in pairs.items() for word in (f"--{name}", value)]
        try:
            parsed, _ = parser.parse_known_args(words)
        except argparse.ArgumentError as error:
            raise ValueError(f"--set: {error}") from error
        made |= {name: getattr(parsed, name) for name in pairs}
    return made
