"""Models and processors from a folder or the hub; of a processor, with and without its part for videos."""

import json
import pickle
import warnings

import pytest
import torch
import transformers
from transformers import LlamaConfig
from transformers.utils import is_torchvision_available

import mmicl_kernels as mk
from mmicl_kernels.data.prompts.builder import PromptBuilder
from mmicl_kernels.models.pretrained import load_model, load_processor
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from mmicl_kernels.testing.tiny_processors import CHAT_TEMPLATES, MAKERS
from tests.support.example_images import BLUE, GREEN, RED
from tests.support.example_processors import needs_torchvision, processor_of
from tests.support.published import whole_logits

READ_VIDEOS = ("glm4v", "internvl", "llava_onevision", "qwen2_5_vl", "qwen2_vl")
without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")


def saved(name, folder):
    """A processor, written to a folder that this transformers can read again."""
    processor = processor_of(name, chat=name in CHAT_TEMPLATES)
    processor.save_pretrained(folder)
    with needs_torchvision():
        transformers.models.auto.image_processing_auto.AutoImageProcessor.from_pretrained(folder)
    return processor


def rewrite(file, **settings):
    """Change a JSON file; None takes an entry away."""
    made = {**json.loads(file.read_text() or "{}"), **settings}
    file.write_text(json.dumps({key: x for key, x in made.items() if x is not None}))


# Processors ----------------------------------------------------------------------------------------------


@without_torchvision
@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_processor_makes_the_same_prompts(name, tmp_path):
    processor = saved(name, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_processor(tmp_path)
    said = [str(x.message) for x in caught if "videos need torchvision" in str(x.message)]
    assert len(said) == (name in READ_VIDEOS), said
    assert type(loaded) is type(processor)
    assert loaded.chat_template == processor.chat_template == CHAT_TEMPLATES.get(name)
    demonstrations = [mk.Demonstration((image,), "which?", "red") for image in (RED, GREEN, BLUE)]
    for other in (loaded, pickle.loads(pickle.dumps(loaded))):
        made, expected = (PromptBuilder(x).prompt(demonstrations) for x in (other, processor))
        torch.testing.assert_close(made, expected, rtol=0, atol=0)


@without_torchvision
@pytest.mark.parametrize("place", ["processor_config.json", "video_preprocessor_config.json"])
def test_what_a_processor_has_for_videos_is_kept(place, tmp_path):
    saved("qwen2_5_vl", tmp_path)
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2, "size": {"longest_edge": 3}}
    if place == "processor_config.json":
        rewrite(tmp_path / place, video_processor=videos)
    else:
        rewrite(tmp_path / "processor_config.json", video_processor=None)
        (tmp_path / place).write_text(json.dumps(videos))
    with pytest.warns(UserWarning, match="Qwen2_5_VLProcessor is loaded for images alone"):
        processor = load_processor(tmp_path)
    processor.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/processor_config.json").read_text())["video_processor"] == videos
    with pytest.raises(ImportError, match="for images alone, videos need torchvision"):
        processor(text="<|video_pad|>", videos=[torch.zeros(2, 3, 28, 28)])


@without_torchvision
@pytest.mark.parametrize(
    "place", ["processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json"]
)
def test_what_says_which_processor_it_is(place, tmp_path):
    """One of the files, as transformers 4 wrote them too, or the type of the model beside it."""
    processor = saved("qwen2_5_vl", tmp_path)
    (tmp_path / "processor_config.json").unlink()
    processor.image_processor.save_pretrained(tmp_path)
    rewrite(tmp_path / "tokenizer_config.json", processor_class=None)
    if place == "config.json":
        tiny_model("qwen2_5_vl").config.save_pretrained(tmp_path)
    else:
        (tmp_path / place).touch()
        rewrite(tmp_path / place, processor_class="Qwen2_5_VLProcessor")
    with pytest.warns(UserWarning, match="images alone"):
        loaded = load_processor(str(tmp_path))
    assert type(loaded) is type(processor)
    assert loaded.image_processor.size == processor.image_processor.size
    assert loaded.chat_template == processor.chat_template


def test_another_processor_or_none(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="none does not exist, expected a folder or a name on the hub"
    ):
        load_processor(tmp_path / "none")
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        load_processor(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    processor_of("llava").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="has a .*, expected a processor of images and text"):
        load_processor(tmp_path)


# Models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llava-llama").save_pretrained(folder)
    return folder


def test_a_saved_model_is_the_same(folder):
    model = load_model(folder, device="cpu")
    assert not model.training and model.dtype == torch.float32
    inputs, original = tiny_inputs(model), tiny_model("llava-llama")
    assert torch.equal(whole_logits(model, inputs), whole_logits(original, inputs))


def test_device_dtype_and_attention_are_chosen(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_model(folder).device.type == "cpu"
    model = load_model(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert load_model(folder, dtype="float16", device="meta").device.type == "meta"
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or self)
    load_model(folder)
    assert moved == [torch.device("cuda")]


@pytest.mark.parametrize("quantization, bits, kind", [("4bit", 4, "Linear4bit"), ("8bit", 8, "Linear8bitLt")])
def test_a_quantised_model_is_trained_on(folder, quantization, bits, kind):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    model = load_model(folder, device="cpu", quantization=quantization)
    kinds = {type(x).__name__ for x in model.model.language_model.layers.modules()}
    assert kind in kinds and "Linear" not in kinds
    settings = model.config.quantization_config
    assert (settings.load_in_4bit, settings.load_in_8bit) == (bits == 4, bits == 8)
    if bits == 4:
        assert settings.bnb_4bit_quant_type == "nf4"
        assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    adapter = mk.create(model, mk.MimICConfig())
    with mk.attach(model, adapter):
        loss = model(**tiny_inputs(model)).logits.float().square().mean()
        loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in adapter.parameters())


def test_models_that_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="quantization is 'int4', expected '4bit', '8bit' or None"):
        load_model(folder, quantization="int4")
    with pytest.raises(
        FileNotFoundError, match="/none does not exist, expected a folder or a name on the hub"
    ):
        load_model(tmp_path / "none")
    with pytest.raises((OSError, ValueError), match="config.json"):
        load_model(tmp_path)
    tiny_model("llava-llama").config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        load_model(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a 'llama', expected a model of images and text"):
        load_model(tmp_path)


# The hub -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_the_hub_is_asked_where_there_is_no_folder(there, folder, tmp_path, monkeypatch):
    """A folder of the same name goes first, and then the hub is not asked."""
    monkeypatch.chdir(tmp_path)
    source = folder if there else tmp_path / "empty"
    name = "owner/some-model_7B.v2"
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["local_files_only"]))
        raise OSError("asked")

    if there:
        (tmp_path / "owner").mkdir()
        (tmp_path / name).symlink_to(source)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", from_pretrained)
    monkeypatch.setattr(
        transformers.utils, "cached_file", lambda name, file, **options: from_pretrained(name, **options)
    )
    for load in (load_model, load_processor):
        with pytest.raises(OSError, match="asked"):
            load(name)
    assert asked == [(name, there)] * 2


@pytest.mark.parametrize("name", ["/absolute/none", "./none", "../none", "a/b/c", "a b", "https://x.y/z"])
def test_names_that_no_hub_has_are_missing_folders(name):
    for load in (load_model, load_processor):
        with pytest.raises(FileNotFoundError, match="does not exist, expected a folder or a name on the hub"):
            load(name)
