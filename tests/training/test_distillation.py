"""LIVE's and M2IV's losses against their definitions, what they hold in memory, and what they train."""

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.data.sampling import nearest_to_centroids
from mmicl_kernels.methods.live.objective import LIVEObjective
from mmicl_kernels.methods.m2iv.objective import M2IVObjective, synergy
from mmicl_kernels.methods.teaching import divergence, student_rows, teach, teacher_rows
from mmicl_kernels.testing.tiny_models import PRE_NORM_MODELS, TINY_MODELS, tiny_model
from mmicl_kernels.training import (
    TrainedModule,
    TrainingConfig,
    draw_demonstrations,
    joint_features,
    split_shots,
    train,
    trainable,
)
from tests.support.episode_inputs import episode, many_shot, objective_of
from tests.support.published import in_double, logits, random_adapter
from tests.support.residuals import decoder_layers, random_shift
from tests.training.watching import Largest

# Some hundreds of fp64 roundings one after another; a wrong token, weight or sign is off by far more.
TOLERANCE = 1024 * torch.finfo(torch.float64).eps
CONFIGS = {
    "live-mlp": mk.LIVEConfig(temperature=2.0, kl_weight=0.75, ce_weight=0.25),
    "live-layer": mk.LIVEConfig(site="layer", temperature=0.5),
    "m2iv": mk.M2IVConfig(
        mimicry_weight=0.75, synergy_weight=0.125, ce_weight=0.25, temperature=2.0, gamma=0.5
    ),
    "m2iv-token": mk.M2IVConfig(synergy_of="token", gamma=0.25),
}


def sharp_model(name):
    """Random heads are almost uniform, whose divergences are rounding; this one's answers differ."""
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(32.0)
    return model


def naive_synergy(a, m, gamma, of):
    """Term by term, from the correlation matrix itself."""
    a, m = (x / x.norm(dim=1 if of == "token" else 0, keepdim=True) for x in (a, m))
    matrix = sum(torch.outer(x, y) for x, y in zip(a, m, strict=True)) / (len(a) if of == "token" else 1)
    identity = torch.eye(len(matrix), dtype=torch.bool)
    weights = torch.where(identity, 1.0, gamma).double() / (1 if of == "token" else len(matrix))
    return (weights * (matrix - identity.to(matrix)) ** 2).sum()


@contextmanager
def written_out_shifts(model, adapter):
    """The shifts in wrapped forwards, with gradients; yields the branches of each layer, shifted."""
    branches, wrapped = [], []

    def wrap(module, shift, renorm, name):
        forward = module.forward

        def shifted(*args, **kwargs):
            output = forward(*args, **kwargs)
            x = output[0] if isinstance(output, tuple) else output
            y = x + shift.scale * shift.vector
            y = y * x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True) if renorm else y
            branches.append((name, y))
            return (y, *output[1:]) if isinstance(output, tuple) else y

        module.forward = shifted
        wrapped.append(module)

    for index, layer in decoder_layers(model).items():
        of = adapter.layers[index]
        if adapter.method == "live":
            wrap(layer.mlp if adapter.config.site == "mlp" else layer, of, True, "live")
        else:
            wrap(layer.self_attn, of.attn, False, "a")
            wrap(layer.mlp, of.mlp, False, "m")
    try:
        yield branches
    finally:
        for module in wrapped:
            del module.forward


def written_out(model, adapter, batch):
    """Total and parts, token by token, from full logits."""
    config = adapter.config
    passes = [(batch.teacher, batch.teacher_query), *getattr(batch, "further", ())]
    with torch.no_grad():
        taught = [(model(**inputs).logits, query) for inputs, query in passes]
    with written_out_shifts(model, adapter) as branches:
        student = model(**batch.student).logits
    kl, nll = [], []
    for row, t in (batch.labels != -100).nonzero().tolist():
        if t == 0:
            continue
        rank = int(batch.student_query[row, :t].sum())
        targets = [
            torch.softmax(logits_[row, query[row].nonzero()[rank, 0] - 1] / config.temperature, -1)
            for logits_, query in taught
        ]
        p = torch.stack(targets).mean(0)
        q = torch.softmax(student[row, t - 1] / config.temperature, -1)
        kl.append((p * (p.log() - q.log())).sum())
        nll.append(-torch.log_softmax(student[row, t - 1], -1)[batch.labels[row, t]])
    kl, ce = torch.stack(kl).mean(), torch.stack(nll).mean()
    if adapter.method == "live":
        kl = config.temperature**2 * kl
        return config.kl_weight * kl + config.ce_weight * ce, {"kl": kl, "ce": ce}
    a, m = ([x[batch.student_query] for kind, x in branches if kind == name] for name in "am")
    layers = [naive_synergy(x, y, config.gamma, config.synergy_of) for x, y in zip(a, m, strict=True)]
    together = sum(layers) / (1 if config.synergy_of == "token" else len(layers))
    total = config.mimicry_weight * kl + config.synergy_weight * together + config.ce_weight * ce
    return total, {"mimicry": kl, "synergy": together, "ce": ce}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PRE_NORM_MODELS)
def test_loss_and_gradient(name, config, padding):
    model = in_double(sharp_model(name))
    adapter = random_shift(model, CONFIGS[config]).double()
    batch = many_shot(model, padding=padding) if padding == "left" else episode(model, padding=padding)
    expected, parts = written_out(model, adapter, batch)
    with mk.attach(model, adapter) as handle:
        losses = objective_of(handle)(batch)
    assert losses.parts.keys() == parts.keys()
    for actual, wanted in ((losses.total, expected), *((losses.parts[x], parts[x]) for x in parts)):
        assert wanted > 0.01
        assert abs(actual.item() - wanted.item()) <= TOLERANCE * wanted.item()
    assert not any(part.requires_grad for part in losses.parts.values())
    actual, wanted = (torch.autograd.grad(x, list(adapter.parameters())) for x in (losses.total, expected))
    norm = torch.cat([x.flatten() for x in wanted]).norm()
    for x, y in zip(actual, wanted, strict=True):
        assert y.abs().sum() > 0
        assert (x - y).norm() <= TOLERANCE * norm


@pytest.mark.parametrize("of", ["channel", "token"])
@pytest.mark.parametrize("N, C", [(3, 17), (16, 17), (17, 17), (40, 17), (1, 5)])
def test_synergy_by_either_matrix(N, C, of):
    """Samples' products where N < C, the correlation matrix elsewhere."""
    generator = torch.Generator().manual_seed(N)
    a, m = (torch.randn(N, C, generator=generator, dtype=torch.float64) for _ in range(2))
    a, m = a.requires_grad_(), (m + 0.5 * a).detach().requires_grad_()
    actual, expected = synergy(a, m, 0.25, of), naive_synergy(a, m, 0.25, of)
    assert abs(actual - expected) <= TOLERANCE * expected
    for x, y in zip(*(torch.autograd.grad(x, [a, m]) for x in (actual, expected)), strict=True):
        assert (x - y).norm() <= TOLERANCE * y.norm()
    assert torch.autograd.gradcheck(synergy, (a, m, 0.25, of))


@pytest.mark.parametrize("N, C, largest", [(5, 64, 25), (64, 5, 25)])
def test_synergy_makes_the_smaller_matrix(N, C, largest):
    a, m = (torch.randn(N, C, requires_grad=True) for _ in range(2))
    with Largest(lambda shape: len(shape) == 2 and shape[0] == shape[1]) as square:
        synergy(a, m, 0.1, "channel").backward()
    assert square.most == largest


def test_synergy_wants_branches_that_agree():
    """Rows all along one axis each, the same in both branches: M is diagonal and the diagonal is known."""
    a = 3 * torch.eye(4)
    rolled = a.roll(1, 0)  # M has its four numbers off the diagonal: 1 of channels, 1/4 of tokens
    assert synergy(a, 5 * a, 1.0, "token") == pytest.approx(4 * (1 - 1 / 4) ** 2)
    assert synergy(a, rolled, 0.5, "token") == pytest.approx(4 + 0.5 * 4 / 16)
    assert synergy(a, 5 * a, 1.0, "channel") == 0
    assert synergy(a, rolled, 0.5, "channel") == pytest.approx(1 + 0.5)
    assert synergy(a.bfloat16(), a.bfloat16(), 1.0, "channel").dtype == torch.float32


def test_synergy_of_channels_has_no_scale():
    generator = torch.Generator().manual_seed(0)
    a, m = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    scales = torch.logspace(-3, 3, 5, dtype=torch.float64)
    assert synergy(a * scales, m * scales.flip(0), 0.25, "channel") == pytest.approx(
        synergy(a, m, 0.25, "channel").item(), rel=TOLERANCE
    )


@pytest.mark.parametrize("method", ["mimic", "live", "m2iv"])
def test_what_has_no_weight_is_not_computed(method):
    """Answers alone: the teacher is not asked."""
    config = {
        "mimic": mk.MimICConfig(align_weight=0),
        "live": mk.LIVEConfig(kl_weight=0),
        "m2iv": mk.M2IVConfig(mimicry_weight=0, synergy_weight=0),
    }[method]
    model = tiny_model("llava-llama").requires_grad_(False)
    batch, adapter = episode(model), mk.create(model, config)
    calls = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *x: calls.append(1))
    module = TrainedModule(model, adapter)
    found = module(**batch.arguments())
    hook.remove()
    assert found.keys() == {"loss", "ce"} and len(calls) == 1
    assert found["loss"].item() == pytest.approx(config.ce_weight * found["ce"].item())


@pytest.mark.parametrize("make, passes", [(random_adapter, 1), (random_shift, 3)])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_teachers_are_the_plain_model_without_gradients(name, make, passes):
    model = tiny_model(name)
    batch = many_shot(model, passes=passes)
    plain, seen = logits(model, batch.teacher), []
    with mk.attach(model, make(model)) as handle:
        shifted = logits(model, batch.student)
        hook = model.base_model.register_forward_pre_hook(
            lambda module, args: seen.append((torch.is_grad_enabled(), handle.enabled))
        )
        objective_of(handle)(batch).total.backward()
        hook.remove()
        assert seen == [(False, False)] * passes + [(True, True)]
        assert torch.equal(logits(model, batch.student), shifted)
        with handle.disabled():
            assert torch.equal(logits(model, batch.teacher), plain)
    assert torch.equal(logits(model, batch.teacher), plain)


def test_what_the_student_is_taught_by_itself_costs_nothing():
    """Without demonstrations and without a shift, teacher and student agree."""
    model = in_double(sharp_model("llava-llama"))
    batch = episode(model, padding="left")
    batch = replace(batch, teacher=batch.student, teacher_query=batch.student_query)
    with mk.attach(model, random_shift(model, mk.LIVEConfig()).double(), strength=0.0) as handle:
        assert abs(LIVEObjective(handle)(batch).parts["kl"]) <= TOLERANCE
    other = episode(model, seed=1)
    with mk.attach(model, random_shift(model, mk.LIVEConfig()).double(), strength=0.0) as handle:
        assert LIVEObjective(handle)(other).parts["kl"] > 0.01


@pytest.mark.parametrize("config", ["live-mlp", "m2iv"])
def test_the_handles_strength_is_in_the_loss(config):
    model = in_double(sharp_model("llava-llama"))
    adapter, batch = random_shift(model, CONFIGS[config]).double(), episode(model)
    with mk.attach(model, adapter, strength=2.0) as handle:
        strong = objective_of(handle)(batch).total.item()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("scale"):
                parameter.mul_(2.0)
    expected = written_out(model, adapter, batch)[0].item()
    assert abs(strong - expected) <= TOLERANCE * expected


def test_without_synergy_no_branch_is_recorded():
    model = tiny_model("llava-llama")
    batch = episode(model)
    with mk.attach(model, random_shift(model, mk.M2IVConfig(synergy_weight=0.0))) as handle:
        losses = M2IVObjective(handle)(batch)
    config = mk.M2IVConfig()
    expected = config.mimicry_weight * losses.parts["mimicry"] + config.ce_weight * losses.parts["ce"]
    assert losses.parts.keys() == {"mimicry", "ce"}
    assert losses.total.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("config", [mk.LIVEConfig(), mk.M2IVConfig(), mk.M2IVConfig(synergy_weight=0.0)])
def test_checkpointing(config):
    """The logits' losses have the same gradient; synergy would have none and is refused."""
    model = tiny_model("llava-llama").train()
    adapter, batch = random_shift(model, config), episode(model)

    def gradient():
        adapter.zero_grad()
        objective_of(handle)(batch).total.backward()
        return torch.cat([x.grad.flatten() for x in adapter.parameters()])

    with mk.attach(model, adapter) as handle:
        plain = gradient()
        model.gradient_checkpointing_enable()
        if getattr(config, "synergy_weight", 0.0) == 0:
            assert plain.any() and torch.equal(gradient(), plain)
        else:
            with pytest.raises(ValueError, match="synergy_weight is 1.0 and gradient checkpointing"):
                gradient()


def trained(model, config, steps=40):
    """The adapter, as it was and as one batch's steps leave it, and their losses."""
    torch.manual_seed(0)
    adapter = mk.create(model, config)
    before = {name: x.detach().clone() for name, x in adapter.named_parameters()}
    batches = [episode(model, padding="left")] * steps
    with mk.attach(model, adapter) as handle:
        log = train(objective_of(handle), trainable(adapter), batches, steps, model=model, progress=False)
    return adapter, before, log


@pytest.mark.parametrize(
    "config",
    [
        mk.LIVEConfig(ce_weight=0.0),
        mk.LIVEConfig(site="layer", ce_weight=0.0),
        mk.M2IVConfig(synergy_weight=0.0, ce_weight=0.0),
    ],
    ids=lambda config: f"{type(config).__name__}-{getattr(config, 'site', '')}",
)
@pytest.mark.parametrize("name", PRE_NORM_MODELS)
def test_the_answers_distribution_is_learned(name, config):
    """With the divergence alone, as labels drawn at random have nothing to do with the teacher."""
    *_, log = trained(sharp_model(name), config)
    assert log[0]["loss"] > 0.1
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


@pytest.mark.parametrize("config", [mk.MimICConfig(), mk.LIVEConfig(), mk.M2IVConfig()])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_training_moves_the_adapter_alone(name, config):
    model = sharp_model(name)
    model.lm_head.requires_grad_(False)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    flags = [x.requires_grad for x in model.parameters()]
    adapter, before, log = trained(model, config)
    assert log[-1]["loss"] < log[0]["loss"]
    if "synergy" in log[0]:
        assert log[-1]["synergy"] < log[0]["synergy"]
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())
    assert [x.requires_grad for x in model.parameters()] == flags
    assert not any(torch.equal(x, before[name]) for name, x in adapter.named_parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_losses_of_a_bf16_model_are_fp32(config):
    model = sharp_model("llava-llama").bfloat16()
    adapter, batch = random_shift(model, CONFIGS[config]).float(), episode(model, padding="right")
    with mk.attach(model, adapter) as handle:
        losses = objective_of(handle)(batch)
        losses.total.backward()
    assert all(x.dtype == torch.float32 for x in (losses.total, *losses.parts.values()))
    assert all(x.grad.isfinite().all() and x.grad.any() for x in adapter.parameters())
    with mk.attach(model, adapter) as handle:
        targets = teach(handle, batch, 2.0)
    low = torch.randn(targets.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert targets.dtype == torch.float32
    assert torch.equal(divergence(low, targets, 2.0), divergence(low.float(), targets, 2.0))


@pytest.mark.parametrize("config", [mk.LIVEConfig(), mk.M2IVConfig(scale_learning_rate=0.25)])
def test_scales_learn_at_their_own_rate(monkeypatch, config):
    steps, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        groups = self.param_groups
        steps.append(
            {id(x): (group["lr"], group["weight_decay"]) for group in groups for x in group["params"]}
        )
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    model = tiny_model("llava-llama")
    adapter = mk.create(model, config)
    optimisation = TrainingConfig(learning_rate=0.125, weight_decay=0.5, warmup=0.5)
    with mk.attach(model, adapter) as handle:
        train(
            objective_of(handle), trainable(adapter), [episode(model)] * 4, 4, model=model,
            config=optimisation, progress=False,
        )  # fmt: skip
    for rates, factor in zip(steps, (0.5, 1.0, 1.0, 0.5), strict=True):
        for name, x in adapter.named_parameters():
            rate = config.scale_learning_rate if name.endswith("scale") else 0.125
            assert rates[id(x)] == (pytest.approx(factor * rate), 0.5)


def test_labels_must_be_the_querys():
    model = tiny_model("llava-llama")
    batch = episode(model)
    with mk.attach(model, random_shift(model, mk.LIVEConfig())) as handle:
        loss = LIVEObjective(handle)
        labels = batch.labels.clone()
        labels[1, 0] = 5  # predicted by nothing, so it does not count
        assert torch.equal(loss(replace(batch, labels=labels)).total, loss(batch).total)
        query, theirs = batch.student_query.clone(), batch.teacher_query.clone()
        query[1, -1] = theirs[1, -1] = False
        with pytest.raises(
            ValueError, match=r"labels marks \[0, 1\] tokens per row outside of student_query"
        ):
            loss(replace(batch, student_query=query, teacher_query=theirs))
        with pytest.raises(ValueError, match="labels marks no token to predict"):
            loss(replace(batch, labels=torch.full_like(labels, -100)))
        answer = batch.labels != -100
        alone = {"input_ids": batch.labels[answer].view(2, -1)}
        first = torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match="teacher_query marks the answer at position 0"):
            loss(replace(batch, student_query=answer, teacher=alone, teacher_query=first))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_answer_needs_a_token_before_it(who):
    """After padding the first token would be predicted by what is masked."""
    batch = episode(tiny_model("llava-llama"))
    answer, theirs = batch.student_query.clone(), batch.teacher_query.clone()
    answer[1, :-3] = theirs[1, :-3] = False
    batch = replace(batch, student_query=answer, teacher_query=theirs)
    inputs = dict(getattr(batch, who))
    mask = inputs["attention_mask"] = inputs["attention_mask"].clone()
    mask[1, :-3] = 0
    padded = replace(batch, **{who: inputs})
    what = "labels" if who == "student" else "teacher_query"

    def rows(batch):
        if who == "student":
            return student_rows(batch)
        return teacher_rows(batch, batch.teacher, batch.teacher_query)

    with pytest.raises(ValueError, match=rf"{what} marks \[0, 1\] answer tokens per row right after padding"):
        rows(padded)
    mask[1, -4] = 1
    assert torch.equal(rows(padded), rows(batch)) and rows(batch).sum() == 6
    del inputs["attention_mask"]
    assert torch.equal(rows(padded), rows(batch))


def test_objectives_need_their_adapter():
    model = tiny_model("llava-llama")
    for config, wrong in ((mk.LIVEConfig(), M2IVObjective), (mk.M2IVConfig(), LIVEObjective)):
        with (
            mk.attach(model, mk.create(model, config)) as handle,
            pytest.raises(ValueError, match=r"handle holds \['default'\], expected a single"),
        ):
            wrong(handle)


def test_queries_are_nearest_to_their_centroids():
    """Four clusters far apart: the one sample next to each mean, whatever the seed."""
    generator = torch.Generator().manual_seed(0)
    centres = 100 * torch.eye(4)
    points = torch.cat([centre + torch.randn(9, 4, generator=generator) for centre in centres])
    points = points[torch.randperm(len(points), generator=generator)]
    expected = []
    for centre in centres:
        members = ((points - centre).norm(dim=1) < 50).nonzero()[:, 0]
        expected.append(int(members[(points[members] - points[members].mean(0)).norm(dim=1).argmin()]))
    assert nearest_to_centroids(points, 4, seed=0).tolist() == sorted(expected)
    assert nearest_to_centroids(points, len(points)).tolist() == list(range(len(points)))
    one, two = (draw_demonstrations(points, 4, 8, seed=seed) for seed in (0, 1))
    assert [draw.query for draw in one] == [draw.query for draw in two]
    assert not {draw.demonstrations for draw in one} & {draw.demonstrations for draw in two}


def test_every_query_is_drawn_twice():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    draws = draw_demonstrations(features, 8, 16, seed=3)
    same, other = (draw_demonstrations(features, 8, 16, seed=seed) for seed in (3, 4))
    assert draws == same != other
    queries = nearest_to_centroids(features, 8, seed=3).tolist()
    assert [draw.query for draw in draws] == [x for x in queries for _ in range(2)]
    for first, second in zip(draws[::2], draws[1::2], strict=True):
        assert first.demonstrations != second.demonstrations
        assert sorted(first.demonstrations) == sorted(second.demonstrations)
        assert len(set(first.demonstrations)) == 16
        assert not set(first.demonstrations) & set(queries)
    assert len({frozenset(draw.demonstrations) for draw in draws}) == 8, "redrawn for each query"


def test_draws_that_cannot_be():
    features = torch.randn(10, 3)
    for shots in (0, 7):
        with pytest.raises(ValueError, match=f"shots is {shots}, expected 1 to 6"):
            draw_demonstrations(features, 4, shots)
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"count is {count}, expected 1 to 10"):
            nearest_to_centroids(features, count)
    with pytest.raises(ValueError, match="features has 2 different samples, expected at least 3"):
        nearest_to_centroids(features[:2].repeat(5, 1), 3)


def test_joint_features():
    image, question = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[-5.0], [0.5]])
    expected = torch.tensor([[0.6, 0.8, -1.0], [0.0, 1.0, 1.0]])
    torch.testing.assert_close(joint_features(image, question), expected)


def test_split_shots():
    assert split_shots(list(range(7)), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert split_shots("abcd", 4) == ["a", "b", "c", "d"]
    for passes in (0, 4):
        with pytest.raises(ValueError, match=f"passes is {passes}, expected 1 to 3"):
            split_shots([1, 2, 3], passes)


def test_scikit_learn_is_needed_for_clusters_alone():
    script = """
import sys
sys.modules["sklearn"] = None
import torch
from mmicl_kernels.training import draw_demonstrations
try:
    draw_demonstrations(torch.randn(5, 2), 2, 2)
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "clustering needs scikit-learn: pip install scikit-learn", done.stderr
