"""What else people do to a model: LoRA, 8 and 4 bits, weights elsewhere until they are used, the Trainer.

Everything is compared with an independent form on the very same model. Each needs a package of its own.
"""

import copy
from itertools import product

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.family_oracles import METHODS, adapter_of, attached, independent
from tests.patch.snapshots import assert_same_objects, changes, snapshot
from tests.patch.spliced_prompts import CHOSEN, PLACEHOLDERS, ordinary_tokens
from tests.patch.test_support_matrix import gradients, logit_budget, model_in_double, model_of, relative_error
from tests.support.published import doubled, in_double, logits

FAMILIES = {"llava-llama": "model.language_model", "idefics2": "model.text_model"}
EPS = torch.finfo(torch.float32).eps


def cases(*lists, quick):
    """Their product; in `make test` those alone that have all of ``quick``."""
    for case in product(*lists):
        yield pytest.param(*case, marks=[] if quick <= set(case) else [pytest.mark.slow])


def both_logits(model, method, adapter):
    """Of the independent form and of the attached one."""
    inputs, results = tiny_inputs(model), []
    for form in (independent, attached):
        with form(model, method, adapter) as prompts:
            results.append(logits(model, prompts(inputs)))
    return results


def assert_acts(model, name, method, adapter):
    """As the independent form does, and not as the plain model; which is what it was afterwards."""
    plain, before = logits(model, tiny_inputs(model)), snapshot(model)
    expected, actual = both_logits(model, method, adapter)
    assert relative_error(actual, expected) <= logit_budget(name, method)
    assert actual.shape != plain.shape or relative_error(plain, expected) > 0.01
    assert_same_objects(snapshot(model), before)
    assert torch.equal(logits(model, tiny_inputs(model)), plain)


# LoRA


def with_lora(name, projections):
    """A PeftModel whose LoRA matters."""
    peft = pytest.importorskip("peft")
    model, targets = tiny_model(name), rf"{FAMILIES[name]}.*({projections})"
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


PROJECTIONS = ("q_proj|v_proj", "o_proj|down_proj")


@pytest.mark.parametrize(
    "name, projections, method", cases(FAMILIES, PROJECTIONS, METHODS, quick={"llava-llama", "q_proj|v_proj"})
)
def test_adapter_of_the_plain_model_beside_lora(name, projections, method):
    wrapped, plain = with_lora(name, projections), model_of(name)
    adapter, model = adapter_of(plain, method), wrapped.get_base_model()
    inputs = tiny_inputs(plain)
    assert relative_error(logits(model, inputs), logits(plain, inputs)) > 0.01
    assert adapter_of(model, method).backbone == adapter.backbone
    assert_acts(model, name, method, adapter)
    with attached(wrapped, method, adapter) as prompts:  # peft's model is as good
        actual = logits(wrapped, prompts(inputs))
        with wrapped.disable_adapter():
            without_lora = logits(wrapped, prompts(inputs))
    assert relative_error(actual, both_logits(model, method, adapter)[0]) <= logit_budget(name, method)
    with attached(plain, method, adapter) as prompts:
        assert torch.equal(without_lora, logits(plain, prompts(inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("projections", PROJECTIONS)
@pytest.mark.parametrize("unload", [False, True], ids=["merged", "unloaded"])
def test_adapter_beside_merged_lora(projections, unload):
    """Where the output projections are others, the model is another one."""
    name, wrapped = "llava-llama", with_lora("llava-llama", projections)
    beside, inputs = adapter_of(wrapped, "m2iv"), tiny_inputs(model_of("llava-llama"))
    with mk.attach(wrapped, beside):
        apart = logits(wrapped, inputs)
    if unload:
        model = wrapped.merge_and_unload()
    else:
        wrapped.merge_adapter()
        model = wrapped.get_base_model()
    if "o_proj" in projections:
        with pytest.raises(mk.CheckpointError, match="weights are not those the adapter was trained on"):
            mk.attach(model, beside)
        beside.backbone = adapter_of(model, "m2iv").backbone
    assert_acts(model, name, "m2iv", beside)
    with mk.attach(model, beside):
        assert relative_error(logits(model, inputs), apart) <= 2 * logit_budget(name, "m2iv")


def joint_gradients(model, method, form):
    """Of an adapter, and of the LoRA beside it."""
    adapter = adapter_of(model, method).to(model.dtype)
    lora = [x for key, x in model.named_parameters() if "lora_" in key]
    assert lora and all(x.requires_grad for x in lora)
    inputs = tiny_inputs(model)
    with form(model, method, adapter) as prompts:
        given = prompts(doubled(inputs) if model.dtype == torch.float64 else inputs)
        model(**given).logits.square().mean().backward()
    found = [torch.cat([x.grad.flatten() for x in group]) for group in (list(adapter.parameters()), lora)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("method", [x for x in METHODS if x != "aim"])
def test_lora_and_adapter_train_together(method):
    model = with_lora("llava-llama", "q_proj|v_proj|o_proj").get_base_model()
    exact = joint_gradients(in_double(model), method, independent)
    expected = joint_gradients(model, method, independent)
    actual = joint_gradients(model, method, attached)
    for a, b, c in zip(actual, expected, exact, strict=True):
        assert relative_error(a, b) <= 4 * relative_error(b, c)
        assert c.norm() > 0


def test_one_optimizer_steps_both():
    wrapped = with_lora("llava-llama", "q_proj|v_proj")
    adapter = adapter_of(wrapped, "mimic")
    lora = [x for x in wrapped.parameters() if x.requires_grad]
    parameters = [*adapter.parameters(), *lora]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    with mk.attach(wrapped, adapter):
        wrapped(**tiny_inputs(wrapped.get_base_model())).logits.square().mean().backward()
    before = [x.detach().clone() for x in parameters]
    optimizer.step()
    for x, old in zip(parameters, before, strict=True):
        assert torch.equal(x, old - 0.5 * x.grad) and x.grad.count_nonzero() > 0


# What wraps a model


def test_attach_finds_the_model_inside():
    """Of torch.compile and DistributedDataParallel; of peft above."""
    plain = model_of("llava-llama")
    model, inputs = copy.deepcopy(plain).requires_grad_(True), tiny_inputs(plain)
    adapter = adapter_of(plain, "mimic")
    expected = both_logits(plain, "mimic", adapter)[1]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for wrapped in (parallel, torch.compile(model), torch.compile(parallel)):
            assert mk.create(wrapped, adapter.config).backbone == adapter.backbone
            with mk.attach(wrapped, adapter) as handle:
                assert handle.model is model
                assert torch.equal(logits(model, inputs), expected)
                assert wrapped is not parallel or torch.equal(logits(wrapped, inputs), expected)
    finally:
        dist.destroy_process_group()


# 8 and 4 bits


def quantise(name, how):
    """The tiny model with its decoder's linear layers in 8 or 4 bits."""
    model, prefix = tiny_model(name).requires_grad_(False), f"{FAMILIES[name]}.layers."
    linears = [x for x, of in model.named_modules() if isinstance(of, nn.Linear) and x.startswith(prefix)]
    if how.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        config = {
            "torchao int8": lambda: quantization.Int8WeightOnlyConfig(),
            "torchao int4": lambda: quantization.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=quantization.PerGroup(16)
            ),
        }[how]()
        quantization.quantize_(model, config, filter_fn=lambda _, x: x in linears)
        return model
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for path in linears:
        old = model.get_submodule(path)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, _quantised_linear(bitsandbytes.nn, old, how))
    return model


def _quantised_linear(modules, old, how):
    if how == "bitsandbytes 8 bit":
        new = modules.Linear8bitLt(old.in_features, old.out_features, old.bias is not None, False)
        new.weight = modules.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        new = modules.Linear4bit(old.in_features, old.out_features, old.bias is not None, quant_type="nf4")
        new.weight = modules.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
    new.bias = old.bias
    return new.to("cpu")


QUANTISED = ("torchao int8", "torchao int4", "bitsandbytes 8 bit", "bitsandbytes 4 bit")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", QUANTISED)
@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_base(name, how, method):
    plain, model = model_of(name), quantise(name, how)
    inputs = tiny_inputs(plain)
    assert relative_error(logits(model, inputs), logits(plain, inputs)) > 1e-3
    adapter = adapter_of(plain, method)
    created = mk.create(model, adapter.config)
    assert created.backbone.fingerprint == () and created.backbone.layers == adapter.backbone.layers
    assert {(x.device.type, x.dtype) for x in created.parameters()} == {("cpu", torch.float32)}
    assert_acts(model, name, method, adapter)


@pytest.mark.slow
@pytest.mark.parametrize("method", [x for x in METHODS if x != "aim"])
@pytest.mark.parametrize("how", QUANTISED)
def test_training_over_a_quantised_base(how, method):
    name, model = "llava-llama", quantise("llava-llama", how)
    exact = gradients(model_in_double(name), method, independent)
    budget = 4 * relative_error(gradients(model_of(name), method, independent), exact)
    found = []
    for _ in range(2):
        adapter, inputs = adapter_of(model_of(name), method), tiny_inputs(model)
        if not found:
            with independent(model, method, adapter):
                model(**inputs).logits.square().mean().backward()
        else:
            adapted = mk.AdaptedModel(model, adapter)
            adapted(**inputs).logits.square().mean().backward()
            adapted.handle.detach()
        found.append(torch.cat([x.grad.flatten() for x in adapter.parameters()]))
    assert relative_error(found[1], found[0]) <= budget
    assert found[0].norm() > 0 and all(x.grad is None for x in model.parameters())


# Weights that are elsewhere until they are used


def offload(model, name, how, folder):
    """By accelerate, everything computed on the CPU."""
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    decoder = f"{FAMILIES[name]}."
    places = {}
    for path, _ in model.named_parameters():
        on_disk = path.startswith((f"{decoder}layers.", f"{decoder}embed_tokens"))
        places[path.rpartition(".")[0]] = "disk" if on_disk else "cpu"
    return accelerate.dispatch_model(model, places, "cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize(
    "name, how, method",
    cases(
        FAMILIES,
        ("cpu_offload", "disk_offload", "dispatch_model"),
        METHODS,
        quick={"llava-llama", "dispatch_model"},
    ),
)
def test_offloaded_weights(name, how, method, tmp_path):
    whole = model_of(name)
    adapter, inputs = adapter_of(whole, method), tiny_inputs(whole)
    plain, expected = logits(whole, inputs), both_logits(whole, method, adapter)[1]

    model = offload(tiny_model(name).requires_grad_(False), name, how, str(tmp_path))
    logits(model, inputs)
    assert next(model.get_submodule(FAMILIES[name]).layers.parameters()).is_meta
    assert model.get_input_embeddings().weight.is_meta
    before = snapshot(model)
    created = mk.create(model, adapter.config)
    assert {x.device.type for x in created.parameters()} == {"cpu"}
    assert created.backbone.fingerprint == ()
    options = {"placeholder_ids": PLACEHOLDERS} if method == "aim" else {}
    with mk.attach(model, adapter, **options) as handle:
        if method == "aim":
            inputs = handle.splice(inputs, CHOSEN, tokens=ordinary_tokens(whole))
        assert torch.equal(logits(model, inputs), expected)
    after = snapshot(model)  # accelerate puts new tensors there at every call
    assert list(after) == list(before)
    assert {key[1] for key in changes(after, before)} <= {"_parameters", "_buffers"}
    assert torch.equal(logits(model, tiny_inputs(whole)), plain)


def test_lora_on_offloaded_weights():
    """The layers that peft makes have no hook of their own."""
    wrapped = with_lora("llava-llama", "q_proj|v_proj")
    adapter = adapter_of(wrapped, "mimic")
    expected = both_logits(wrapped.get_base_model(), "mimic", adapter)[1]
    model = offload(wrapped.get_base_model(), "llava-llama", "cpu_offload", None)
    created = mk.create(wrapped, adapter.config)
    assert {x.device.type for x in created.parameters()} == {"cpu"}
    with mk.attach(wrapped, adapter):
        assert torch.equal(logits(wrapped, tiny_inputs(model)), expected)


# The Trainer of transformers


def trainer(adapted, folder, **options):
    """Three steps of plain descent, which writes down its batches."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments, default_data_collator

    inputs = tiny_inputs(adapted.model, batch=6)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, 0] = -100  # nothing predicts it, but the Trainer counts it
    data, batches = [{key: x[row] for key, x in inputs.items()} for row in range(6)], []

    def collate(rows):
        batches.append(default_data_collator(rows))
        return dict(batches[-1])

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, save_steps=2, per_device_train_batch_size=2, learning_rate=0.5,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, remove_unused_columns=False,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    return Trainer(adapted, arguments, train_dataset=data, data_collator=collate), batches


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mimic", "m2iv"])
@pytest.mark.parametrize("name", ["llava-llama", "gemma3"])
def test_trainer_is_our_loop_and_resumes(name, method, tmp_path):
    start = adapter_of(model_of(name), method)
    adapted = mk.AdaptedModel(tiny_model(name), copy.deepcopy(start))
    training, batches = trainer(adapted, tmp_path)
    training.train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == {f"adapter.{key}" for key in start.state_dict()}
    assert all(torch.equal(saved[f"adapter.{key}"], x) for key, x in adapted.adapter.state_dict().items())

    alone = mk.AdaptedModel(tiny_model(name), copy.deepcopy(start))
    alone.train()
    optimizer = torch.optim.SGD(alone.adapter.parameters(), lr=0.5)
    for batch in batches[:3]:
        optimizer.zero_grad()
        alone(**batch).loss.backward()
        optimizer.step()
    for actual, expected, first in zip(
        *(x.parameters() for x in (adapted.adapter, alone.adapter, start)), strict=True
    ):
        # The Trainer has the sum divided by the number of tokens, where the model takes a mean.
        allowed = 64 * EPS * (expected - first).norm() + 3 * EPS * first.norm()
        assert (actual - expected).norm() <= allowed < (expected - first).norm()

    resumed = mk.AdaptedModel(tiny_model(name), mk.create(model_of(name), start.config))
    trainer(resumed, tmp_path / "again")[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(resumed.adapter.parameters(), adapted.adapter.parameters(), strict=True):
        assert torch.equal(a, b)
