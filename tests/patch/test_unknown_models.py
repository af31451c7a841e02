"""Models that cannot be patched: the error lists what was found and what is missing; nothing is touched."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

import mmicl_kernels as mk
from mmicl_kernels.testing.tiny_models import TEXT, VISION, tiny_inputs, tiny_model
from tests.patch.snapshots import assert_same_objects, snapshot
from tests.support.residuals import random_shift

KNOWN = ("idefics", "llava", "qwen3_vl")  # of which the message lists all


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.feed = nn.Linear(4, 4)

    def forward(self, x):
        return self.feed(self.mix(x))


class Stack(nn.Module):
    """No config at all."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList([nn.Linear(4, 4)])
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class StrangeConfig(PreTrainedConfig):
    model_type = "strange_vlm"


class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig

    def __init__(self, config) -> None:
        super().__init__(config)
        self.trunk = Stack()

    def forward(self, x):
        return self.trunk(x)


def tokens():
    return {"input_ids": torch.arange(12).view(1, 12) + 3}


class Unknown:
    """A model, what runs it if it can run, and what the message must name."""

    @staticmethod
    def module_without_config():
        found = "tower of 1 Linear (no children); blocks of 2 Block (mix: Linear, feed: Linear)"
        return Stack(), {"x": torch.ones(1, 4)}, ["Stack", "None", found, "Missing", *KNOWN]

    @staticmethod
    def strange_model_type():
        words = ["StrangeModel", "'strange_vlm'", "trunk.blocks of 2 Block", "mix: Linear", "Missing", *KNOWN]
        return StrangeModel(StrangeConfig()), {"x": torch.ones(1, 4)}, words

    @staticmethod
    def gpt2():
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
        words = ["GPT2LMHeadModel", "'gpt2'", "transformer.h of 2 GPT2Block", "attn: GPT2Attention"]
        return transformers.GPT2LMHeadModel(config), tokens(), [*words, "Missing", *KNOWN]

    @staticmethod
    def opt_with_norms_after():
        """Its branches join the stream before their norm: no vector would stay what it is."""
        config = copy.deepcopy(tiny_model("blip2").config)
        config.text_config.do_layer_norm_before = False
        model = transformers.Blip2ForConditionalGeneration(config)
        words = ["blip-2", "'opt'", "do_layer_norm_before is False, expected True"]
        return model, tiny_inputs(model), words

    @staticmethod
    def blip2_with_t5():
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
        config = transformers.Blip2Config(
            text_config={"model_type": "t5", **sizes},
            vision_config=VISION,
            qformer_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            num_query_tokens=4,
            image_token_index=60,
        )
        model = transformers.Blip2ForConditionalGeneration(config)
        inputs = {
            **tiny_inputs(tiny_model("blip2")),
            "decoder_input_ids": tokens()["input_ids"].expand(2, -1),
        }
        return model, inputs, ["blip-2", "'t5'", "'opt'", "decoder.block of 2 T5Block", "vision_model"]

    @staticmethod
    def unknown_family():
        model = tiny_model("llava-llama")
        model.config.model_type = "video_llava"
        return model, None, ["video_llava", "idefics2"]

    @staticmethod
    def unknown_text_model():
        config = transformers.LlavaConfig(
            text_config=transformers.GPTNeoXConfig(**TEXT),
            vision_config=tiny_model("llava-llama").config.vision_config,
        )
        model = transformers.LlavaForConditionalGeneration(config)
        return model, None, ["llava", "gpt_neox", "llama", "qwen2", "GPTNeoXAttention"]

    @staticmethod
    def missing_child():
        model = tiny_model("llava-llama")
        del model.model.language_model.layers[1].mlp
        return model, None, ["llava", "layers.1", "mlp", "self_attn"]

    @staticmethod
    def missing_path():
        model = tiny_model("idefics2")
        model.model.decoder = model.model.text_model
        del model.model.text_model
        return model, None, ["idefics2", "text_model", "decoder"]

    @staticmethod
    def no_layers():
        model = tiny_model("llava-llama")
        model.model.language_model.layers = nn.ModuleList()
        return model, None, ["llava", "layers"]

    @staticmethod
    def odd_head_dim():
        model = tiny_model("llava-llama")
        model.model.language_model.layers[2].self_attn.head_dim = 7
        return model, None, ["layers.2", "head_dim", "7", "32"]


@torch.no_grad()
def outputs(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("case", [x for x in vars(Unknown) if not x.startswith("_")])
def test_unknown_models_are_told_what_was_found_and_what_is_missing(case):
    model, inputs, words = getattr(Unknown, case)()
    model.eval()
    plain = inputs and outputs(model, inputs)  # first, as transformers installs hooks of its own
    before, weights = snapshot(model), {name: x.clone() for name, x in model.state_dict().items()}
    llava = tiny_model("llava-llama")
    for call in (
        *(lambda config=config: mk.create(model, config()) for config in CONFIGS),
        *(lambda config=config: mk.attach(model, mk.create(llava, config())) for config in CONFIGS),
        lambda: mk.load("nowhere", model),
        lambda: mk.load_official("nowhere", model),
    ):
        with pytest.raises(mk.UnsupportedModelError) as error:
            call()
        assert [word for word in words if word not in str(error.value)] == []
    assert_same_objects(snapshot(model), before)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert inputs is None or torch.equal(outputs(model, inputs), plain)


CONFIGS = (mk.MimICConfig, mk.M2IVConfig, mk.LIVEConfig, mk.AIMConfig)


def test_gemma4_with_embeddings_per_layer_refuses_aim():
    """Each layer looks the placeholder's id up by itself: what is in the first embedding would not be all."""
    model = tiny_model("gemma4").eval()
    inputs = tiny_inputs(model)
    plain, before = outputs(model, inputs), snapshot(model)
    message = (
        "method 'aim' cannot apply to gemma4: every layer looks up an embedding of its own by the "
        "placeholder's id"
    )
    with pytest.raises(mk.UnsupportedModelError, match=message):
        mk.create(model, mk.AIMConfig())
    adapter = mk.AIMAdapter(mk.AIMConfig(), random_shift(model).backbone)
    with pytest.raises(mk.UnsupportedModelError, match=message):
        mk.attach(model, adapter)
    assert_same_objects(snapshot(model), before)
    with mk.attach(model, random_shift(model)) as handle:
        patched = snapshot(model)
        with pytest.raises(mk.UnsupportedModelError, match=message):
            handle.add("aim", adapter)
        assert_same_objects(snapshot(model), patched)
    assert_same_objects(snapshot(model), before)
    assert torch.equal(outputs(model, inputs), plain)


def test_llms_without_softmax_refuse_mimic():
    """Nothing would be patched, and the model would seem to be."""
    config = copy.deepcopy(tiny_model("qwen3_5").config)
    config.text_config.layer_types = ["linear_attention"] * TEXT["num_hidden_layers"]
    config.text_config.num_hidden_layers = TEXT["num_hidden_layers"]
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    before = snapshot(model)
    with pytest.raises(mk.UnsupportedModelError, match="'mimic' cannot apply to qwen3_5: no layer"):
        mk.create(model, mk.MimICConfig())
    assert_same_objects(snapshot(model), before)


class DeafAttention(LlamaAttention):
    """Calls sdpa itself, whatever its config says."""

    def forward(self, hidden_states, **_):
        return self.o_proj(self.q_proj(hidden_states)), None


@pytest.mark.parametrize("of", ["class", "instance"])
def test_an_attention_that_never_asks_the_interface(of):
    """It would be called patched and compute as before; vectors in the stream do not depend on it."""
    model = tiny_model("llava-llama")
    attention = model.model.language_model.layers[1].self_attn
    adapter = mk.create(model, mk.MimICConfig())
    if of == "class":
        attention.__class__ = DeafAttention
    else:
        attention.forward = DeafAttention.forward.__get__(attention)
    before = snapshot(model)
    with pytest.raises(mk.UnsupportedModelError, match="does not ask transformers' AttentionInterface"):
        mk.attach(model, adapter)
    with pytest.raises(mk.UnsupportedModelError, match="'mimic' cannot apply to llava: the forward of"):
        mk.create(model, mk.MimICConfig())
    assert_same_objects(snapshot(model), before)
    mk.attach(model, random_shift(model)).detach()


def no_width():
    model = tiny_model("llava-llama")
    model.model.language_model.layers[0].self_attn.o_proj = nn.Identity()
    return model, "head_dim is 8, expected a divisor of o_proj.in_features = None"


def list_for_a_name():
    model = tiny_model("llava-llama")
    model.config.model_type = ["llava"]
    return model, r"has config.model_type \['llava'\], expected one of"


def inner_model():
    return tiny_model(
        "llava-llama"
    ).model.vision_tower, "has config.model_type 'clip_vision_model', expected one"


def config_alone():
    return tiny_model("llava-llama").config, "model is a LlavaConfig, expected a HuggingFace model"


@pytest.mark.parametrize("case", [no_width, list_for_a_name, inner_model, config_alone])
def test_strange_arguments_are_named(case):
    model, message = case()
    with pytest.raises(mk.UnsupportedModelError, match=message):
        mk.create(model, mk.MimICConfig())
    with pytest.raises(mk.UnsupportedModelError, match=message):
        mk.attach(model, mk.create(tiny_model("llava-llama"), mk.M2IVConfig()))
