"""Every method on every task, without demonstrations: ``python -m benchmarks.experiments.digits.measure``.

Writes ``results.json`` after every adapter and trains only those that it lacks; ``--split validation`` is
what the recipes below were chosen on.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import mmicl_kernels as mk
from benchmarks.experiments.digits import data
from benchmarks.experiments.digits.evaluate import Accuracy, accuracy, adapted_prompts
from benchmarks.experiments.digits.model import WEIGHTS, load_model
from benchmarks.experiments.digits.train import RECIPE, train_adapter

RESULTS = Path(__file__).with_name("results.json")
SEEDS = (0, 1, 2)
SHOTS = (0, 1, 4, 8, 16)


@dataclass(frozen=True)
class Setting:
    """A row of a table: a method, how it is trained, and for which tasks."""

    name: str
    config: object
    recipe: mk.Recipe
    tasks: tuple[str, ...] = data.TASKS


# Demonstrations do not teach this model "mixed", so there is no teacher to follow there: answers only.
TAUGHT = replace(RECIPE, shots=16)
MANY = replace(RECIPE, shots=64, shots_per_pass=16)
STAVE_RATE = 2e-2  # of 5e-3, 2e-2 on validation scans
SYNERGY = mk.M2IVConfig(synergy_weight=0.1, synergy_of="token")
UNTAUGHT = {"recipe": replace(RECIPE, steps=1000, shots=1), "tasks": ("mixed",)}
SETTINGS = {
    "mimic": Setting("MimIC", mk.MimICConfig(), RECIPE),
    "live": Setting("LIVE", mk.LIVEConfig(), TAUGHT),
    "m2iv": Setting("M2IV", SYNERGY, TAUGHT),
    "hificl": Setting("HiFICL", mk.HiFICLConfig(), replace(RECIPE, shots=0)),
    "prompt_tuning": Setting("Prompt tuning", mk.PromptTuningConfig(), replace(RECIPE, shots=0)),
    "stave": Setting("STAVE", mk.STAVEConfig(), replace(RECIPE, shots=1, learning_rate=STAVE_RATE)),
    "m2iv-64": Setting("M2IV, teacher of 64 in 4 passes", SYNERGY, MANY),
    "mixed-live": Setting("LIVE", mk.LIVEConfig(kl_weight=0, ce_weight=1), **UNTAUGHT),
    "mixed-m2iv-synergy": Setting(
        "M2IV, synergy 0.1", replace(SYNERGY, mimicry_weight=0, ce_weight=1), **UNTAUGHT
    ),
    "mixed-m2iv": Setting(
        "M2IV, no synergy", mk.M2IVConfig(mimicry_weight=0, synergy_weight=0, ce_weight=1), **UNTAUGHT
    ),
    "mixed-mimic": Setting("MimIC", mk.MimICConfig(align_weight=0, ce_weight=1), **UNTAUGHT),
    "mixed-hificl": Setting("HiFICL", mk.HiFICLConfig(), **UNTAUGHT),
    "mixed-stave": Setting(
        "STAVE",
        mk.STAVEConfig(demonstrations_weight=0),
        replace(UNTAUGHT["recipe"], learning_rate=STAVE_RATE),
        UNTAUGHT["tasks"],
    ),
    "mixed-prompt_tuning": Setting("Prompt tuning", mk.PromptTuningConfig(), **UNTAUGHT),
}


def measure(model: nn.Module, split: str, settings: Sequence[str], seeds: Sequence[int], out: Path) -> dict:
    """Add to the results in ``out`` what they lack: accuracies by shots, and by setting, seed and task."""
    results = json.loads(out.read_text()) if out.exists() else {}
    _check_same(results, {"split": split, "weights": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()}, out)
    results.setdefault("torch", torch.__version__)
    results.setdefault("plain", {})
    results.setdefault("adapted", {})
    for shots in SHOTS:
        row = results["plain"].setdefault(str(shots), {})
        for task in data.WORDS:
            if task not in row:
                row[task] = _rate(accuracy(model, task, shots, split))
    todo = [(name, seed, task) for seed in seeds for name in settings for task in SETTINGS[name].tasks]
    for name, seed, task in tqdm(todo, desc="adapters", unit="adapter"):
        setting = SETTINGS[name]
        row = results["adapted"].setdefault(name, {})
        _check_same(row, {"config": asdict(setting.config), "recipe": setting.recipe.description()}, name)
        row.setdefault("seconds", {})
        row.setdefault("seeds", {})
        measured = row["seeds"].setdefault(str(seed), {})
        if task in measured:
            continue
        start = time.perf_counter()
        adapter = train_adapter(
            model, task, config=setting.config, recipe=setting.recipe, seed=seed, progress=False
        )
        row["seconds"][f"{task}, seed {seed}"] = round(time.perf_counter() - start, 1)
        with mk.attach(model, adapter) as handle:
            measured[task] = _rate(accuracy(model, task, 0, split, ask=partial(adapted_prompts, handle)))
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _check_same(results: dict, facts: dict, where: object) -> None:
    """Note ``facts``, or raise ValueError if what was measured before had others."""
    for key, value in facts.items():
        if results.setdefault(key, value) != value:
            raise ValueError(f"{where}: {key} is {results[key]!r} in the results, expected {value!r}")


def _rate(measured: Accuracy) -> float:
    return round(measured.value, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small to share out
    measure(load_model(), arguments.split, arguments.settings, arguments.seeds, arguments.out)


if __name__ == "__main__":
    main()
