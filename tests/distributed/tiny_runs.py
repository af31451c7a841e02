"""``mk.train`` of a tiny model, in one process or in two; as a script, what ``accelerate launch`` starts.

The script is called with a folder, the records and a case: each process saves its adapter in the folder.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import mmicl_kernels as mk
from mmicl_kernels.models.anchors import find_anchors
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training.recipes import Recipe
from tests.distributed.short_training import assert_same_steps

CONFIGS = {
    "mimic": mk.MimICConfig(),
    "live": mk.LIVEConfig(),
    "m2iv": mk.M2IVConfig(synergy_weight=0.0),  # synergy is no mean: see the README
    "aim": mk.AIMConfig(),
    "prompt_tuning": mk.PromptTuningConfig(std=1.0),
}
# Four queries in each update, if they are not left over.
TOGETHER = Recipe(steps=3, batch_size=4, accumulate=1, shots=2, warmup=0.0)
# An update is as exact as its gradient: descent, and AdamW whose epsilon is as large as the gradients.
DESCENT = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
ADAM = {"adam_epsilon": 1.0}
CASES = {
    "one_step": (replace(TOGETHER, steps=1, learning_rate=0.5), DESCENT),
    "adam": (replace(TOGETHER, learning_rate=0.5, weight_decay=0.1), ADAM),
    "in_order": (replace(TOGETHER, learning_rate=0.5, shuffle=False), ADAM),
    "accumulated": (replace(TOGETHER, learning_rate=0.5, accumulate=2), ADAM),
}


def model_for():
    torch.manual_seed(0)
    return tiny_model("llava-llama")


def tiny_training(records, method, case, *, processes=1, model=None, **options):
    """The adapter; ``processes`` share the batches of ``case``."""
    model, processor = model or model_for(), tiny_processor("llava", chat=True)
    recipe, arguments = CASES[case] if isinstance(case, str) else case
    recipe = replace(recipe, batch_size=recipe.batch_size // processes)
    if method == "aim":
        recipe = replace(recipe, shots=(1, 2))
    options = {"config": CONFIGS[method], "progress": False, **options}
    arguments = {**arguments, **options.pop("arguments", {})}
    return mk.train(model, processor, records, recipe=recipe, arguments=arguments, **options)


def assert_sharded(model, adapter):
    """Half of the model's bytes are here, by layers, and the whole adapter."""
    whole = local = odd = 0
    for name, x in model.named_parameters():
        assert isinstance(x, DTensor), name
        whole, local = whole + x.nbytes, local + x.to_local().nbytes
        # Rows that two processes cannot share evenly.
        odd += x[0].nbytes if len(x) % 2 else 0
    assert abs(local - whole / 2) <= odd / 2 < 0.01 * whole
    assert all(isinstance(anchor.layer, FSDPModule) for anchor in find_anchors(model))
    assert not any(isinstance(x, DTensor) for x in adapter.parameters())


def start_of(method):
    model = model_for()
    torch.manual_seed(0)
    return mk.create(model, CONFIGS[method])


def assert_same_run(actual, expected, method, steps=3):
    assert_same_steps(actual, expected, start_of(method), steps)


def of_both(folder, case):
    return [mk.load(folder / f"{case}{rank}", tiny_model("llava-llama")) for rank in range(2)]


def log_of(folder):
    return json.loads((folder / "training.json").read_text())["log"]


def launch(options, folder, *arguments):
    """This file in two processes, by accelerate's command."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2",
        "--main_process_port", "0", __file__, folder, *arguments,
    ]  # fmt: skip
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    folder, records, method, case = sys.argv[1:]
    model, rank = model_for(), os.environ["RANK"]
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and rank != "0":  # by default from_pretrained reads the weights in the first process alone
        model.load_state_dict({name: torch.zeros_like(x) for name, x in model.state_dict().items()})
    adapter = tiny_training(records, method, case, processes=2, model=model, out=Path(folder) / "out")
    adapter.save_pretrained(Path(folder) / f"rank{rank}")
    if sharded:
        assert_sharded(model, adapter)
