"""An AdaptedModel where a model is expected: trainers, pipelines, generation, checkpointing."""

import copy
import pickle

import pytest
import torch
import transformers

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from tests.patch.family_oracles import adapter_of
from tests.support.published import random_adapter
from tests.support.same_adapter import assert_same

pytest.importorskip("accelerate")
METHODS = ("mimic", "m2iv", "live")


@pytest.fixture(params=METHODS)
def adapted(request):
    model = tiny_model("llava-llama")
    return mk.AdaptedModel(model, adapter_of(model, request.param))


def rows_of(model, count=4):
    inputs = tiny_inputs(model, batch=count)
    inputs["labels"] = inputs["input_ids"].clone()
    return [{key: x[row] for key, x in inputs.items()} for row in range(count)]


def trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], remove_unused_columns=False, disable_tqdm=True,
        per_device_eval_batch_size=2, per_device_train_batch_size=2, max_steps=1, save_strategy="no",
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, **options,
    )  # fmt: skip
    rows = rows_of(getattr(model, "model", model) if isinstance(model, mk.AdaptedModel) else model)
    return transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows,
        data_collator=transformers.default_data_collator,
    )  # fmt: skip


def patched_alone(adapted):
    """A model patched by hand as ``adapted`` is."""
    model = tiny_model("llava-llama").requires_grad_(False)
    return model, mk.attach(model, adapted.adapter)


def test_it_has_what_the_model_has(adapted):
    model = adapted.model
    for name in ("config", "generation_config", "device", "dtype", "main_input_name"):
        assert getattr(adapted, name) == getattr(model, name), name
    assert adapted.is_gradient_checkpointing == model.is_gradient_checkpointing
    assert adapted.get_input_embeddings() is model.get_input_embeddings()
    assert adapted.get_output_embeddings() is model.get_output_embeddings()
    assert adapted.can_generate() and not hasattr(adapted, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = adapted.no_such_thing
    assert mk.create(adapted, mk.M2IVConfig()).backbone == adapted.adapter.backbone


def test_it_generates_as_the_patched_model(adapted):
    model, handle = patched_alone(adapted)
    inputs = tiny_inputs(model, padding="left")
    options = {"max_new_tokens": 6, "do_sample": False}
    with handle:
        expected = model.generate(**inputs, **options)
    assert torch.equal(adapted.generate(**inputs, **options), expected)
    assert not torch.equal(model.generate(**inputs, **options), expected)


def test_evaluate(adapted, tmp_path):
    model, handle = patched_alone(adapted)
    with handle:
        expected = trainer(model, tmp_path).evaluate()["eval_loss"]
    plain = trainer(model, tmp_path).evaluate()["eval_loss"]
    assert trainer(adapted, tmp_path).evaluate()["eval_loss"] == expected != plain


def test_predict(adapted, tmp_path):
    model, handle = patched_alone(adapted)
    with handle:
        try:
            expected = trainer(model, tmp_path).predict(rows_of(model))
        except TypeError as error:  # before transformers 5.23
            pytest.skip(f"the Trainer cannot predict with a plain model: {error}")
    actual = trainer(adapted, tmp_path).predict(rows_of(model))
    assert actual.metrics["test_loss"] == expected.metrics["test_loss"]
    assert len(actual.predictions) == len(expected.predictions) == 2  # logits and hidden states of images
    for x, y in zip(actual.predictions, expected.predictions, strict=True):
        assert x.shape == y.shape and (x == y).all()
    assert (actual.label_ids == expected.label_ids).all()


@pytest.mark.parametrize("keywords", [None, {"use_reentrant": False}])
def test_gradient_checkpointing(adapted, tmp_path, keywords):
    start = copy.deepcopy(adapted.adapter.state_dict())
    results = []
    for checkpointing in (False, True):
        adapted.adapter.load_state_dict(start)
        options = {"gradient_checkpointing_kwargs": keywords} if keywords else {}
        training = trainer(adapted, tmp_path, gradient_checkpointing=checkpointing, **options)
        training.train()
        assert adapted.is_gradient_checkpointing == checkpointing
        results.append({key: x.clone() for key, x in adapted.adapter.state_dict().items()})
    for key, x in results[0].items():
        torch.testing.assert_close(results[1][key], x)
        assert key.endswith("bias") or not torch.equal(x, start[key])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_accumulation_is_a_larger_batch(adapted, tmp_path, accumulated):
    """The model's own loss is divided by the number of tokens of all batches, as it is without an adapter."""
    assert adapted.accepts_loss_kwargs
    start = copy.deepcopy(adapted.adapter.state_dict())
    results = []
    for size, steps in ((4, 1), (4 // accumulated, accumulated)):
        adapted.adapter.load_state_dict(start)
        options = {"gradient_accumulation_steps": steps, "seed": 1}
        training = trainer(adapted, tmp_path, **options)
        training.args.per_device_train_batch_size = size
        training._train_batch_size = size
        training.train()
        results.append({key: x.clone() for key, x in adapted.adapter.state_dict().items()})
    for key, x in results[0].items():
        torch.testing.assert_close(results[1][key], x)


def test_pipeline(adapted):
    processor = tiny_processor("llava")
    from PIL import Image

    asked = {"images": Image.new("RGB", (9, 7), (255, 0, 0)), "text": "<image>what?"}
    answers = []
    for model in (adapted, adapted.model):
        pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
        answers.append(pipe(**asked, max_new_tokens=4, do_sample=False, return_full_text=False))
    adapted.handle.detach()
    pipe = transformers.pipeline("image-text-to-text", model=adapted.model, processor=processor)
    plain = pipe(**asked, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert answers[0] == answers[1] and answers[0] != plain


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies(adapted, copier):
    inputs = tiny_inputs(adapted.model)
    with torch.no_grad():
        copied = copier(adapted)
        expected = adapted(**inputs).logits
        adapted.handle.detach()
        assert torch.equal(copied(**inputs).logits, expected)
        assert copied.config is not adapted.config and copied.handle.model is copied.model
        assert not torch.equal(adapted(**inputs).logits, expected)


def test_compiled(adapted):
    inputs = tiny_inputs(adapted.model)
    with torch.no_grad():
        expected = adapted(**inputs).logits
        torch.testing.assert_close(torch.compile(adapted, backend="eager")(**inputs).logits, expected)


def test_labels_by_name_and_none():
    model = tiny_model("llava-llama")
    adapted = mk.AdaptedModel(model, random_adapter(model))
    inputs = tiny_inputs(model)
    assert adapted(**inputs).loss is None and adapted(**inputs, labels=None).loss is None
    loss = adapted(**inputs, labels=inputs["input_ids"]).loss
    assert torch.equal(loss, model(**inputs, labels=inputs["input_ids"]).loss)


def test_a_model_that_takes_no_loss_arguments_says_so():
    model = tiny_model("idefics2")
    adapted = mk.AdaptedModel(model, random_adapter(model))
    for told in (True, False):
        model.accepts_loss_kwargs = told
        assert adapted.accepts_loss_kwargs is told


def test_a_trainer_takes_an_adapter_over_quantised_weights(tmp_path):
    model = tiny_model("llava-llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    adapted = mk.AdaptedModel(model, random_adapter(model))
    trainer(adapted, tmp_path).train()


def test_what_is_set_on_it_is_set_on_the_model(adapted):
    inputs = tiny_inputs(adapted.model)
    adapted.generation_config = transformers.GenerationConfig(
        max_new_tokens=3, eos_token_id=None, pad_token_id=0
    )
    assert adapted.model.generation_config is adapted.generation_config
    assert adapted.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3
    config = copy.deepcopy(adapted.config)
    adapted.config = config
    assert adapted.model.config is config
    adapted.loss_function = lambda *args, **kwargs: torch.tensor(7.0)
    assert adapted(**inputs, labels=inputs["input_ids"]).loss == 7
    adapted.note = "mine"  # what the model has not stays here
    assert adapted.note == "mine" and not hasattr(adapted.model, "note")
    other = random_adapter(adapted.model)
    adapted.adapter = other
    assert adapted.adapter is other


def test_it_saves_its_adapter(adapted, tmp_path):
    """Also as accelerate asks for it."""
    asked = {"save_function": torch.save, "state_dict": adapted.state_dict()}
    adapted.save_pretrained(tmp_path / "other", is_main_process=False, **asked)
    assert not (tmp_path / "other").exists()
    for folder, options in (("main", {"is_main_process": True, **asked}), ("plain", {})):
        adapted.save_pretrained(tmp_path / folder, **options)
        assert_same(mk.load(tmp_path / folder, tiny_model("llava-llama")), adapted.adapter)
        files = sorted(x.name for x in (tmp_path / folder).iterdir())
        assert files == ["mmicl_adapter.json", "mmicl_adapter.safetensors"]


class LastNorm(torch.nn.BatchNorm1d):
    """Batch norm of the last dimension."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view_as(x)


def with_running_statistics():
    """A model with a batch norm and a dropout between its tower and its language model."""
    model = tiny_model("llava-llama")
    projector = model.model.multi_modal_projector
    projector.act = torch.nn.Sequential(
        projector.act, LastNorm(projector.linear_1.out_features), torch.nn.Dropout(0.5)
    )
    return model.eval()


def test_training_leaves_running_statistics_alone(tmp_path):
    """The model is what the adapter is for: with other statistics it would be another one."""
    model = with_running_statistics()
    norm, dropout = model.model.multi_modal_projector.act[1:]
    before = {name: x.clone() for name, x in model.named_buffers()}
    adapted = mk.AdaptedModel(model, adapter_of(model, "live"))
    assert adapted.train() is adapted
    assert dropout.training and adapted.adapter.training and model.training and not norm.training
    trainer(adapted, tmp_path).train()
    assert norm.num_batches_tracked == 0
    for name, x in model.named_buffers():
        assert torch.equal(x, before[name]), name
    assert not adapted.eval().training and not dropout.training and not norm.training
