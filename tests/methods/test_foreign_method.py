"""A method of somebody else's: it acts, trains, is saved, mixes with others and is known to the command."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import mmicl_kernels as mk
from mmicl_kernels.cli import main
from mmicl_kernels.methods import (
    ADAPTERS,
    Adapter,
    AttentionSite,
    EmbeddingSite,
    ResidualSite,
    register,
)
from mmicl_kernels.methods.answers import answer_loss
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.models.anchors import describe_backbone, find_anchors
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from mmicl_kernels.testing.tiny_processors import tiny_processor
from mmicl_kernels.training import TrainedModule
from tests.methods.foreign_method import EverywhereAdapter, EverywhereConfig
from tests.support.records_of_colours import write_records
from tests.support.same_adapter import assert_same

NAME = "everywhere"


@pytest.fixture
def registered():
    register(EverywhereAdapter)
    yield
    del ADAPTERS[NAME]


@pytest.fixture
def model():
    return tiny_model("llava-llama")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_it_acts_at_every_site(registered, model):
    """Each of its parts by itself changes the output, and without any it is the plain model's."""
    inputs = tiny_inputs(model)
    adapter = mk.create(model, EverywhereConfig())
    plain = logits(model, inputs)
    parts = {"shift", "vector"}
    for kept in (set(), *({x} for x in parts), parts):
        with torch.no_grad():
            for layer in adapter.layers.values():
                for part in parts:
                    layer[part].fill_(1.0 if part in kept else 0.0)
        with mk.attach(model, adapter):
            changed = (logits(model, inputs) - plain).abs().max()
        assert (changed > 1e-3) == bool(kept), kept
    assert torch.equal(logits(model, inputs), plain)


def test_its_tokens_stand_for_demonstrations(registered, model, tmp_path):
    """What is spliced is what it fuses: the states at the answers, through its projection."""
    builder = mk.PromptBuilder(tiny_processor("llava"), "{image}{text} {answer}\n", positions="answer")
    adapter = mk.create(model, EverywhereConfig(size=0.0))
    with torch.no_grad():
        adapter.projection.mul_(0.5)
    shown = [mk.Demonstration((), "what?", "red"), mk.Demonstration((), "which?", "blue cat")]
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter, torch.float32)
    with mk.attach(model, adapter, bank=bank) as handle:
        inputs, positions = builder.demonstrations(shown)
        with handle.disabled(), torch.no_grad():
            states = model.base_model(**inputs).last_hidden_state
        fused = handle.aggregate(inputs, positions)
        for x, own, chosen in zip(fused, states, positions, strict=True):
            torch.testing.assert_close(x, 0.5 * own[chosen])
        ids = handle.add_demonstrations(shown, builder.demonstrations, progress=False)
        longer = handle.splice(builder.prompt([mk.Demonstration((), "say", "it")], [[]]), [ids])
        lengths = [len(x) for x in fused]
        assert longer["input_ids"].shape[1] > sum(lengths) and bank.lengths.tolist() == lengths


def test_rows_of_several_methods(registered, model):
    """Each row is what its adapters make of it alone."""
    torch.manual_seed(0)
    inputs = tiny_inputs(model)
    rows = len(inputs["input_ids"])
    adapters = {
        "ours": mk.create(model, mk.M2IVConfig()),
        "theirs": mk.create(model, EverywhereConfig()),
        "shift": mk.create(model, mk.MimICConfig()),
    }
    chosen = [("ours", "theirs"), "shift", None, "theirs"][:rows]
    expected = []
    for i, entry in enumerate(chosen):
        with mk.attach(model, adapters) as handle, handle.rows(entry):
            expected.append(logits(model, inputs)[i])
    with mk.attach(model, adapters) as handle:
        assert "theirs" in str(handle.report()) and "'theirs' (everywhere)" in repr(handle)
        with handle.rows(chosen):
            torch.testing.assert_close(logits(model, inputs), torch.stack(expected), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"\('theirs', 'shift'\), expected at most one that shifts"):
            handle.rows(("theirs", "shift"))
        with pytest.raises(ValueError, match="strength is 0.5, expected 1: 'theirs' is a EverywhereAdapter"):
            handle.rows({"theirs": 0.5})
        with pytest.raises(ValueError, match="has tokens before the prompt as 'theirs' has"):
            handle.add("aim", mk.create(model, mk.AIMConfig()))


def test_it_is_saved_and_stored(registered, model, tmp_path):
    adapter = mk.create(model, EverywhereConfig(size=0.25))
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = mk.load(tmp_path / "adapter", model)
    assert loaded.config == adapter.config
    assert_same(loaded, adapter)
    library = mk.VLibrary(tmp_path / "library")
    library.put("theirs", adapter)
    assert library.entry("theirs").method == NAME
    assert_same(library.get("theirs"), adapter)


def test_it_trains(registered, model, tmp_path):
    """By mk.train, to the end of the loss's fall, with every part learnt."""
    records = write_records(tmp_path)
    torch.manual_seed(0)
    adapter = mk.train(
        model, tiny_processor("llava", chat=True), records, EverywhereConfig(size=0.01), shots=2, steps=8,
        arguments={"learning_rate": 0.02}, out=tmp_path / "out", progress=False,
    )  # fmt: skip
    losses = [
        x["loss"] for x in json.loads((tmp_path / "out" / "training.json").read_text())["log"] if "loss" in x
    ]
    assert losses[-1] < losses[0]
    again = mk.load(tmp_path / "out", model)
    assert_same(again, adapter)
    assert not torch.equal(adapter.projection, torch.eye(len(adapter.projection)))


def test_the_command_trains_it(model, tmp_path, capfd):
    """A module that registers it is imported by --import; its fields are --config's."""
    (tmp_path / "brings_it.py").write_text(
        "from tests.methods.foreign_method import EverywhereAdapter\n"
        "from mmicl_kernels.methods import register\n"
        "register(EverywhereAdapter)\n"
    )
    saved = tmp_path / "model"
    model.save_pretrained(saved)
    tiny_processor("llava", chat=True).save_pretrained(saved)
    options = [
        "train", "--model", str(saved), "--data", str(write_records(tmp_path)), "--out",
        str(tmp_path / "out"), "--shots", "2", "--steps", "2", "--accumulate", "1", "--config", "size=0.5",
    ]  # fmt: skip
    code = main([*options, "--method", NAME])
    assert code != 0 and "--method is 'everywhere', expected one of mimic" in capfd.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert main([*options, "--method", NAME, "--import", "brings_it"]) == 0
    try:
        assert f"{tmp_path / 'out'}: EverywhereAdapter" in capfd.readouterr().out
        assert mk.load(tmp_path / "out", model).config == EverywhereConfig(size=0.5)
        library = str(tmp_path / "library")
        assert main(["library", "add", "theirs", str(tmp_path / "out"), "--library", library]) == 0
        capfd.readouterr()
        assert main(["library", "show", "theirs", "--library", library]) == 0
        assert NAME in capfd.readouterr().out
    finally:
        del ADAPTERS[NAME]


@dataclass(frozen=True)
class NeedingConfig:
    """Annotated by what is not there when it runs, as under TYPE_CHECKING."""

    size: float
    kind: "Absent" = "a"  # noqa: F821
    derived: int = field(init=False, default=0)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "--config size=VALUE is missing, NeedingConfig needs it"),
        (["size=x"], "--config size cannot be given, its type is not known: name 'Absent' is not defined"),
        (["kind=b"], "--config size=VALUE is missing"),
        (["derived=1"], "--config is 'derived=1', expected one of kind, size"),
    ],
)
def test_fields_without_a_default(given, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(ADAPTERS._known, NAME, type("Needing", (), {"config_class": NeedingConfig}))
    options = ["train", "--model", "m", "--data", "d", "--out", str(tmp_path), "--method", NAME]
    assert main(options + [x for pair in given for x in ("--config", pair)]) != 0
    assert message in capsys.readouterr().err


def test_an_entry_point_brings_it(model, tmp_path, monkeypatch):
    """An installed package's, without an import by name: it is listed, and loaded when it is asked for."""
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[mmicl_kernels.methods]\n{NAME} = tests.methods.foreign_method:EverywhereAdapter\n"
    )
    assert NAME not in ADAPTERS
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert NAME in list(ADAPTERS) and ADAPTERS[NAME] is EverywhereAdapter
        mk.create(model, EverywhereConfig()).save_pretrained(tmp_path / "adapter")
        assert isinstance(mk.load(tmp_path / "adapter", model), EverywhereAdapter)
    finally:
        del ADAPTERS[NAME]


@pytest.mark.parametrize(
    "value, text",
    [
        ("broken_module:Adapter", "RuntimeError"),
        ("no_such_module:Adapter", "ModuleNotFoundError"),
        ("json:dumps", "no adapter class of method 'broken'"),
    ],
)
def test_a_broken_package_hurts_nobody_else(model, tmp_path, monkeypatch, value, text):
    """What it brings is not loaded for others; for a config that nobody knows it is said what failed."""
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mmicl_kernels.methods]\nbroken = {value}\n")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('needs a licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    mk.attach(model, mk.create(model, mk.MimICConfig())).detach()
    with pytest.raises(TypeError, match="'a' is a int, expected one of MimICAdapter"):
        mk.attach(model, {"a": 3})
    with (
        pytest.warns(UserWarning, match=f"method 'broken' cannot be loaded.*{text}"),
        pytest.raises(TypeError, match="config is a dict, expected one of MimICConfig"),
    ):
        mk.create(model, {})


@dataclass(frozen=True)
class DriftConfig(mk.MimICConfig):
    """Made from a config of ours, and not that one."""

    extra: float = 2.0


class DriftAdapter(mk.MimICAdapter):
    """MimIC under another name."""

    method, config_class = "drift", DriftConfig


def test_a_method_made_from_one_of_ours(model, tmp_path):
    """Its config makes it, it is trained by what it inherits, and it is loaded as what it was."""
    register(DriftAdapter)
    try:
        adapter = mk.create(model, DriftConfig())
        assert type(adapter) is DriftAdapter
        adapter.save_pretrained(tmp_path / "adapter")
        assert mk.load(tmp_path / "adapter", model).config == DriftConfig()
        module = TrainedModule(model, adapter)
        assert type(module.objective).__name__ == "MimICObjective"
        module.handle.detach()
    finally:
        del ADAPTERS["drift"]


class PushAdapter(Adapter):
    """A vector after each MLP, with a scale that is a plain number."""

    method, config_class = "push", EverywhereConfig
    residual_sites = (ResidualSite("mlp", preserve_norm=False),)

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.gain = nn.Parameter(torch.tensor(1.0))
        for index in backbone.layers:
            self.layers[str(index)] = nn.ParameterDict({"vector": torch.randn(backbone.hidden_size)})

    @staticmethod
    def tensor_shapes(config, backbone):
        shapes = {f"layers.{index}.vector": (backbone.hidden_size,) for index in backbone.layers}
        return {"gain": (), **shapes}

    def residual_shift(self, site, index):
        return self.layers[index]["vector"], 1.0


def test_a_strength_reaches_a_scale_that_is_a_number(model):
    """0 is the plain model, bit for bit, for one adapter and in rows; a digest takes a scalar parameter."""
    inputs = tiny_inputs(model)
    plain, adapter = logits(model, inputs), PushAdapter(EverywhereConfig(), _backbone(model))
    with mk.attach(model, adapter) as handle:
        whole = logits(model, inputs)
        assert not torch.allclose(whole, plain)
        with handle.strength(0):
            assert torch.equal(logits(model, inputs), plain)
        with handle.strength(0.5):
            half = logits(model, inputs)
            with handle.rows("default"):
                torch.testing.assert_close(logits(model, inputs), half)
        assert not torch.allclose(half, whole) and not torch.allclose(half, plain)
    assert len(adapter.digest()) == 64 and mk.create(model, mk.M2IVConfig()).digest() != adapter.digest()


def test_layers_that_are_missing_are_said_at_attach(model):
    """Not in the middle of a forward pass; and the model stays plain."""
    adapter = EverywhereAdapter(EverywhereConfig(), _backbone(model))
    del adapter.layers["0"]
    with pytest.raises(
        ValueError, match="adapter 'default' has nothing for layer 0: .*; expected parameters"
    ):
        mk.attach(model, adapter)
    assert mk.handle_of(model) is None


@dataclass(frozen=True)
class SequencesConfig:
    pairs: tuple = ((1, 2),)
    sizes: tuple[int, ...] | None = None
    names: list = field(default_factory=list)


class BufferedAdapter(PushAdapter):
    method, config_class = "buffered", SequencesConfig

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.register_buffer("count", torch.tensor(3.0))

    @staticmethod
    def tensor_shapes(config, backbone):
        return {"count": (), **PushAdapter.tensor_shapes(config, backbone)}


def test_buffers_and_sequences_come_back(model, tmp_path):
    """Where the model is, and tuples as tuples: JSON has lists alone."""
    register(BufferedAdapter)
    try:
        adapter = mk.create(model, SequencesConfig(((4, 5), (6,)), (7,), ["a"]))
        adapter.save_pretrained(tmp_path / "adapter")
        loaded = mk.load(tmp_path / "adapter", model)
        assert loaded.config == adapter.config and loaded.count == 3
        assert mk.create(model.to("meta"), SequencesConfig()).count.device.type == "meta"
    finally:
        del ADAPTERS["buffered"]


def test_a_buffer_that_no_file_has(model, tmp_path):
    class Unsaved(PushAdapter):
        method = "unsaved"

        def __init__(self, config, backbone):
            super().__init__(config, backbone)
            self.register_buffer("mask", torch.ones(2), persistent=False)

    register(Unsaved)
    try:
        Unsaved(EverywhereConfig(), _backbone(model)).save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"Unsaved has the buffers \['mask'\], expected persistent ones"):
            mk.load(tmp_path / "adapter", model)
    finally:
        del ADAPTERS["unsaved"]


def test_nothing_is_left_behind_by_what_fails(model):
    """A method without an objective, and one whose parameters fail while rows are open."""

    class Failing(PushAdapter):
        def residual_shift(self, site, index):
            raise RuntimeError("no numbers")

    inputs, backbone = tiny_inputs(model), _backbone(model)
    plain = logits(model, inputs)
    with pytest.raises(TypeError, match="PushAdapter has no objective_class"):
        TrainedModule(model, PushAdapter(EverywhereConfig(), backbone))
    assert mk.handle_of(model) is None
    with mk.attach(model, mk.create(model, mk.M2IVConfig())) as handle, handle.rows("default"):
        before = logits(model, inputs)
        with pytest.raises(RuntimeError, match="no numbers"):
            handle.add("bad", Failing(EverywhereConfig(), backbone))
        assert [*handle.adapters] == ["default"]
        assert torch.equal(logits(model, inputs), before)
    assert torch.equal(logits(model, inputs), plain)


def _backbone(model):
    return describe_backbone(model, find_anchors(model))


def test_sites_name_what_there_is():
    for make, message in (
        (lambda: ResidualSite("after_mlp", preserve_norm=False), "module is 'after_mlp', expected one of"),
        (lambda: AttentionSite("all"), "normalizer is 'all', expected one of"),
        (lambda: EmbeddingSite("images"), "positions is 'images', expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_what_is_no_method_is_refused():
    class Nameless(Adapter):
        config_class = EverywhereConfig

    class Mine(Adapter):
        method, config_class = "mimic", EverywhereConfig

    @dataclass
    class NoAdapter:
        method = "x"

    for wrong, error, message in (
        (NoAdapter, TypeError, "expected a subclass of Adapter"),
        (Nameless, TypeError, "Nameless has method None"),
        (Mine, ValueError, "method 'mimic' is MimICAdapter's, expected another name"),
    ):
        with pytest.raises(error, match=message):
            register(wrong)
    assert register(ADAPTERS["mimic"]) is ADAPTERS["mimic"] is mk.MimICAdapter


def test_the_loss_has_gradients_at_every_site(registered, model):
    """Of all its parameters at once, behind spliced tokens."""
    builder = mk.PromptBuilder(tiny_processor("llava"), "{image}{text} {answer}\n", positions="answer")
    adapter = mk.create(model, EverywhereConfig())
    inputs, labels = builder.queries([mk.Demonstration((), "say", "it")])
    with mk.attach(model, adapter) as handle:
        fused = handle.aggregate(*builder.demonstrations([mk.Demonstration((), "what?", "red")]))
        offsets = torch.tensor([0, len(fused[0])])
        longer = handle.splice(
            {**inputs, "labels": labels}, [[0]], tokens=FusedTokens(fused[0], offsets, None)
        )
        labels = longer.pop("labels")
        answer_loss(model, longer, labels).backward()
    for name, x in adapter.named_parameters():
        assert x.grad is not None and x.grad.abs().sum() > 0, name
