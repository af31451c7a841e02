"""``mk.train`` of a tiny model, in one process or in two; as a script, what ``accelerate launch`` starts.

The script is called with a folder, the records and a case: each process saves its adapter in the folder.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training.recipes import Recipe

CONFIGS = {
    "mimic": mk.MimICConfig(),
    "live": mk.LIVEConfig(),
    "m2iv": mk.M2IVConfig(synergy_weight=0.0),  # synergy is no mean: see the README
    "aim": mk.AIMConfig(),
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


def tiny_training(records, method, case, *, processes=1, **options):
    """The adapter; ``processes`` share the batches of ``case``."""
    torch.manual_seed(0)
    model, processor = tiny_model("llava-llama"), tiny_processor("llava", chat=True)
    recipe, arguments = CASES[case] if isinstance(case, str) else case
    recipe = replace(recipe, batch_size=recipe.batch_size // processes)
    if method == "aim":
        recipe = replace(recipe, shots=(1, 2))
    options = {"config": CONFIGS[method], "progress": False, **options}
    arguments = {**arguments, **options.pop("arguments", {})}
    return mk.train(model, processor, records, recipe=recipe, arguments=arguments, **options)


if __name__ == "__main__":
    folder, records, method, case = sys.argv[1:]
    adapter = tiny_training(records, method, case, processes=2, out=Path(folder) / "out")
    adapter.save_pretrained(Path(folder) / f"rank{os.environ['RANK']}")
