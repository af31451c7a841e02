"""Files from elsewhere: the official encoder.pth both ways, and everything that is not an adapter."""

import io
import json
import pickle
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmicl_kernels as mk
from mmicl_kernels.methods.base import CONFIG_FILE, TENSORS_FILE
from mmicl_kernels.store import read_adapter
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model

LAYERS, HEADS, HEAD_DIM, HIDDEN = 3, 4, 8, 32  # of every tiny model but Idefics v1


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava-llama")


@pytest.fixture
def folder(model, tmp_path):
    mk.create(model, mk.MimICConfig()).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def model_stays_plain(model):
    """Whatever a test does to files, the model is what it was."""
    inputs = tiny_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        yield
        assert torch.equal(model(**inputs).logits, before)
    assert not [x for x in model.modules() if hasattr(x, "mmicl_layer")]


def official(dtype=torch.float32, *, ffn_shift=False, **replaced):
    """``encoder.pth`` as the official code's ``state_dict`` names it."""
    encoder = {"attn_shift": torch.randn(LAYERS, HEADS, HEAD_DIM, dtype=dtype)}
    for layer in range(LAYERS):
        encoder[f"log_Z1_lin.{layer}.weight"] = torch.randn(HEADS, HEAD_DIM, dtype=dtype)
        encoder[f"log_Z1_lin.{layer}.bias"] = torch.randn(HEADS, dtype=dtype)
    if ffn_shift:
        encoder["ffn_shift"] = torch.randn(LAYERS, HIDDEN, dtype=dtype)
    return {**encoder, **replaced}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        assert torch.equal(actual[name].detach(), x), name


@pytest.mark.parametrize("ffn_shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_official_both_ways(model, tmp_path, dtype, ffn_shift):
    encoder = official(dtype, ffn_shift=ffn_shift)
    torch.save(encoder, tmp_path / "encoder.pth")
    adapter = mk.load_official(tmp_path / "encoder.pth", model)
    assert adapter.config.alignment == "mean_square" and adapter.config.normalizer == "all_keys"
    assert adapter.config.ffn_shift == ffn_shift
    for layer in range(LAYERS):
        of = adapter.layers[str(layer)]
        assert torch.equal(of.shift, encoder["attn_shift"][layer])
        assert torch.equal(of.weight, encoder[f"log_Z1_lin.{layer}.weight"])
        assert torch.equal(of.bias, encoder[f"log_Z1_lin.{layer}.bias"])
    assert {x.dtype for x in adapter.parameters()} == {dtype}

    mk.save_official(adapter, tmp_path / "again.pth")
    assert_same_tensors(torch.load(tmp_path / "again.pth", weights_only=True), encoder)
    # Through our own format as well.
    adapter.save_pretrained(tmp_path / "ours")
    mk.save_official(mk.load(tmp_path / "ours", model), tmp_path / "third.pth")
    assert_same_tensors(torch.load(tmp_path / "third.pth", weights_only=True), encoder)


def test_official_keeps_mixed_dtypes_and_special_values(model, tmp_path):
    encoder = official()
    encoder["log_Z1_lin.1.bias"] = torch.tensor([0.0, -0.0, 1e-45, 3e38])
    encoder["log_Z1_lin.2.weight"] = encoder["log_Z1_lin.2.weight"].half()
    torch.save(encoder, tmp_path / "encoder.pth")
    mk.save_official(mk.load_official(tmp_path / "encoder.pth", model), tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same_tensors(again, encoder)
    assert torch.equal(torch.signbit(again["log_Z1_lin.1.bias"]), torch.tensor([False, True, False, False]))


def test_official_acts(model, tmp_path):
    """A checkpoint written by hand shifts the model as its tensors say."""
    encoder = official()
    torch.save(encoder, tmp_path / "encoder.pth")
    inputs = tiny_inputs(model)
    same = mk.create(model, mk.MimICConfig(normalizer="all_keys"))
    with torch.no_grad():
        for layer, of in same.layers.items():
            of.shift.copy_(encoder["attn_shift"][int(layer)])
            of.weight.copy_(encoder[f"log_Z1_lin.{layer}.weight"])
            of.bias.copy_(encoder[f"log_Z1_lin.{layer}.bias"])
        with mk.attach(model, mk.load_official(tmp_path / "encoder.pth", model)):
            actual = model(**inputs).logits
        with mk.attach(model, same):
            assert torch.equal(actual, model(**inputs).logits)
        assert not torch.equal(actual, model(**inputs).logits)


def test_export_of_another_gate_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="normalizer is 'visible'.*'all_keys'"):
        mk.save_official(mk.create(model, mk.MimICConfig()), tmp_path / "x.pth")
    with pytest.raises(TypeError, match="adapter is a Linear"):
        mk.save_official(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


def test_export_of_uneven_layers_is_refused(model, tmp_path):
    adapter = mk.create(model, mk.MimICConfig(normalizer="all_keys"))
    adapter.backbone.layers[1] = (2, 16)
    with pytest.raises(ValueError, match="layers differ"):
        mk.save_official(adapter, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


def without(name):
    encoder = official()
    del encoder[name]
    return encoder


def live_own(**replaced):
    """``icv_cpk.pth`` as LIVE's code writes it."""
    icv, alpha = torch.randn(1, LAYERS, HIDDEN), torch.rand(1, LAYERS)
    settings = {"intervention_layer": -1, "layer_format": "model.layers.<LAYER_NUM>.mlp"}
    tensors = {"icv_encoder.icv": icv, "icv_encoder.alpha": alpha, "temperature": torch.tensor(1.0)}
    return {**tensors, "lmm_args": settings, "use_sigmoid": False, **replaced}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_official_live_both_ways(model, tmp_path, dtype):
    vectors, scales = torch.randn(LAYERS, HIDDEN, dtype=dtype), torch.rand(LAYERS, dtype=dtype)
    encoder = {"ffn_shift": vectors, "ffn_shift_scale": scales}
    torch.save(encoder, tmp_path / "encoder.pth")
    adapter = mk.load_official(tmp_path / "encoder.pth", model)
    assert adapter.config == mk.LIVEConfig(site="mlp")
    for layer in range(LAYERS):
        of = adapter.layers[str(layer)]
        assert torch.equal(of.vector, vectors[layer]) and torch.equal(of.scale, scales[layer])
    mk.save_official(adapter, tmp_path / "again.pth")
    assert_same_tensors(torch.load(tmp_path / "again.pth", weights_only=True), encoder)
    with pytest.raises(ValueError, match="site is 'layer', expected 'mlp'"):
        mk.save_official(mk.create(model, mk.LIVEConfig(site="layer")), tmp_path / "again.pth")


@pytest.mark.parametrize("site, end", [("mlp", ".mlp"), ("layer", "")])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_lives_own_files(model, tmp_path, site, end, sigmoid):
    settings = {"layer_format": f"model.model.layers.<LAYER_NUM>{end}", "total_layers": LAYERS}
    content = live_own(lmm_args=settings, use_sigmoid=sigmoid)
    if site == "layer":  # as an older version of that code called them
        content["icv_intervention_args"] = content.pop("lmm_args")
    torch.save(content, tmp_path / "icv_cpk.pth")
    adapter = mk.load_official(tmp_path / "icv_cpk.pth", model)
    assert adapter.config.site == site
    alpha = content["icv_encoder.alpha"][0]
    for layer in range(LAYERS):
        of = adapter.layers[str(layer)]
        assert torch.equal(of.vector, content["icv_encoder.icv"][0, layer])
        assert torch.equal(of.scale, alpha.sigmoid()[layer] if sigmoid else alpha[layer])


def test_a_lora_beside_the_file_is_not_lost(model, tmp_path):
    peft = pytest.importorskip("peft")
    torch.save(official(), tmp_path / "encoder.pth")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(mk.CheckpointError, match="adapter_config.json beside encoder.pth"):
        mk.load_official(tmp_path / "encoder.pth", model)
    with pytest.raises(FileNotFoundError):
        mk.load_official(tmp_path / "nowhere.pth", model)
    lora = peft.get_peft_model(tiny_model("llava-llama"), peft.LoraConfig(target_modules=["q_proj"]))
    adapter = mk.load_official(tmp_path / "encoder.pth", lora)
    assert adapter.config.normalizer == "all_keys"


HOSTILE = {
    "LIVE's of another width": (
        {"ffn_shift": torch.randn(LAYERS, 7), "ffn_shift_scale": torch.rand(LAYERS)},
        r"ffn_shift has shape \[3, 7\]",
    ),
    "LIVE's and more": (
        {
            "ffn_shift": torch.randn(LAYERS, HIDDEN),
            "ffn_shift_scale": torch.rand(LAYERS),
            "x": torch.zeros(1),
        },
        r"unknown \['x'\]",
    ),
    "LIVE's own, elsewhere": (
        live_own(lmm_args={"layer_format": "model.layers.<LAYER_NUM>.self_attn"}),
        "layer_format 'model.layers.<LAYER_NUM>.self_attn'.*expected a name that ends in <LAYER_NUM>",
    ),
    "LIVE's own, without settings": (live_own(lmm_args={}), "layer_format None"),
    "LIVE's own, settings of another kind": (live_own(lmm_args=[1]), "dict of"),
    "LIVE's own, of some layers": (
        live_own(**{"icv_encoder.icv": torch.randn(1, 2, HIDDEN)}),
        r"\[1, 2, 32\], expected \[1, 3, 32\]",
    ),
    "LIVE's own, not of a batch": (
        live_own(**{"icv_encoder.alpha": torch.rand(LAYERS)}),
        r"icv_encoder.alpha has shape \[3\], expected \[1, 3\]",
    ),
    "LIVE's own, one layer": (live_own(lmm_args={"layer_format": "model.layers.0.mlp"}), "layer_format"),
    "LIVE's own and more": (live_own(**{"lora.q_proj.lora_A": torch.zeros(1)}), r"unknown \['lora.q_proj"),
    "LIVE's own, a tensor as a setting": (live_own(use_sigmoid=torch.ones(2)), "dict of"),
    "LIVE's own, integers": (
        live_own(use_sigmoid=True, **{"icv_encoder.alpha": torch.ones(1, LAYERS, dtype=torch.int64)}),
        "floating",
    ),
    "LIVE's own, NaN": (
        live_own(**{"icv_encoder.alpha": torch.full((1, LAYERS), torch.nan)}),
        "icv_encoder.alpha.*finite",
    ),
    "no shift": (without("attn_shift"), "none of attn_shift, K_learn_A, ffn_shift_scale"),
    "no weight": (without("log_Z1_lin.1.weight"), r"lacks log_Z1_lin\.1\.weight"),
    "no bias": (without("log_Z1_lin.2.bias"), r"lacks log_Z1_lin\.2\.bias"),
    "LIVE's": ({"ffn_shift": torch.randn(LAYERS, HIDDEN)}, "none of attn_shift, K_learn_A, ffn_shift_scale"),
    "LoRA's": ({}, "none of attn_shift, K_learn_A, ffn_shift_scale"),
    "more layers": (official(attn_shift=torch.randn(4, HEADS, HEAD_DIM)), r"\[4, 4, 8\].*\[3, 4, 8\]"),
    "heads not apart": (official(attn_shift=torch.randn(LAYERS, HIDDEN)), r"\[3, 32\], expected"),
    "other heads": (
        official(**{"log_Z1_lin.0.weight": torch.randn(HEAD_DIM, HEADS)}),
        r"layers\.0\.weight has shape \[8, 4\], expected \[4, 8\]",
    ),
    "bias of a scalar": (
        official(**{"log_Z1_lin.0.bias": torch.tensor(0.0)}),
        r"layers\.0\.bias has shape \[\]",
    ),
    "ffn of another width": (
        official() | {"ffn_shift": torch.randn(LAYERS, 7)},
        r"ffn_shift has shape \[3, 7\]",
    ),
    "unknown": (official(**{"lmm.weight": torch.randn(2)}), "1 tensors beside"),
    "layer too many": (
        official(**{"log_Z1_lin.3.weight": torch.randn(4, 8), "log_Z1_lin.3.bias": torch.randn(4)}),
        "2 tensors beside",
    ),
    "nan": (official(attn_shift=torch.full((LAYERS, HEADS, HEAD_DIM), torch.nan)), "finite"),
    "infinite": (official(**{"log_Z1_lin.0.bias": torch.full((HEADS,), torch.inf)}), "finite"),
    "integers": (official(attn_shift=torch.ones(LAYERS, HEADS, HEAD_DIM, dtype=torch.int64)), "floating"),
    "complex": (official(attn_shift=torch.ones(LAYERS, HEADS, HEAD_DIM, dtype=torch.complex64)), "floating"),
    "fp8": (
        official(attn_shift=torch.ones(LAYERS, HEADS, HEAD_DIM).to(torch.float8_e4m3fn)),
        "floating",
    ),
    "sparse": (official(attn_shift=torch.ones(LAYERS, HEADS, HEAD_DIM).to_sparse()), "dense tensors"),
    "meta": (official(attn_shift=torch.ones(LAYERS, HEADS, HEAD_DIM, device="meta")), "dense tensors"),
    "huge by stride": (
        official(attn_shift=torch.zeros(1, 1, 1).expand(10**6, 10**6, 10**3)),
        r"\[1000000, 1000000, 1000\], expected",
    ),
    "a list": ([torch.zeros(2)], "dict of"),
    "numbers": ({"attn_shift": 3.0}, "dict of"),
    "a tensor": (torch.zeros(2), "dict of"),
    "named by numbers": ({0: torch.zeros(2)}, "dict of"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_official_files(model, tmp_path, case):
    content, message = HOSTILE[case]
    torch.save(content, tmp_path / "encoder.pth")
    with pytest.raises(mk.CheckpointError, match=message):
        mk.load_official(tmp_path / "encoder.pth", model)


class Code:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_code_in_a_pickle_does_not_run(model, tmp_path, writer):
    encoder, path = official(attn_shift=Code(tmp_path / "ran")), tmp_path / "encoder.pth"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(encoder["attn_shift"]))
    else:
        torch.save(encoder, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(mk.CheckpointError, match="not a checkpoint of tensors"):
        mk.load_official(path, model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_official_files(model, tmp_path, zipped):
    """Cut off anywhere and with any byte changed: an error or the tensors, never another exception."""
    buffer = io.BytesIO()
    torch.save(official(), buffer, _use_new_zipfile_serialization=zipped)
    good, path = buffer.getvalue(), tmp_path / "encoder.pth"
    generator = torch.Generator().manual_seed(0)

    def draw(limit):
        return int(torch.randint(limit, (1,), generator=generator))

    for length in [0, 1, *(draw(len(good)) for _ in range(60))]:
        path.write_bytes(good[:length])
        with pytest.raises(mk.CheckpointError):
            mk.load_official(path, model)
    refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        damaged[draw(min(len(good), 1500))] ^= 1 + draw(255)
        path.write_bytes(bytes(damaged))
        try:
            mk.load_official(path, model)
        except mk.CheckpointError:
            refused += 1
    assert refused > 10, "the damage was harmless, so the test shows nothing"


@pytest.mark.parametrize("load", [mk.load, mk.load_official])
def test_nothing_there(model, tmp_path, load):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere", model)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_missing_file(model, folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        mk.load(folder, model)


def test_load_places_and_checks(model, folder):
    loaded = mk.load(folder, model)
    state = load_file(folder / TENSORS_FILE)
    assert_same_tensors(dict(loaded.state_dict()), state)
    assert type(loaded) is mk.MimICAdapter
    assert_same_tensors(dict(read_adapter(folder).state_dict()), state)
    with mk.attach(model, loaded):
        pass


def smaller(model):
    model.model.language_model.layers = model.model.language_model.layers[:2]
    return model


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: tiny_model("llava-llama", seed=1), "weights are not those"),
        (lambda: tiny_model("llava-qwen2"), "text_model_type"),
        (lambda: tiny_model("idefics2"), "model_type.*text_model_type"),
        (lambda: tiny_model("idefics"), "layers"),
        (lambda: smaller(tiny_model("llava-llama")), "layers is"),
    ],
)
def test_checkpoint_of_another_backbone(folder, other, message):
    with pytest.raises(mk.CheckpointError, match=f"belongs to another backbone.*{message}"):
        mk.load(folder, other())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_backbone_at_another_precision(folder, dtype):
    mk.load(folder, tiny_model("llava-llama").to(dtype))


def edited(folder, edit):
    path = folder / CONFIG_FILE
    description = json.loads(path.read_text())
    edit(description, description["config"], description["backbone"])
    path.write_text(json.dumps(description))


BAD_FIELDS = {
    "no method": lambda d, c, b: d.pop("method"),
    "no backbone": lambda d, c, b: d.pop("backbone"),
    "unknown method": lambda d, c, b: d.update(method="lora"),
    "method is a list": lambda d, c, b: d.update(method=[]),
    "method is null": lambda d, c, b: d.update(method=None),
    "format of the future": lambda d, c, b: d.update(format_version=2),
    "config is a list": lambda d, c, b: d.update(config=[]),
    "config is null": lambda d, c, b: d.update(config=None),
    "unknown field": lambda d, c, b: c.update(rank=8),
    "normalizer is a list": lambda d, c, b: c.update(normalizer=[]),
    "weight is a word": lambda d, c, b: c.update(align_weight="much"),
    "weight is null": lambda d, c, b: c.update(ce_weight=None),
    "weight is nan": lambda d, c, b: c.update(ce_weight=float("nan")),
    "ffn_shift that is not there": lambda d, c, b: c.update(ffn_shift=True),
    "backbone is a list": lambda d, c, b: d.update(backbone=[]),
    "backbone is a word": lambda d, c, b: d.update(backbone="llava"),
    "no layers": lambda d, c, b: b.pop("layers"),
    "layers is null": lambda d, c, b: b.update(layers=None),
    "layers is a list": lambda d, c, b: b.update(layers=[[4, 8]]),
    "layer of three": lambda d, c, b: b["layers"].update({"0": [4, 8, 1]}),
    "layer is a number": lambda d, c, b: b["layers"].update({"0": 4}),
    "layer named by a word": lambda d, c, b: b["layers"].update(first=[4, 8]),
    "heads in a string": lambda d, c, b: b["layers"].update({"0": ["4", 8]}),
    "heads with a fraction": lambda d, c, b: b["layers"].update({"0": [4.5, 8]}),
    "heads infinite": lambda d, c, b: b["layers"].update({"0": [float("inf"), 8]}),
    "heads negative": lambda d, c, b: b["layers"].update({"0": [-4, -8]}),
    "heads many": lambda d, c, b: b.update(layers={str(i): [2**40, 2**40] for i in range(3)}),
    "layers many": lambda d, c, b: b.update(layers={str(i): [2**40, 8] for i in range(5000)}),
    "hidden size a word": lambda d, c, b: b.update(hidden_size="32"),
    "hidden size huge": lambda d, c, b: (b.update(hidden_size=2**70), c.update(ffn_shift=True)),
    "class is null": lambda d, c, b: b.update(model_class=None),
    "name is a list": lambda d, c, b: b.update(name=[]),
    "unknown fact": lambda d, c, b: b.update(owner="me"),
    "fingerprint is null": lambda d, c, b: b.update(fingerprint=None),
    "fingerprint of words": lambda d, c, b: b.update(fingerprint=["a"]),
    "fingerprint of nan": lambda d, c, b: b.update(fingerprint=[float("nan")] * 128),
    "fingerprint too large": lambda d, c, b: b.update(fingerprint=[10**400]),
    "fingerprint overflows fp32": lambda d, c, b: b.update(fingerprint=[1e39] * 128),
    "fingerprint overflows fp64": lambda d, c, b: b.update(fingerprint=[1e300] * 128),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_json_with_bad_fields(model, folder, case):
    edited(folder, BAD_FIELDS[case])
    tracemalloc.start()
    with pytest.raises(mk.CheckpointError):
        mk.load(folder, model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24, "shapes are believed before the tensors are seen"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
        b"\x80\x04K\x01.",
        b'{"method": 1}',
    ],
)
def test_not_json(model, folder, text):
    (folder / CONFIG_FILE).write_bytes(text)
    with pytest.raises(mk.CheckpointError, match=CONFIG_FILE):
        mk.load(folder, model)


def test_truncated_safetensors(model, folder):
    path = folder / TENSORS_FILE
    good = path.read_bytes()
    for length in (0, 4, 8, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(mk.CheckpointError, match="not a readable safetensors file"):
            mk.load(folder, model)


def test_hostile_safetensors_headers(model, folder):
    path = folder / TENSORS_FILE
    headers = [
        (2**63, b"{}"),  # a header longer than any file
        (2, b"[]"),
        (None, b'{"layers.0.weight": {"dtype": "F32", "shape": [1099511627776, 8], "data_offsets": [0, 8]}}'),
        (None, b'{"layers.0.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 4398046511104]}}'),
    ]
    for length, header in headers:
        length = len(header) if length is None else length
        path.write_bytes(length.to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(mk.CheckpointError):
            mk.load(folder, model)


def broken(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


BAD_TENSORS = {
    "nan": (broken, "finite"),
    "infinite": (lambda x: x.fill_(torch.inf), "finite"),
    "integers": (lambda x: x.int(), "floating"),
    "fp8": (lambda x: x.to(torch.float8_e4m3fn), "floating"),
    "transposed": (lambda x: x.T.contiguous(), r"has shape \[8, 4\], expected \[4, 8\]"),
    "gone": (lambda x: None, r"lacks \['layers\.1\.weight'\]"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(model, folder, case):
    change, message = BAD_TENSORS[case]
    tensors = load_file(folder / TENSORS_FILE)
    changed = change(tensors.pop("layers.1.weight"))
    if changed is not None:
        tensors["layers.1.weight"] = changed
    save_file(tensors, folder / TENSORS_FILE)
    with pytest.raises(mk.CheckpointError, match=message):
        mk.load(folder, model)


def test_unknown_tensors(model, folder):
    tensors = load_file(folder / TENSORS_FILE)
    save_file({**tensors, "layers.7.weight": torch.zeros(4, 8)}, folder / TENSORS_FILE)
    with pytest.raises(mk.CheckpointError, match=r"unknown \['layers\.7\.weight'\]"):
        mk.load(folder, model)
