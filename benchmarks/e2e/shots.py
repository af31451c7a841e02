"""What demonstrations cost a real-size Idefics2: ``python -m benchmarks.e2e.shots --out FOLDER``.

Prompts with k image-text demonstrations, beside the same number as AIM's fused tokens out of a bank. Random
weights: time and memory do not depend on values. Batch 1; the time to the first token includes ``splice``,
not the demonstrations' aggregation, which happens once and is timed apart. Peak memory is that of the same
forward pass, above what the model itself holds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.e2e.models import SIZES, Prompt, Size, build_model, prompt_inputs
from benchmarks.e2e.run import parsed
from benchmarks.harness.timing import Samples, machine, peak_allocated_bytes
from benchmarks.run import device_folder
from mmicl_kernels.methods.sites import FusedTokens

SHOTS = (0, 1, 2, 4, 8, 16, 32)
TEXT_TOKENS = {"real": 30, "tiny": 2}  # of a demonstration, beside its image
ROUNDS = 10
DTYPE = torch.bfloat16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save JSON and a plot. Returns 0."""
    options = _parse(arguments)
    size = SIZES[options.size]
    model = build_model(size, device=options.device, dtype=DTYPE)
    result = {
        "schema": 1,
        "benchmark": "shots",
        "size": options.size,
        "device": options.device,
        "text_tokens": TEXT_TOKENS[options.size],
        "machine": machine(options.device),
        "command": options.command,
        "rows": [],
    }
    path = options.out / device_folder(result["machine"], options.device) / "shots.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter = mk.create(model, mk.AIMConfig())
    with mk.attach(model, adapter) as handle, torch.no_grad():
        result["aggregate_ms"], tokens = _aggregate(handle, size, options)
        for shots in tqdm(SHOTS, desc="shots", unit="number"):
            for name, inputs in _prompts(handle, size, shots, tokens, options).items():
                measured = _measure(model, inputs, options.device)
                result["rows"].append({"name": name, "shots": shots, **measured})
            path.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, path.with_suffix(".png"))
    print(f"saved {path} and {path.with_suffix('.png')}")
    return 0


def _aggregate(handle: mk.Handle, size: Size, options: argparse.Namespace) -> tuple[float, FusedTokens]:
    """Milliseconds to aggregate one demonstration, and the fused tokens of as many as there are shots."""
    demonstration = _with_images(size, 1, options)
    wanted = torch.zeros_like(demonstration["input_ids"], dtype=torch.bool)
    wanted[:, -TEXT_TOKENS[options.size] :] = True
    samples = _milliseconds(lambda: handle.aggregate(demonstration, wanted), options.device)
    (rows,) = handle.aggregate(demonstration, wanted)
    offsets = torch.arange(max(SHOTS) + 1, device=rows.device) * len(rows)
    return samples.median, FusedTokens(rows.repeat(max(SHOTS), 1), offsets, None)


def _prompts(
    handle: mk.Handle, size: Size, shots: int, tokens: FusedTokens, options: argparse.Namespace
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """What makes the model's inputs, plain and with fused tokens."""
    plain, query = (_with_images(size, images, options) for images in (shots + 1, 1))
    return {
        "plain": lambda: plain,
        "AIM": lambda: handle.splice(query, [list(range(shots))], tokens=tokens),
    }


def _with_images(size: Size, images: int, options: argparse.Namespace) -> dict[str, Tensor]:
    each = size.perceiver["resampler_n_latents"] + TEXT_TOKENS[options.size]
    prompt = Prompt(images - 1, images * each + 1, images)
    return prompt_inputs(size, prompt, device=options.device, dtype=DTYPE)


def _measure(model: nn.Module, inputs: Callable[[], dict[str, Tensor]], device: str) -> dict[str, float]:
    def first_token() -> Tensor:
        return model(**inputs(), logits_to_keep=1).logits

    samples = _milliseconds(first_token, device)
    return {
        "tokens": inputs()["input_ids"].shape[1],
        "first_token_ms": samples.median,
        "first_token_q10_ms": samples.low,
        "first_token_q90_ms": samples.high,
        "peak_bytes": peak_allocated_bytes(first_token, device),
    }


def _milliseconds(call: Callable[[], object], device: str) -> Samples:
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return Samples(tuple(times[1:]))  # the first warms up


def plot(result: dict, path: Path) -> None:
    """Time to the first token and peak memory against demonstrations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    columns = (("first_token_ms", 1.0, "first token (ms)"), ("peak_bytes", 2**20, "peak (MiB)"))
    for axes, (column, unit, label) in zip(panels, columns, strict=True):
        for name in ("plain", "AIM"):
            rows = [row for row in result["rows"] if row["name"] == name]
            axes.plot([row["shots"] for row in rows], [row[column] / unit for row in rows], "o-", label=name)
        axes.set(xlabel="demonstrations", ylabel=label, ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.e2e.shots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="real", help="tiny: to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    return parsed(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
