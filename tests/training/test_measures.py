"""Which part of a loss decides: shares and gradients by their definitions, warnings that name the place."""

import warnings

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.m2iv.objective import synergy
from mmicl_kernels.methods.measures import alignment_shares, describe_large_shares, layer_shares
from mmicl_kernels.ops import alignment_loss
from mmicl_kernels.testing.tiny_models import tiny_model
from mmicl_kernels.training import TrainedModule, TrainingConfig, train, trainable
from tests.support.episode_inputs import aggregation, episode, objective_of
from tests.support.published import in_double, random_adapter
from tests.support.residuals import random_shift
from tests.training.watching import Largest

LAYERS, N, C = [0, 2, 5, 7], 10, 6
ROUNDING = 1024 * torch.finfo(torch.float64).eps
QUERY = torch.zeros(3, 9, dtype=torch.bool)
QUERY[0, 2:7] = QUERY[1, 0:4] = QUERY[2, 8:] = True  # 5, 4 and 1 tokens


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, C, generator=generator, dtype=torch.float64) for _ in LAYERS]


def whole(chosen, query=QUERY):
    """``[B, T, C]`` with other things than ``chosen`` where no query is."""
    made = [torch.full((*query.shape, x.shape[1]), 1e6, dtype=x.dtype) for x in chosen]
    for full, x in zip(made, chosen, strict=True):
        full[query] = x
    return made


def shares_of(found):
    return {key: float(x) for key, x in found.items()}


@pytest.mark.parametrize("form", ["relative", "mean_square"])
def test_shares_are_of_the_sum_that_is_minimised(form):
    x, y = states(0), states(1)
    squares = (torch.stack(x) - torch.stack(y)).square()
    if form == "relative":
        squares *= C / (torch.stack(x).square() + torch.stack(y).square()).sum(-1, keepdim=True)
    ranks = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 0])
    of_tokens = torch.stack([squares[:, ranks == k].sum() for k in range(5)])
    found = shares_of(alignment_shares(whole(x), y, QUERY, LAYERS, form))
    total = float(alignment_loss(whole(x), y, QUERY, form=form)) * squares.numel()
    for kind, sums in (
        ("layer", squares.sum((1, 2))),
        ("token", of_tokens),
        ("channel", squares.sum((0, 1))),
    ):
        index = int(sums.argmax())
        assert found[f"align/{kind}"] == (LAYERS[index] if kind == "layer" else index)
        assert abs(found[f"align/{kind}_share"] - float(sums[index]) / total) <= ROUNDING
    assert describe_large_shares(found) is None


@pytest.mark.parametrize("kind, index", [("layer", 2), ("token", 0), ("token", 3), ("channel", 4)])
def test_a_planted_one_is_named(kind, index):
    """The first token of every query, as where attention sinks; a token of one row; a layer; a channel."""
    x, y = states(0), states(1)
    for layer, state in enumerate(x):
        if kind == "layer" and layer == index:
            state.add_(30.0)
        if kind == "channel":
            state[:, index] += 30.0
        if kind == "token":
            state[[0, 5, 9] if index == 0 else [8]] += 30.0
    found = shares_of(alignment_shares(whole(x), y, QUERY, LAYERS, "mean_square"))
    name = LAYERS[index] if kind == "layer" else index
    assert found[f"align/{kind}"] == name and found[f"align/{kind}_share"] > 0.9
    assert all(found[f"align/{x}_share"] < 0.5 for x in ("layer", "token", "channel") if x != kind)
    where = f"{kind} {name} of the query" if kind == "token" else f"{kind} {name}"
    assert describe_large_shares(found).startswith(
        f"{where} has {found[f'align/{kind}_share']:.1%} of align: "
    )


def test_no_token_or_layer_is_most_of_a_relative_one():
    x, y = states(0), states(1)
    x[1].mul_(1e3)
    x[2][5, 3] += 1e4
    found = shares_of(alignment_shares(whole(x), y, QUERY, LAYERS, "relative"))
    assert found["align/layer_share"] < 0.4 and found["align/token_share"] < 0.4


def test_several_are_named_together():
    x, y = states(0), states(1)
    x[1][5, 3] += 1e4  # the first token of the second row
    text = describe_large_shares(shares_of(alignment_shares(whole(x), y, QUERY, LAYERS, "mean_square")))
    assert "layer 2 has 100.0% of align, token 0 of the query has 100.0% of align, channel 3 has" in text


@pytest.mark.parametrize("form", ["relative", "mean_square"])
def test_nothing_to_align_has_no_share(form):
    x = states()
    x[1][3] = 0.0  # in neither
    found = shares_of(alignment_shares(whole(x), x, QUERY, LAYERS, form))
    assert [value for key, value in found.items() if key.endswith("share")] == [0.0] * 3


def test_of_one_alone_there_is_nothing_to_say():
    query = torch.eye(10, dtype=torch.bool)  # one token in each row
    found = alignment_shares(whole(states()[:1], query), states(1)[:1], query, [3], "relative")
    assert set(found) == {"align/channel", "align/channel_share"}


def test_layer_shares():
    found = shares_of(
        layer_shares("synergy", [torch.tensor(1.0), torch.tensor(6.0), torch.tensor(1.0)], [1, 4, 5])
    )
    assert found == {"synergy/layer": 4, "synergy/layer_share": 0.75}
    assert describe_large_shares(found).startswith("layer 4 has 75.0% of synergy: ")
    assert describe_large_shares({"synergy/layer": 4, "synergy/layer_share": 0.5}) is None


def test_nothing_of_all_layers_is_made():
    x, y = [torch.randn(2, 32, 32) for _ in range(8)], [torch.randn(64, 32) for _ in range(8)]
    query = torch.ones(2, 32, dtype=torch.bool)
    with Largest(lambda shape: True) as largest:
        alignment_shares(x, y, query, list(range(8)), "relative")
    assert largest.most == 64 * 32


def measured(model, adapter, batch):
    with mk.attach(model, adapter) as handle:
        objective = objective_of(handle)
        objective.measures = True
        losses = objective(batch)
        losses.total.backward()
    return losses


CASES = {
    "mimic": lambda model: random_adapter(model, align_weight=2.0),
    "live": lambda model: random_shift(model, mk.LIVEConfig(kl_weight=3.0)),
    "m2iv": lambda model: random_shift(model, mk.M2IVConfig(synergy_weight=0.25)),
}


@pytest.mark.parametrize(
    "method, checkpointing", [("mimic", False), ("live", False), ("live", True), ("m2iv", False)]
)
def test_gradient_norms_are_those_of_the_weighted_parts(method, checkpointing):
    """Of each as if it were alone, its weight included; the gradient of the total stays what it is."""
    model = in_double(tiny_model("llava-llama")).requires_grad_(False)
    batch = episode(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    adapter = CASES[method](model).double()
    losses = measured(model, adapter, batch)
    total = {name: x.grad.clone() for name, x in adapter.named_parameters()}
    config = adapter.config
    names = [name for name in losses.parts if "/" not in name]
    assert len(names) == (3 if method == "m2iv" else 2)
    weights = [name.removesuffix("_weight") for name in vars(config) if name.endswith("_weight")]
    for name in names:
        alone = type(config)(**{**vars(config), **{f"{x}_weight": 0.0 for x in weights if x != name}})
        only = type(adapter)(alone, adapter.backbone).double()
        only.load_state_dict(adapter.state_dict())
        with mk.attach(model, only) as handle:
            objective_of(handle)(batch).total.backward()
        expected = torch.cat([x.grad.flatten() for x in only.parameters()]).norm()
        assert losses.parts[f"{name}/gradient_norm"].item() == pytest.approx(expected.item(), rel=ROUNDING)
        assert expected > 0
    adapter.zero_grad()
    with mk.attach(model, adapter) as handle:
        plain = objective_of(handle)(batch)
        plain.total.backward()
    assert set(plain.parts) == set(names)
    assert torch.equal(plain.total, losses.total)
    assert all(torch.equal(x.grad, total[name]) for name, x in adapter.named_parameters())
    assert not any(x.requires_grad for x in losses.parts.values())


def test_reentrant_checkpointing_has_no_gradients_of_parts():
    model = tiny_model("llava-llama").requires_grad_(False).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    adapter = random_shift(model, mk.LIVEConfig())
    losses = measured(model, adapter, episode(model))
    assert set(losses.parts) == {"kl", "ce"}
    assert all(x.grad.any() for x in adapter.parameters())


@pytest.mark.parametrize("config, batch", [(mk.AIMConfig(), aggregation), (mk.PromptTuningConfig(), episode)])
def test_without_a_teacher_there_is_one_part(config, batch):
    model = tiny_model("llava-llama").requires_grad_(False)
    adapter = mk.create(model, config)
    losses = measured(model, adapter, batch(model))
    norm = torch.cat([x.grad.flatten() for x in adapter.parameters()]).norm()
    assert set(losses.parts) == {"ce", "ce/gradient_norm"}
    assert losses.parts["ce/gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-5)


def test_m2ivs_layers():
    model = tiny_model("llava-llama").requires_grad_(False)
    adapter, seen = random_shift(model, mk.M2IVConfig()), []

    def watch(*inputs):
        seen.append(synergy(*inputs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmicl_kernels.methods.m2iv.objective.synergy", watch)
        losses = measured(model, adapter, episode(model))
    seen = torch.stack(seen)
    assert losses.parts["synergy/layer"] == seen.argmax() and len(seen) > 1
    assert losses.parts["synergy/layer_share"].item() == pytest.approx((seen.max() / seen.sum()).item())


@pytest.mark.parametrize("every, rows", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (100, [0]), (0, [])])
def test_train_measures_every_so_often_and_changes_nothing(every, rows):
    def trained(every):
        model = tiny_model("llava-llama")
        module = TrainedModule(model, random_adapter(model))
        batches = (episode(model, seed=i) for i in range(5))
        config = TrainingConfig(measure_every=every)
        log = train(module, trainable(module.adapter), batches, 5, config=config, progress=False)
        assert not module.objective.measures
        return module.adapter.state_dict(), log

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (state, log), (plain, without) = trained(every), trained(0)
    assert all(torch.equal(x, plain[name]) for name, x in state.items())
    keys = {f"align/{x}{y}" for x in ("layer", "token", "channel") for y in ("", "_share")}
    keys |= {"align/gradient_norm", "ce/gradient_norm"}
    assert [i for i, row in enumerate(log) if keys <= set(row)] == rows
    for row, other in zip(log, without, strict=True):
        assert {key: x for key, x in row.items() if "/" not in key} == other


def test_measure_every_is_a_number():
    with pytest.raises(ValueError, match="measure_every is -1, expected at least 0"):
        TrainingConfig(measure_every=-1)
    with pytest.raises(TypeError, match="measure_every is 0.5, expected an int"):
        TrainingConfig(measure_every=0.5)


def test_backward_passes_are_counted():
    """What measuring costs: one of each part, at the steps that measure."""
    model = tiny_model("llava-llama")
    module, calls = TrainedModule(model, random_shift(model, mk.LIVEConfig())), []
    grad = torch.autograd.grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.autograd, "grad", lambda *args, **options: calls.append(1) or grad(*args, **options)
        )
        config = TrainingConfig(measure_every=2)
        train(module, trainable(module.adapter), [episode(model)] * 5, 5, config=config, progress=False)
    assert len(calls) == 3 * 2


class Planted:
    """Moves what the modules return, in every call with adapters on, at one place."""

    def __init__(self, handle, layers, change):
        self.hooks = [
            handle.anchors[i].mlp.register_forward_hook(
                lambda module, args, out: change(out.clone()) if torch.is_grad_enabled() else None
            )
            for i in layers
        ]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()


def at_token(out, position=4):
    out[:, position] += 100.0
    return out


def at_channel(out, channel=7):
    out[..., channel] += 100.0
    return out


def everywhere(out):
    return out + 100.0


@pytest.mark.parametrize(
    "layers, change, named",
    [
        ((1,), everywhere, "layer 1 has"),
        ((0, 1, 2), at_token, "token 3 of the query has"),  # the query begins at position 1
        ((0, 1, 2), at_channel, "channel 7 has"),
        ((0, 1, 2), everywhere, None),
    ],
)
def test_train_warns_once_and_names_the_place(layers, change, named):
    model = tiny_model("llava-llama")
    module = TrainedModule(model, random_adapter(model, alignment="mean_square"))
    assert len(module.handle.anchors) == 3
    config = TrainingConfig(learning_rate=1e-6, measure_every=1)
    with Planted(module.handle, layers, change), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, trainable(module.adapter), [episode(model)] * 3, 3, config=config, progress=False)
    texts = [str(x.message) for x in caught if "training/README.md" in str(x.message)]
    assert len(texts) == (named is not None)
    if named is not None:
        assert texts[0].startswith(named) and texts[0].count(" of align") == 1
        assert [x.filename for x in caught if "training/README.md" in str(x.message)] == [__file__]
