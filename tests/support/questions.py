"""A tiny model with its processor, questions on disk, and what it answers to them one by one."""

import json

import torch

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from tests.support.example_images import png

QUESTIONS = ["what?", "which is it?", "is this a cat or a dog?", "red or blue?"]
COLOURS = ("red", "blue")
PROCESSORS = {"llava-llama": "llava", "idefics": "idefics", "idefics2": "idefics2"}
NEW_TOKENS = 6


def rows_of(name, count, images=1):
    """Rows of questions of different lengths, with images of different sizes; other names ask others."""
    rows, more = [], "" if name == "q" else " it"
    for i in range(count):
        answer = COLOURS[i % 2]
        shown = [f"{name}{i}-{j}.png" for j in range(images)]
        rows.append({"id": f"{name}{i}", "images": shown, "text": QUESTIONS[i % 4] + more, "answer": answer})
    return rows


def write(folder, name, rows):
    """The file of records, and their images."""
    for i, row in enumerate(rows):
        for image in row["images"]:
            colour = row["answer"] if row["answer"] in COLOURS else "red"
            (folder / image).write_bytes(png(colour, (9 + i, 7)))
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model_and_processor(name="llava-llama", chat=False):
    """Of seeds with which prompts are answered differently."""
    return tiny_model(name, seed=2 if name == "idefics2" else 0), tiny_processor(PROCESSORS[name], chat=chat)


def adapter_of(model, config, seed=1):
    """One whose parameters are all drawn, so that it changes what is said."""
    adapter = mk.create(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


@torch.no_grad()
def said(model, builder, query, shots=(), **options):
    """What one prompt is answered, by ``generate`` and nothing else."""
    inputs = builder.prompt([query], [shots])
    return decoded(model, builder, inputs, **options)


def decoded(model, builder, inputs, **options):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    made = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    (text,) = builder.processor.tokenizer.batch_decode(
        made, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def plain_state(model):
    """What would differ if something were left in a model."""
    hooks = sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules())
    return hooks, [type(x) for x in model.modules()], [x.training for x in model.modules()]
