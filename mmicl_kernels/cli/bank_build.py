"""`mmicl bank build`: fuse the demonstrations of a file into a bank."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mmicl_kernels.cli.models import add_import, import_modules
from mmicl_kernels.cli.printing import FAILED, complain
from mmicl_kernels.cli.shell import reported

if TYPE_CHECKING:  # torch is imported when the command runs
    from tqdm import tqdm

    from mmicl_kernels.data import Demonstration
    from mmicl_kernels.data.prompts.builder import PromptBuilder
    from mmicl_kernels.methods import Adapter
    from mmicl_kernels.patch import Handle
    from mmicl_kernels.store import DemonstrationBank

DTYPES = ("bfloat16", "float16", "float32", "int8")


def add_parser(actions: Any) -> None:
    """Add `build` to the subparsers of `mmicl bank`."""
    build = actions.add_parser(
        "build",
        help="fuse the demonstrations of a file into it; exit code 1 if a line was bad",
        description="Each line of the data is JSON: image, a file or a list of them, text and answer. If the "
        "text has {image}, once for each of them, they stand there. "
        "Demonstrations that the bank has are not read again, so an interrupted run may be repeated.",
    )
    build.add_argument("folder", help="the bank, made if it does not exist")
    build.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="folder of the model and its processor, or the hub's name",
    )
    add_import(build)
    build.add_argument("--adapter", required=True, metavar="PATH", help="folder that save_pretrained wrote")
    build.add_argument("--data", required=True, metavar="FILE", help="the demonstrations, JSON lines")
    build.add_argument("--images", metavar="FOLDER", help="where the images are (default: beside the data)")
    build.add_argument("--dtype", choices=DTYPES, help="of the stored rows (default: bfloat16)")
    build.add_argument("--batch-size", type=int, default=8, metavar="N", help="at once (default: 8)")
    build.add_argument("--template", help='of a prompt (default: "{image}{text} {answer}")')
    build.add_argument("--image-marker", metavar="TEXT", help="of an image (default: the chat template's)")


def run(options: argparse.Namespace) -> int:
    """Build the bank and return the exit code; an error is one line on stderr, so is each bad line."""
    return reported(
        "mmicl bank build", lambda: _build(options), (OSError, ValueError, TypeError, ImportError)
    )


def _build(options: argparse.Namespace) -> int:
    from mmicl_kernels.data.prompts.builder import PromptBuilder
    from mmicl_kernels.patch import attach

    data = Path(options.data)
    images = data.parent if options.images is None else Path(options.images)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}, expected at least 1")
    for name, path, there in (("--data", data, data.is_file()), ("--images", images, images.is_dir())):
        if not there:
            raise FileNotFoundError(f"{name}: {path} does not exist")
    model, processor, adapter = _load(options)
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    template = {} if options.template is None else {"template": options.template}
    marker, positions = options.image_marker, adapter.embedding_site.positions
    builder = PromptBuilder(
        processor, image_marker=marker, positions=positions, device=device, dtype=dtype, **template
    )
    bank = _bank(options, adapter, builder.description)
    with attach(model, adapter, bank=bank) as handle:
        return _add(handle, builder, data, images, options.batch_size)


def _load(options: argparse.Namespace) -> tuple[Any, Any, "Adapter"]:
    """Model, processor and adapter."""
    from mmicl_kernels.models.pretrained import load_model, load_processor
    from mmicl_kernels.patch import load

    if not Path(options.adapter).exists():
        raise FileNotFoundError(f"--adapter: {options.adapter} does not exist, expected a folder")
    import_modules(options)
    model, processor = load_model(options.model), load_processor(options.model)
    adapter = load(options.adapter, model)
    if not adapter.fuses:
        raise TypeError(
            f"--adapter: {options.adapter} has a {type(adapter).__name__}, expected one that fuses "
            "demonstrations"
        )
    return model, processor, adapter


def _bank(options: argparse.Namespace, adapter: "Adapter", prompt: str) -> "DemonstrationBank":
    import torch

    from mmicl_kernels.store import DemonstrationBank

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        bank = DemonstrationBank(options.folder)
    except FileNotFoundError:
        return DemonstrationBank.create(options.folder, adapter, dtype or torch.bfloat16, prompt)
    if prompt != bank.prompt:
        raise ValueError(f"prompts are made by {prompt}, expected {bank.prompt} as {options.folder} has")
    if dtype not in (None, bank.dtype):
        raise ValueError(f"--dtype is {options.dtype}, expected {bank.dtype} as {options.folder} has")
    return bank


def _add(handle: "Handle", builder: "PromptBuilder", data: Path, images: Path, batch_size: int) -> int:
    from tqdm import tqdm

    bank, counts = handle.bank, Counter()
    before = len(bank)
    quiet = sys.stderr is None
    bar = tqdm(total=data.stat().st_size, desc="building", unit="B", unit_scale=True, disable=quiet)
    with data.open("rb") as file, bar:
        new = _new_demonstrations(file, images, bank, builder, bar, counts)
        while batch := list(islice(new, batch_size)):
            _add_batch(handle, builder, batch, bar, counts)
    added = len(bank) - before
    found = f"{added} added, {counts['good'] - added} known, {counts['bad']} bad lines"
    print(f"{len(bank)} demonstrations: {found}")
    return FAILED if counts["bad"] else 0


def _add_batch(
    handle: "Handle",
    builder: "PromptBuilder",
    batch: list["Demonstration"],
    bar: "tqdm",
    counts: Counter[str],
) -> None:
    """What cannot be aggregated, for instance an image that the processor refuses, is named and counted."""
    try:
        handle.add_demonstrations(batch, builder.demonstrations, batch_size=len(batch), progress=False)
    except ValueError as error:
        if len(batch) > 1:
            for demonstration in batch:
                _add_batch(handle, builder, [demonstration], bar, counts)
            return
        counts["good"] -= 1
        counts["bad"] += 1
        with bar.external_write_mode(file=sys.stderr):
            _complain(f"{batch[0].text!r:.60} {batch[0].answer!r:.60}: {error}")


def _new_demonstrations(
    file: BinaryIO,
    images: Path,
    bank: "DemonstrationBank",
    builder: "PromptBuilder",
    bar: "tqdm",
    counts: Counter[str],
) -> Iterator["Demonstration"]:
    """Those of the file that the bank does not have. Bad lines are named on stderr and counted."""
    from mmicl_kernels.data import parse_line, read_lines, record_of
    from mmicl_kernels.data.decoding import decode_image

    for number, line in read_lines(file):
        bar.update(file.tell() - bar.n)
        try:
            demonstration = record_of(parse_line(line), images, number).demonstration()
            known = bank.find(demonstration) is not None
            if not known:
                builder.check(demonstration)
                for i, image in enumerate(demonstration.images):
                    decode_image(image, f"image {i}")
        except ValueError as error:
            counts["bad"] += 1
            with bar.external_write_mode(file=sys.stderr):
                _complain(f"{file.name}:{number}: {error}")
            continue
        counts["good"] += 1
        if not known:
            yield demonstration


def _complain(message: str) -> None:
    complain("mmicl bank build", message)
