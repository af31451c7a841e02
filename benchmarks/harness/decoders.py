"""What the benchmarks of whole decoders share: the decoder, the file of their rows, the machine's line."""

import json
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.harness.timing import Samples, machine
from benchmarks.run import device_folder


def decoder(
    hidden: int, heads: int, kv_heads: int, layers: int, *, vocabulary: int, dtype: str
) -> MistralForCausalLM:
    """The same frozen weights whenever it is asked for."""
    config = MistralConfig(
        hidden_size=hidden, intermediate_size=7 * hidden // 2 // 32 * 32, vocab_size=vocabulary,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=hidden // heads, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = MistralForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def new_result() -> dict:
    return {"machine": {**machine("cpu"), "transformers": transformers.__version__}, "rows": []}


def path_of(result: dict, out: Path, name: str) -> Path:
    """``out/<device>/<name>.json``, whose folder is there."""
    folder = out / device_folder(result["machine"], "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json"


def save(result: dict, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def machine_line(result: dict, threads: str, made: str) -> str:
    """``made``: by which commit, and when."""
    x = result["machine"]
    return f"{x['cpu']}, {threads}, torch {x['torch']}, transformers {x['transformers']}, {made}"


def made_by(row: dict) -> str:
    return f"commit {row['commit']}, {row['date']}"


def quantiles(samples: Samples) -> list[float]:
    """Median, and the ends of the middle four fifths."""
    return [samples.median, *samples.range]


def shown(ratio: list[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio)
