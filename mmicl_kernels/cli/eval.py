"""`mmicl eval`: a table of zero-shot, k-shot and adapted answers to a file of records."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmicl_kernels.cli.models import add_import, import_modules
from mmicl_kernels.cli.printing import complain
from mmicl_kernels.cli.shell import reported

if TYPE_CHECKING:  # torch is imported when the command runs
    from mmicl_kernels.data import Records
    from mmicl_kernels.evaluation.generation import Generation

METRICS = ("vqa", "okvqa", "caption", "exact", "choice", "yes-no")


def add_parser(commands: Any) -> None:
    """Add `eval` to the subparsers of `mmicl`."""
    parser = commands.add_parser(
        "eval",
        help="score zero-shot, k-shot and adapted answers to a file of records",
        description="Without adapters it shows what demonstrations add, the gap that an adapter could close. "
        "With --out a run that was ended goes on where it was.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="folder of the model and its processor")
    add_import(parser)
    add("--dtype", default="auto", help="of the model: bfloat16, ... (default: its own)")
    add("--quantization", choices=("4bit", "8bit"), help="of the model, by bitsandbytes")
    add("--data", required=True, metavar="FILE", help="what to ask: records, JSON lines")
    add("--skip-bad", action="store_true", help="leave out bad lines of both files, and count them")
    add("--images", metavar="FOLDER", help="where its images are (default: beside it)")
    add("--adapter", action="append", default=[], metavar="[NAME=]FOLDER", help="may be given several times")
    add("--bank", metavar="FOLDER", help="of an AIM adapter, made if it does not exist")
    add("--shots", type=int, nargs="+", default=[0], metavar="K", help="without adapters (default: 0)")
    add("--adapter-shots", type=int, nargs="+", default=[0], metavar="K", help="with them (default: 0)")
    add("--demonstrations", metavar="FILE", help="records to draw from")
    add("--demonstration-images", metavar="FOLDER", help="where their images are (default: beside them)")
    add("--retrieval", choices=("random", "rices"), default="random", help="how they are drawn")
    rices = parser.add_mutually_exclusive_group()
    rices.add_argument(
        "--clip", metavar="FOLDER", help="for rices: a CLIP, whose image features are compared"
    )
    rices.add_argument(
        "--features", metavar="FILE", help="for rices: safetensors, demonstrations and queries"
    )
    add("--metric", choices=METRICS, default="exact", help="(default: exact)")
    add("--auroc", action="store_true", help="with yes-no: also of the probability of yes")
    add("--out", metavar="FOLDER", help="keeps answers, results.json, table.md and scores.png")
    add("--batch-size", type=int, default=8, metavar="N", help="(default: 8)")
    add("--limit", type=int, metavar="N", help="only the first records")
    add("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    _add_generation(parser.add_argument_group("answers, by default greedy"))
    prompts = parser.add_argument_group("prompts, by default as the adapters were trained on, or in a chat")
    prompts.add_argument("--template", help='"chat", a preset such as mimic-idefics2, or a format string')
    prompts.add_argument("--instruction", metavar="TEXT", help="what prompts begin with")
    prompts.add_argument("--image-marker", metavar="TEXT", help="of an image (default: the chat template's)")


def _add_generation(group: Any) -> None:
    group.add_argument("--preset", metavar="NAME", help="a paper's: mimic-vqa, mimic-caption, live-vqa, ...")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: the metric's)")
    group.add_argument("--beams", type=int, metavar="N", help="(default: 1)")
    group.add_argument("--length-penalty", type=float, metavar="X", help="of beams (default: 1)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="where a text is cut; several times")


def run(options: argparse.Namespace) -> int:
    """Evaluate, print the table and return the exit code; an error is one line on stderr."""
    return reported(
        "mmicl eval", lambda: _evaluate(options), (OSError, ValueError, TypeError, ImportError, LookupError)
    )


def _evaluate(options: argparse.Namespace) -> int:
    from mmicl_kernels.evaluation.run import evaluate
    from mmicl_kernels.models.pretrained import load_model, load_processor

    records = _records("data", options.data, "images", options.images, options.skip_bad)
    pool = options.demonstrations and _records(
        "demonstrations",
        options.demonstrations,
        "demonstration-images",
        options.demonstration_images,
        options.skip_bad,
    )
    adapters, generation = _adapters(options.adapter), _generation(options)
    if options.template is None and (options.instruction, options.image_marker) != (None, None):
        raise ValueError("--instruction or --image-marker is given without --template, expected it too")
    import_modules(options)
    processor = load_processor(options.model)
    model = load_model(options.model, dtype=options.dtype, quantization=options.quantization)
    made = evaluate(
        model,
        _prompts(processor, options),
        records,
        adapters=adapters,
        bank=options.bank,
        shots=options.shots,
        adapter_shots=options.adapter_shots,
        demonstrations=pool,
        retrieval=options.retrieval,
        features=_features(options, model),
        metric=options.metric,
        auroc=options.auroc,
        generation=generation,
        out=options.out,
        batch_size=options.batch_size,
        limit=options.limit,
        seed=options.seed,
        progress=sys.stderr is not None,
    )
    print(made)
    return 0


def _records(name: str, file: str, images_name: str, images: str | None, skip_bad: bool) -> "Records":
    from mmicl_kernels.data import Records

    if not Path(file).is_file():
        raise FileNotFoundError(f"--{name}: {file} does not exist")
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"--{images_name}: {images} does not exist")
    records = Records(file, images, skip_bad=skip_bad)
    if records.skipped:
        complain("mmicl eval", f"{file}: left out {sum(records.skipped.values())} bad lines")
    return records


def _adapters(given: list[str]) -> dict[str, str]:
    """Folders by name; without one a folder's own."""
    adapters: dict[str, str] = {}
    for x in given:
        name, found, folder = ("", "", x) if Path(x).is_dir() else x.partition("=")
        folder, name = (folder, name) if found or not name else (name, "")
        name = name or Path(folder).resolve().name
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--adapter: {folder} does not exist, expected a folder, or NAME=FOLDER")
        if name in adapters:
            raise ValueError(f"--adapter: {name} is there twice, expected names that differ: NAME=FOLDER")
        adapters[name] = folder
    return adapters


def _generation(options: argparse.Namespace) -> "Generation":
    from mmicl_kernels.evaluation.generation import GENERATIONS

    name = options.preset or options.metric
    if name not in GENERATIONS:
        raise ValueError(f"--preset is {name!r}, expected one of {', '.join(GENERATIONS)}")
    given = {
        "max_new_tokens": options.max_new_tokens,
        "num_beams": options.beams,
        "length_penalty": options.length_penalty,
        "cut": options.stop and tuple(options.stop),
    }
    return replace(GENERATIONS[name], **{key: x for key, x in given.items() if x is not None})


def _prompts(processor: Any, options: argparse.Namespace) -> Any:
    """The processor, or a builder of the template that is given."""
    from mmicl_kernels.data.prompts.builder import PromptBuilder

    if options.template is None:
        return processor
    marker = options.image_marker
    return PromptBuilder(processor, options.template, instruction=options.instruction, image_marker=marker)


def _features(options: argparse.Namespace, model: Any) -> Any:
    from mmicl_kernels.evaluation.features import ClipImages

    return options.features if options.clip is None else ClipImages(options.clip, model.device)
