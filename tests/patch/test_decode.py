"""One token through a patched layer: by the operator itself, as by the public op, and with little Python."""

import pickle
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from transformers import DynamicCache, StaticCache

import mmicl_kernels as mk
from mmicl_kernels.ops._core.dispatch import has_cpu_kernels
from mmicl_kernels.patch import slots
from mmicl_kernels.patch.sites import attention, hf_attention, residual
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.compiled_generation import fresh_dynamo  # noqa: F401
from tests.support.published import multiply, random_adapter, relative_error

if not has_cpu_kernels():
    pytest.skip("the C++ kernels are not built", allow_module_level=True)

FAMILIES = ("llava-llama", "qwen2_5_vl", "gemma3", "paligemma2", "idefics2")
EPS = torch.finfo(torch.float32).eps


def text_of(model, batch=2):
    inputs = tiny_inputs(model, batch=batch, padding="left")
    return {"input_ids": inputs["input_ids"].clamp(max=20), "attention_mask": inputs["attention_mask"]}


def cache_of(model, kind):
    config = model.config.get_text_config()
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=24)


@torch.no_grad()
def decoded(model, kind, inputs, tokens=3):
    """Logits of each token after the prompt, which the model itself goes on with."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    kv = cache_of(model, kind)
    steps = [model(input_ids=ids, attention_mask=mask, past_key_values=kv, use_cache=True).logits[:, -1]]
    for _ in range(tokens):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        token = steps[-1][:, :40].argmax(-1, keepdim=True)
        output = model(input_ids=token, attention_mask=mask, past_key_values=kv, use_cache=True)
        steps.append(output.logits[:, -1])
    return torch.stack(steps[1:], 1)


def counted(monkeypatch, name):
    """Calls of a patched layer's method, and what they returned."""
    results, method = [], getattr(attention.PatchedLayer, name)

    def call(self, *args):
        results.append(method(self, *args))
        return results[-1]

    monkeypatch.setattr(attention.PatchedLayer, name, call)
    return results


def by_the_public_op(act):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.PatchedLayer, "decode", lambda *_: None)
        patch.setattr(residual.LayerShift, "_shifted_directly", lambda *_: None)
        return act()


def random_of(model, config):
    adapter, generator = mk.create(model, config), torch.Generator().manual_seed(0)
    for x in adapter.parameters():
        torch.nn.init.normal_(x, std=0.5, generator=generator)
    return adapter


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_public_op(name, normalizer, kind, implementation, monkeypatch):
    """Bit for bit, whatever the cache, its windows and softcaps, with padding on the left."""
    model = tiny_model(name, attn_implementation=implementation)
    adapter, inputs = random_adapter(model, normalizer=normalizer), text_of(model)
    plain = decoded(model, kind, inputs)
    results = counted(monkeypatch, "decode")
    with mk.attach(model, adapter):
        actual = decoded(model, kind, inputs)
        layers = len(adapter.layers)
        direct = sum(x is not None for x in results)
        assert len(results) == 3 * layers
        masks = model.config.get_text_config()._attn_implementation  # Gemma 2's is always eager
        # A float mask does not say where a static cache ends.
        assert direct == (0 if masks == "eager" and normalizer == "all_keys" else len(results))
        assert torch.equal(by_the_public_op(lambda: decoded(model, kind, inputs)), actual)
    assert relative_error(plain, actual) > 1e-3


@pytest.mark.parametrize("config", [mk.HiFICLConfig(), mk.MimICConfig()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_and_methods(config, dtype, monkeypatch):
    model = tiny_model("llava-llama").to(dtype)
    adapter, inputs = random_of(model, config), text_of(model)
    results = counted(monkeypatch, "decode")
    with mk.attach(model, adapter):
        actual = decoded(model, "dynamic", inputs)
        assert results and all(x is not None for x in results)
        assert torch.equal(by_the_public_op(lambda: decoded(model, "dynamic", inputs)), actual)


def scaled_in_place(adapter):
    multiply(adapter, -3.0)


def new_data(adapter):
    for x in adapter.parameters():
        x.data = x.data * -3.0


def new_parameters(adapter):
    adapter.load_state_dict({key: x * -3.0 for key, x in adapter.state_dict().items()}, assign=True)


def trained(adapter):
    """A fused optimizer counts its steps as no change of the parameters."""
    for x in adapter.parameters():
        x.grad = torch.ones_like(x)
    torch.optim.AdamW(adapter.parameters(), lr=1.0, fused=True).step()


def fewer_keys(adapter):
    """Views of the same memory, of other shapes."""
    for layer in adapter.layers.values():
        for name in ("key_a", "value_a"):
            layer[name].data = layer[name].data[:, :5]


CONFIGS = (mk.MimICConfig(), mk.HiFICLConfig(), mk.LIVEConfig(), mk.M2IVConfig())
CHANGES = [(x, change) for x in CONFIGS for change in (scaled_in_place, new_data, new_parameters, trained)]


@pytest.mark.parametrize("config, change", [*CHANGES, (CONFIGS[1], fewer_keys)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_changed_parameters_are_seen(config, change, dtype):
    """Kernels take fp32, so of an adapter in bf16 there are copies, and of HiFICL's factors always."""
    model = tiny_model("llava-llama")
    adapter, inputs = random_of(model, config).to(dtype), text_of(model)
    with mk.attach(model, adapter):
        before = decoded(model, "dynamic", inputs)
        if change is trained:
            model(**inputs)  # with gradients
        change(adapter)
        actual = decoded(model, "dynamic", inputs)
        public = by_the_public_op(lambda: decoded(model, "dynamic", inputs))
        # Torch's sum has one rounding more than the operator's.
        assert relative_error(actual, public) <= (64 * EPS if config == mk.M2IVConfig() else 0)
    assert not torch.equal(actual, before)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_pass_of_fake_tensors_leaves_nothing(config):
    model = tiny_model("llava-llama")
    adapter, inputs = random_of(model, config), text_of(model)
    with mk.attach(model, adapter), torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(input_ids=torch.zeros(1, 1, dtype=torch.long))
        assert type(decoded(model, "dynamic", inputs)) is torch.Tensor


@pytest.mark.parametrize("config", CONFIGS)
def test_what_was_kept_is_not_saved(config, tmp_path):
    model = tiny_model("llava-llama")
    with mk.attach(model, random_of(model, config)):
        sizes = []
        for _ in range(2):
            sizes.append(len(pickle.dumps(model)))
            decoded(model, "dynamic", text_of(model))
    assert sizes[0] == sizes[1]


def test_other_views_of_the_same_memory_are_seen():
    stack, x = slots.SlotStack([], torch.device("cpu")), torch.nn.Parameter(torch.randn(4, 4))

    def prepared():
        return stack.prepared((x,), (), lambda: (x.detach().clone(),))[0]

    assert prepared() is prepared()
    for view in (x.data.t(), x.data[:3], x.data.view(torch.int32).view(torch.float32)[:, ::2]):
        x.data = view
        assert torch.equal(prepared(), x)


def stepped(model, adapter, inputs):
    """What is decoded after a step of a fused optimizer before which something was decoded, too."""
    model(**inputs).logits.square().mean().backward()
    decoded(model, "dynamic", inputs)
    torch.optim.AdamW(adapter.parameters(), lr=1.0, fused=True).step()
    return decoded(model, "dynamic", inputs)


@pytest.mark.parametrize("config", [mk.MimICConfig(), mk.LIVEConfig(), mk.M2IVConfig()])
def test_a_step_that_counts_as_no_change_is_seen(config):
    """Of parameters that kernels read themselves, in fp32."""
    model = tiny_model("llava-llama")
    adapter, inputs = random_of(model, config), text_of(model)
    with mk.attach(model, adapter):
        before = decoded(model, "dynamic", inputs)
        actual = stepped(model, adapter, inputs)
        public = by_the_public_op(lambda: decoded(model, "dynamic", inputs))
        assert relative_error(actual, public) <= (64 * EPS if config == mk.M2IVConfig() else 0)
    assert relative_error(before, actual) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vector_that_is_off_is_not_read(dtype):
    model = tiny_model("llava-llama").to(dtype)
    adapter, x = mk.create(model, mk.M2IVConfig()), torch.randn(2, 1, 32, dtype=dtype)
    x[0] = -0.0
    with torch.no_grad(), mk.attach(model, adapter) as handle:
        hooks = handle.anchors[0].mixer._forward_hooks.values()
        (hook,) = [x for x in hooks if isinstance(x, residual.ResidualHook)]
        assert not torch.equal(hook(None, (), x), x)
        adapter.layers["0"].attn.vector.fill_(torch.nan)
        adapter.layers["0"].attn.scale.fill_(0.0)
        shifted = hook(None, (), x)
    assert torch.equal(shifted, x) and torch.equal(shifted.signbit(), x.signbit())


def test_forward_mode_derivatives_are_refused():
    """As by the public ops: dropped, they would be wrong in silence."""
    model = tiny_model("llava-llama")
    x = torch.randn(1, 1, 32)
    for config in (mk.MimICConfig(), mk.LIVEConfig()):
        with (
            mk.attach(model, random_of(model, config)) as handle,
            torch.no_grad(),
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="jvp"),
        ):
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            if config == mk.LIVEConfig():
                handle.anchors[0].mlp(dual)
            q = dual.view(1, 4, 1, 8)
            hf_attention.attention_forward(handle.anchors[0].mixer, q, q, q, None, scaling=1.0)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_that_use_no_adapter(config):
    """One adapter, which is not that of all rows, or not of all tokens."""
    model = tiny_model("llava-llama")
    adapter, inputs = random_of(model, config), text_of(model)
    plain = decoded(model, "dynamic", inputs)
    with mk.attach(model, {"x": adapter}) as handle:
        adapted = decoded(model, "dynamic", inputs)
        with handle.rows(["x", None]):
            mixed = decoded(model, "dynamic", inputs)
        with handle.tokens("prompt"):
            prompt = decoded(model, "dynamic", inputs)
            assert relative_error(prompt, by_the_public_op(lambda: decoded(model, "dynamic", inputs))) == 0
    assert relative_error(mixed[0], adapted[0]) <= 64 * EPS and relative_error(mixed[1], plain[1]) <= 64 * EPS
    assert relative_error(plain[1], adapted[1]) > 1e-3 and relative_error(prompt, adapted) > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_windows_without_a_mask(is_causal, implementation):
    """sdpa hides by itself what is farther away, where it is causal; eager attends to all."""
    model = tiny_model("llava-llama", attn_implementation=implementation)
    with mk.attach(model, random_adapter(model)) as handle, torch.no_grad():
        anchor = handle.anchors[0]
        q, k = torch.randn(2, anchor.num_heads, 1, anchor.head_dim), torch.randn(2, 2, 7, anchor.head_dim)

        def out(key, window):
            options = {"scaling": 0.5, "is_causal": is_causal, "sliding_window": window}
            return hf_attention.attention_forward(anchor.mixer, q, key, key, None, **options)[0]

        hides = is_causal and implementation == "sdpa"
        assert torch.equal(out(k, 3), out(k[:, :, -3:], None) if hides else out(k, None))
        assert torch.equal(out(k, 3), by_the_public_op(lambda: out(k, 3)))


def test_what_is_left_to_the_public_op(monkeypatch):
    model = tiny_model("llava-llama").requires_grad_(False)
    adapter, inputs = random_adapter(model), text_of(model)
    results = counted(monkeypatch, "decode")
    with mk.attach(model, {"x": adapter, "y": random_adapter(model, seed=1)}) as handle:
        with handle.rows("x"):
            several = decoded(model, "dynamic", inputs)
        handle.remove("y")
        assert torch.equal(decoded(model, "dynamic", inputs), several)
        assert any(x is not None for x in results)
        for setting in ({"impl": "reference"}, {"impl": "composed"}):
            results.clear()
            handle.impl = setting["impl"]
            other = decoded(model, "dynamic", inputs)
            assert relative_error(other, several) <= 64 * EPS
            assert all((x is None) == (handle.impl == "reference") for x in results)
        handle.impl = "auto"
        results.clear()
        with torch.autocast("cpu", torch.bfloat16):
            decoded(model, "dynamic", inputs)
        assert results and not any(x is not None for x in results)
        results.clear()
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache).logits.sum().backward()
        assert results and not any(x is not None for x in results)
    assert all(x.grad is not None for x in adapter.parameters())


def python_calls(act):
    """Names of the functions of Python that ``act()`` calls."""
    names = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        act()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize("masked", [False, True])
def test_calls_of_python(masked, normalizer):
    """At most 12 for a layer and token: each costs as much as a head's shift."""
    model = tiny_model("llava-llama")
    with mk.attach(model, random_adapter(model, normalizer=normalizer)) as handle, torch.no_grad():
        anchor = handle.anchors[0]
        H, D, module = anchor.num_heads, anchor.head_dim, anchor.mixer
        q, k = torch.randn(2, H, 1, D), torch.randn(2, H, 7, D)
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool) if masked else None

        def act():
            hf_attention.attention_forward(module, q, k, k, mask, scaling=D**-0.5, dropout=0.0)

        act()
        calls = python_calls(act)
    assert calls[0] == "act" and len(calls) - 1 <= 12, calls


class Graphs:
    """A backend of torch.compile that counts what its graphs call."""

    def __init__(self):
        self.called = []

    def __call__(self, graph, _):
        self.called.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strength", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_vector_is_a_sum(dtype, strength):
    """Which the compiler sees; one that is off is not read here either."""
    model = tiny_model("llava-llama").to(dtype)
    adapter, inputs, graphs = random_of(model, mk.M2IVConfig()), text_of(model), Graphs()
    with torch.no_grad(), mk.attach(model, adapter, strength=strength):
        plain = model(**inputs).logits
        adapter.layers["1"].attn.vector.fill_(torch.nan)
        adapter.layers["1"].attn.scale.fill_(0.0)
        expected = model(**inputs).logits
        actual = torch.compile(model, backend=graphs, fullgraph=True)(**inputs).logits
    assert actual.isfinite().all() and not any(
        "residual_shift" in x for called in graphs.called for x in called
    )
    assert relative_error(actual, expected) <= 64 * torch.finfo(dtype).eps
    assert torch.equal(expected, plain) == (strength == 0)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
def test_a_compiled_step_calls_the_operator(normalizer):
    """Once in each layer, and nothing of ours that is Python."""
    model = tiny_model("llava-llama")
    adapter, inputs = random_adapter(model, normalizer=normalizer), text_of(model)
    with mk.attach(model, adapter), torch.no_grad():
        expected = decoded(model, "static", inputs)
        language, graphs = model.model.language_model, Graphs()
        language.forward, eager = (
            torch.compile(language.forward, backend=graphs, fullgraph=True),
            language.forward,
        )
        try:
            assert relative_error(decoded(model, "static", inputs), expected) <= 64 * EPS
        finally:
            language.forward = eager
    steps = [[x for x in called if "mmicl" in x] for called in graphs.called]
    layers = len(adapter.layers)
    assert ["mmicl.shifted_attention_inference.default"] * layers in [sorted(x) for x in steps]
