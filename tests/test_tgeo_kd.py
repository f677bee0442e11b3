"""TGeo-KD: the geometry, the hypergradient against finite differences, and what the inner step must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.objectives.tgeo_kd import FusionNetwork, TGeoKD, class_means, fused_loss, geometry_state, sample_losses
from stillhouse.signals import Batch, Signals

C = 4


class Here:
    """The part of a training context that the objective reads: one held-out batch, and known class means."""

    def __init__(self, module: Distillation, held_out: Batch, holdout: bool = True) -> None:
        self.progress, self.student, self.held_out, self.has = (
            Progress(steps_per_epoch=10),
            module.student,
            held_out,
            holdout,
        )
        self.asked: list[int] = []

    def labels(self, split: str) -> Tensor:
        if not self.has:
            raise UserError("no holdout")
        return self.held_out["label"]

    def class_mean(self, what: str, of: str) -> tuple[Tensor, Tensor]:
        return torch.eye(C), torch.tensor([3, 3, 3, 0])

    def holdout(self, n: int) -> Batch:
        self.asked.append(n)
        return self.held_out


def batch(seed: int, n: int = 8) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return {"input": torch.randn(n, 6, generator=g), "label": torch.randint(C, (n,), generator=g)}


def distillation(student: nn.Module | None = None, **options: object) -> tuple[Distillation, TGeoKD]:
    torch.manual_seed(0)
    objective = TGeoKD(**{"temperature": 2.0, "hidden": (5,), **options})
    student, teacher = student or nn.Linear(6, C), nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, C))
    return Distillation(student, teacher, [objective]).build(batch(0)), objective


def said(module: Distillation, b: Batch) -> Signals:
    return module.teachers["teacher"](b)


def test_the_state_has_nine_blocks_whose_edges_sum_to_zero() -> None:
    s, t, m = (torch.randn(3, C).softmax(1) for _ in range(3))
    g = F.one_hot(torch.arange(3), C).float()
    state = geometry_state(s, t, m, g).view(3, 9, C)
    torch.testing.assert_close(state[:, :5].sum(-1), torch.zeros(3, 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(state[:, 5:].sum(-1), torch.ones(3, 4))
    assert not geometry_state(g, g, m, g).view(3, 9, C)[:, :3].any()
    for edges in ("signed", "squared", "products"):
        widths = [geometry_state(s, t, m, g, edges, geometry).shape[1] // C for geometry in ("inter", "intra", "label")]
        assert widths == {"signed": [9, 6, 5], "squared": [9, 6, 5], "products": [9, 6, 4]}[edges]


def test_a_zero_output_layer_trusts_both_sides_equally() -> None:
    module, objective = distillation()
    nn.init.zeros_(objective.fusion[-1].weight)
    b = batch(1)
    kl, ce = sample_losses(module.student(b["input"]), said(module, b).log_probs(2.0), b["label"], 2.0)
    torch.testing.assert_close(module(b, Progress())["loss"], 0.5 * (4 * kl + ce).mean())


def test_ratio_one_is_distillation_and_zero_is_cross_entropy() -> None:
    module, objective = distillation()
    b = batch(1)
    logits = module.student(b["input"])
    nn.init.zeros_(objective.fusion[-1].weight)
    nn.init.constant_(objective.fusion[-1].bias, 100.0)
    teacher = said(module, b).logits
    expected = 4 * F.kl_div((logits / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(module(b, Progress())["loss"], expected)
    nn.init.constant_(objective.fusion[-1].bias, -100.0)
    torch.testing.assert_close(module(b, Progress())["loss"], F.cross_entropy(logits, b["label"]))


@pytest.mark.parametrize(
    "student",
    [nn.Linear(6, C), nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, C))],
    ids=["linear", "two layers"],
)
def test_the_hypergradient_is_that_of_finite_differences(student: nn.Module) -> None:
    module, objective = distillation(copy.deepcopy(student))
    module.double()
    b, held = ({"input": x["input"].double(), "label": x["label"]} for x in (batch(1), batch(2)))
    teacher = Signals(logits=torch.randn(8, C, dtype=torch.double, generator=torch.Generator().manual_seed(4)))
    parameters = list(objective.fusion.parameters())
    outer = objective.held_out_loss(module.student, b, teacher, held)
    exact = torch.autograd.grad(outer, parameters)
    assert sum(g.abs().sum() for g in exact) > 1e-4
    for parameter, gradient in zip(parameters, exact):
        for i in range(0, parameter.numel(), max(parameter.numel() // 5, 1)):
            place, around = parameter.data.view(-1), []
            for move in (1e-4, -1e-4):
                place[i] += move
                around.append(objective.held_out_loss(module.student, b, teacher, held).item())
                place[i] -= move
            assert (around[0] - around[1]) / 2e-4 == pytest.approx(gradient.view(-1)[i].item(), rel=1e-5, abs=1e-9)


def test_a_ratio_falls_where_the_teacher_pulls_against_the_held_out_sample() -> None:
    """dJ_out / dratio_i = -(eta / B) <g_val, grad KD_i - grad CE_i>."""
    module, objective = distillation()
    student, b, held = module.student, batch(1), batch(2, n=1)
    teacher, ratio = said(module, b), torch.full((8,), 0.3, requires_grad=True)
    objective.ratio = lambda *_: ratio
    (found,) = torch.autograd.grad(objective.held_out_loss(student, b, teacher, held), ratio)
    weights = list(student.parameters())
    kl, ce = sample_losses(student(b["input"]), teacher.log_probs(2.0), b["label"], 2.0)
    inner = torch.autograd.grad(fused_loss(ratio.detach(), 4 * kl, ce), weights, retain_graph=True)
    stepped = [p - objective.virtual_lr * g for p, g in zip(weights, inner)]
    moved = copy.deepcopy(student)
    moved.load_state_dict(dict(zip(("weight", "bias"), stepped)))
    v = torch.autograd.grad(F.cross_entropy(moved(held["input"]), held["label"]), list(moved.parameters()))
    for i in range(8):
        pull = torch.autograd.grad(4 * kl[i] - ce[i], weights, retain_graph=True)
        expected = -objective.virtual_lr / 8 * sum((a * g).sum() for a, g in zip(v, pull))
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-7)


def test_the_fusion_network_moves_and_all_else_stays() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, C))
    module, objective = distillation(net, every=2)
    ctx = Here(module, batch(2))
    module.prepare(ctx)
    assert ctx.labels("holdout").shape == (objective.outer_batch,)
    torch.testing.assert_close(objective.mean[3], torch.full((C,), 1 / C))  # a class without samples
    module.train()
    before = copy.deepcopy(module.state_dict())
    module.before_step(batch(1), ctx)
    changed = {
        name
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if ".fusion." in name}
    assert net[3].training and all(p.grad is None for p in module.parameters())
    held = copy.deepcopy(objective.fusion.state_dict())
    ctx.progress.batch = 1
    module.before_step(batch(1), ctx)  # every second batch only
    assert all(torch.equal(v, held[k]) for k, v in objective.fusion.state_dict().items())


def test_the_student_sees_ratios_as_numbers() -> None:
    module, objective = distillation()
    b = batch(1)
    module(b, Progress())["loss"].backward()
    logits = module.student(b["input"]).detach().requires_grad_()
    ratio = objective.ratio(logits, said(module, b).log_probs(), b["label"]).detach()
    kl, ce = sample_losses(logits, said(module, b).log_probs(2.0), b["label"], 2.0)
    fused_loss(ratio, 4 * kl, ce).backward()
    torch.testing.assert_close(module.student.weight.grad, logits.grad.T @ b["input"])
    assert all(p.grad is None for p in objective.fusion.parameters())
    assert all(
        id(p) not in {id(q) for q in objective.fusion.parameters()} for g in module.param_groups() for p in g["params"]
    )


def test_joint_training_gives_the_fusion_network_to_the_students_optimizer() -> None:
    module, objective = distillation(solver="joint", hidden=(6, 3), slope=0.01, edges="products")
    assert "holdout" not in objective.needs
    module(batch(1), Progress())["loss"].backward()
    assert all(p.grad is not None for p in objective.fusion.parameters())
    assert sum(len(g["params"]) for g in module.param_groups()) == 2 + 6


def test_the_inner_optimizer_is_saved_and_restored() -> None:
    def steps(module: Distillation, first: int, last: int) -> None:
        ctx = Here(module, batch(2))
        for i in range(first, last):
            ctx.progress.batch = i
            module.before_step(batch(10 + i), ctx)

    whole, a = distillation(lr=0.05)
    steps(whole, 0, 6)
    half, _ = distillation(lr=0.05)
    steps(half, 0, 3)
    resumed, b = distillation(lr=0.05)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    steps(resumed, 3, 6)
    assert all(torch.equal(v, b.fusion.state_dict()[k]) for k, v in a.fusion.state_dict().items())


def test_attention_and_frozen_layers_are_differentiated_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.unused = nn.Linear(6, 8).requires_grad_(False), nn.Linear(4, C), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            q = self.head.weight.sum() * self.stem(x).view(-1, 1, 2, 4)
            return self.head(F.scaled_dot_product_attention(q, q, q).mean((1, 2)))

    module, objective = distillation(Net())
    before = objective.fusion[0].weight.detach().clone()
    module.before_step(batch(1), Here(module, batch(2)))
    assert not torch.equal(before, objective.fusion[0].weight)


def test_missing_holdout_mixed_labels_and_broadcasts_get_a_sentence() -> None:
    module, _ = distillation()
    with pytest.raises(UserError, match="holdout"):
        module.prepare(Here(module, batch(2), holdout=False))
    soft = batch(1) | {"label": torch.full((8, C), 1 / C)}
    with pytest.raises(UserError, match="mixup"):
        module(soft, Progress())
    with pytest.raises(UserError, match=r"0 to 3"):
        module(batch(1) | {"label": torch.full((8,), C)}, Progress())
    with pytest.raises(UserError, match="shape"):
        fused_loss(torch.rand(8, 1), torch.rand(8), torch.rand(8))
    for wrong in ({"every": 0}, {"virtual_lr": 0.0}, {"temperature": -1.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            TGeoKD(**wrong)


def test_a_class_without_samples_has_an_even_mean() -> None:
    means = class_means(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), 2)
    torch.testing.assert_close(means, torch.full((2, 2), 0.5))
    assert isinstance(TGeoKD(), Objective) and FusionNetwork(9).forward(torch.randn(3, 9)).shape == (3,)
