"""What counts: one rule in every loss of positions, for any number of axes; a refusal in a sentence elsewhere; finite
values where nothing counts or is there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stillhouse
from stillhouse import Distillation, Progress, Signals, catalog
from stillhouse.config.specs import TrainSpec
from stillhouse.data import adapt
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.functional.counting import counted, counted_mean, weigh_positions_alike
from stillhouse.functional.divergences import kl_divergence, soft_cross_entropy, standardise
from stillhouse.objectives.ce import cross_entropy
from stillhouse.objectives.dist import dist_loss
from stillhouse.objectives.kd import KD, kd_loss
from stillhouse.signals import Batch, TopK
from stillhouse.training.engine import fit

SPAN = Progress(step=300, epoch=30, steps_per_epoch=10, epochs=40)
NAMES = [name for card in catalog.list_methods() if card.kind == "objective" for name in card.provides]
OF_POSITIONS = sorted(name for name in NAMES if catalog.objective(name).positions and name != "acam_kd")
OF_SAMPLES = ["dkd", "nkd", "dist", "pld", "ps_kd", "tgeo_kd", "bd_kd", "dml", "ofa_kd", "nd"]
SPECS = [
    *({"name": name} for name in OF_POSITIONS),
    {"name": "kd", "standardise": True},
    {"name": "gkd", "beta": 0.0},
    {"name": "taid", "value": "kl"},
]
LEADING = [(12,), (3, 4), (2, 2, 3)]
C = 7


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def term(spec: str | dict[str, object], student: Tensor, teacher: Tensor | Signals, batch: Batch) -> Tensor:
    """The loss of an objective that trains."""
    objective = objective_from_spec(spec).objective
    mine, theirs = Signals(logits=student), teacher if isinstance(teacher, Signals) else Signals(logits=teacher)
    objective.build(mine, theirs, batch)
    objective.train()
    return torch.stack([v for k, v in objective(mine, theirs, batch, SPAN).items() if not k.startswith("log:")]).sum()


def named(spec: dict[str, object]) -> str:
    return "-".join(map(str, spec.values()))


# ---- one rule --------------------------------------------------------------------------------------------------------


def test_labels_of_minus_100_and_what_a_mask_leaves_out_count_for_nothing() -> None:
    label, mask = torch.tensor([[1, -100], [2, 3]]), torch.tensor([[True, True], [False, True]])
    assert counted({"label": label, "mask": mask}, (2, 2)).tolist() == [[True, False], [False, True]]
    assert counted({"mask": mask}, (2, 2)) is mask
    assert counted({"label": torch.tensor([0, -100, -1])}, (3,)).tolist() == [True, False, True]
    assert counted({}, (2, 2)) is None
    assert counted({"label": torch.tensor([0, 1])}, (2, 5)) is None  # a label of sentences says nothing of tokens
    assert counted({"label": torch.rand(2, 5)}, (2, 5)) is None  # soft labels
    with pytest.raises(UserError, match=r"\(2, 6, 8\) do not stand where the predictions stand, \(2, 4, 6\)"):
        counted({"label": torch.zeros(2, 6, 8, dtype=torch.long)}, (2, 4, 6))
    with pytest.raises(UserError, match=r"mask has shape \(2, 2\)"):
        counted({"mask": mask}, (2, 3))


def test_the_mean_over_nothing_is_zero() -> None:
    values = torch.full((3,), math.nan, requires_grad=True)
    mean = counted_mean(values, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean == 0 and not values.grad.any()


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("by", ["label", "mask"])
@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_what_does_not_count_changes_no_loss_and_gets_no_gradient(
    spec: dict[str, object], by: str, leading: tuple[int, ...]
) -> None:
    student, teacher = torch.randn(*leading, C, requires_grad=True), torch.randn(*leading, C)
    label, counts = torch.randint(0, C, leading), torch.rand(leading) < 0.6
    batch = {"label": label.masked_fill(~counts, -100)} if by == "label" else {"label": label, "mask": counts}
    loss = term(spec, student, teacher, {"input": student.detach(), **batch})
    (grad,) = torch.autograd.grad(loss, student)
    alone = student.detach()[counts].requires_grad_()
    expected = term(spec, alone, teacher[counts], {"input": alone.detach(), "label": label[counts]})
    if spec["name"] != "sinkd":  # whose sum over the batch blurs by its size
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad[counts], torch.autograd.grad(expected, alone)[0], rtol=1e-4, atol=1e-6)
    assert not grad[~counts].any() and grad[counts].any()


@pytest.mark.parametrize("spec", ["kd", {"name": "kd", "standardise": True}, "logit_standardisation"], ids=str)
def test_distillation_of_padded_tokens_is_the_mean_over_the_others(spec: str | dict[str, object]) -> None:
    student, teacher, label = torch.randn(2, 5, C), torch.randn(2, 5, C), torch.randint(0, C, (2, 5))
    label[0, 2:] = -100
    heat = 2.0 if spec == "logit_standardisation" else 4.0
    z = (lambda x: x) if spec == "kd" else (lambda x: (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True)))
    s, t = ((z(x) / heat).log_softmax(-1) for x in (student, teacher))
    rows = heat**2 * F.kl_div(s, t, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(term(spec, student, teacher, {"label": label}), rows[label != -100].mean())


def test_of_a_top_k_teacher_what_counts_is_known_and_counted() -> None:
    student, teacher, label = torch.randn(2, 5, C), torch.randn(2, 5, C).log_softmax(-1), torch.randint(0, C, (2, 5))
    log_probs, indices = teacher.topk(3)
    log_probs[1, 3] = -math.inf  # nothing is known of it
    label[0, 2:] = -100
    top = TopK(log_probs, indices, 1 - log_probs.exp().sum(-1))
    counts = (label != -100) & (torch.arange(10).view(2, 5) != 8)
    for name in ("kd", "gkd"):
        alone = Signals(top=TopK(log_probs[counts], indices[counts], top.tail[counts]))
        found, expected = (
            term(name, student, Signals(top=top), {"label": label}),
            term(name, student[counts], alone, {}),
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("leading", LEADING[1:], ids=str)
def test_accumulated_batches_weigh_every_position_alike(leading: tuple[int, ...], tmp_path: Path) -> None:
    class Pixels(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.layer = nn.Linear(5, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    def batch(share: float) -> Batch:
        label = torch.randint(0, C, leading)
        return {"input": torch.randn(*leading, 5), "label": label.masked_fill(torch.rand(leading) > share, -100)}

    def trained(batches: list[Batch], folder: str, accumulate: int) -> Tensor:
        module = Distillation(Pixels(0), Pixels(1), ["ce", "kd"])
        optimizer = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
        spec = {"epochs": 1, "optimizer": optimizer, "schedule": {"name": "constant"}, "accumulate": accumulate}
        fit(module, adapt(batches), TrainSpec.model_validate(spec), folder=tmp_path / folder, cpu=True)
        return module.student.layer.weight.detach()

    few, many = batch(0.2), batch(0.9)
    whole = {key: torch.cat([few[key], many[key]]) for key in few}
    torch.testing.assert_close(trained([few, many], "two", 2), trained([whole], "one", 1))
    weigh_positions_alike(batches := [dict(few), dict(many)])
    assert batches[0]["token_count"] == (whole["label"] != -100).sum() / 2


# ---- the class axis is the last --------------------------------------------------------------------------------------


def test_pixels_are_compared_over_their_classes() -> None:
    student, teacher = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    right = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    s, t, label = student.movedim(1, -1), teacher.movedim(1, -1), torch.randint(0, 4, (2, 6, 8))
    for spec in ({"name": "kd", "temperature": 1.0}, {"name": "gkd", "beta": 0.0}):
        torch.testing.assert_close(term(spec, s, t, {"label": label}), right)
        with pytest.raises(UserError, match="class axis last"):
            term(spec, student, teacher, {"label": label})
    torch.testing.assert_close(term("ce", s, t, {"label": label}), F.cross_entropy(student, label))
    torch.testing.assert_close(cross_entropy(student, label), F.cross_entropy(student, label))
    soft = torch.rand(2, 6, 8, 4).softmax(-1)
    torch.testing.assert_close(
        cross_entropy(s, soft, 0.1), F.cross_entropy(student, soft.movedim(-1, 1), label_smoothing=0.1)
    )


def test_a_network_whose_classes_come_second_is_refused_when_it_is_built() -> None:
    data = [(torch.randn(2, 3, 6, 8), torch.randint(0, 4, (2, 6, 8)))]
    with pytest.raises(UserError, match=r"`logits.movedim\(1, -1\)`"):
        stillhouse.distill(
            nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), data, ["ce", "kd"], train={"epochs": 1}, progress=False
        )


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ["dkd", "nkd", "dist", "pld", "dml"])
def test_objectives_of_samples_refuse_positions_when_they_are_built(name: str, shape: tuple[int, ...]) -> None:
    batch = {"input": torch.randn(*shape, 5), "label": torch.randint(0, C, shape), "index": torch.arange(2)}
    with pytest.raises(
        UserError, match=rf"'{name}' takes one prediction a sample, \(B, C\), but the student's logits have shape"
    ):
        Distillation(nn.Linear(5, C), nn.Linear(5, C), [name]).build(batch)
    with pytest.raises(UserError, match="leave the mask out"):
        Distillation(nn.Linear(5, C), nn.Linear(5, C), [name]).build(
            {"input": torch.randn(2, 5), "label": torch.randint(0, C, (2,)), "mask": torch.tensor([True, False])}
        )


@pytest.mark.parametrize("name", ["dkd", "nkd", "dist", "pld", "ps_kd", "tgeo_kd"])
def test_their_losses_refuse_positions_too(name: str) -> None:
    label = torch.randint(0, C, (2, 5))
    with pytest.raises(UserError, match=r"takes one prediction a sample, logits \(B, C\); given"):
        term(
            name, torch.randn(2, 5, C), torch.randn(2, 5, C), {"input": label, "label": label, "index": torch.arange(2)}
        )


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_objectives_of_samples_say_so(name: str) -> None:
    assert not catalog.objective(name).positions


# ---- nothing to count, nothing there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_a_batch_of_which_nothing_counts_costs_nothing(spec: dict[str, object], leading: tuple[int, ...]) -> None:
    student = torch.randn(*leading, C, requires_grad=True)
    loss = term(spec, student, torch.randn(*leading, C), {"input": student, "label": torch.full(leading, -100)})
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_training_goes_through_a_batch_without_labels() -> None:
    x = torch.randn(4, 5)
    data = [(x, torch.tensor([-100] * 4)), (x, torch.tensor([0, 1, 2, -100]))]
    student = nn.Linear(5, 3)
    stillhouse.distill(student, nn.Linear(5, 3), data, ["ce", "kd"], train={"epochs": 1}, progress=False)
    assert all(p.isfinite().all() for p in student.parameters())


MASKED = [
    *SPECS,
    {"name": "gkd", "beta": 0.5},
    *({"name": name} for name in ("dkd", "nkd", "pld", "dist", "bd_kd", "dml", "tgeo_kd")),
]


@pytest.mark.parametrize(
    "spec", [*MASKED, {"name": "dkd", "standardise": True}, {"name": "nkd", "standardise": True}], ids=named
)
def test_a_class_that_both_sides_mask_is_as_if_it_were_not_there(spec: dict[str, object]) -> None:
    student, teacher, label = torch.randn(5, 8), torch.randn(5, 8), torch.randint(0, 6, (5,))
    student[:, 7] = teacher[:, 7] = -math.inf
    student.requires_grad_()
    if spec["name"] in ("bd_kd", "dml"):
        teacher.requires_grad_()
    if spec["name"] == "tgeo_kd":
        spec = {**spec, "solver": "joint"}
    batch = {"input": student, "label": label, "index": torch.arange(5)}
    loss = term(spec, student, teacher, batch)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and not student.grad[:, 7].any()
    if spec["name"] not in ("dist", "tgeo_kd"):  # which read the number of classes
        torch.testing.assert_close(loss, term(spec, student[:, :7], teacher[:, :7], batch))


def test_the_values_of_masked_classes() -> None:
    student, teacher = torch.randn(5, 8), torch.randn(5, 8)
    student[:, 7] = teacher[:, 7] = -math.inf
    s, t = student[:, :7], teacher[:, :7]
    torch.testing.assert_close(kd_loss(student, teacher), kd_loss(s, t))
    torch.testing.assert_close(kl_divergence(student, teacher.log_softmax(1)), kl_divergence(s, t.log_softmax(1)))
    torch.testing.assert_close(soft_cross_entropy(student, teacher.softmax(1)), soft_cross_entropy(s, t.softmax(1)))
    torch.testing.assert_close(standardise(student)[:, :7], standardise(s))
    assert (standardise(student)[:, 7] == -math.inf).all()


# ---- epsilons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heat", [1.0, 4.0])
@pytest.mark.parametrize("classes", [100, 1_000, 10_000])
def test_dist_is_that_of_cosine_similarities_in_double_precision(classes: int, heat: float) -> None:
    def reference(s: Tensor, t: Tensor) -> Tensor:
        centred = [(x / heat).softmax(1) for x in (s, t)]
        rows = F.cosine_similarity(*(x - x.mean(1, keepdim=True) for x in centred), dim=1)
        columns = F.cosine_similarity(*(x - x.mean(0, keepdim=True) for x in centred), dim=0)
        return 2 - rows.mean() - columns.mean()

    student, teacher = 3 * torch.randn(64, classes), 3 * torch.randn(64, classes)
    mine, double = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = sum(dist_loss((mine / heat).softmax(1), (teacher / heat).softmax(1)).values())
    exact = reference(double, teacher.double())
    loss.backward(), exact.backward()
    assert abs(loss.item() / exact.item() - 1) < 1e-5
    assert (mine.grad - double.grad).norm() < 1e-4 * double.grad.norm()


@pytest.mark.parametrize("classes", [10, 10_000])
def test_a_class_of_probability_zero_gets_no_mass_at_a_high_temperature(classes: int) -> None:
    probs = torch.zeros(1, classes)
    probs[0, :2] = torch.tensor([0.25, 0.75])
    expected = torch.tensor([0.25, 0.75]).pow(1 / 20)
    found = Signals(probs=probs).log_probs(20.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp()[0, :2], expected / expected.sum())


def test_kd_has_one_way_for_every_teacher() -> None:
    student, teacher = torch.randn(6, C), torch.randn(6, C)
    for given in (
        Signals(logits=teacher),
        Signals(probs=teacher.softmax(-1)),
        Signals(members=(Signals(logits=teacher),)),
    ):
        torch.testing.assert_close(term("kd", student, given, {}), kd_loss(student, teacher))
    with pytest.raises(UserError, match="knows only the top k"):
        log_probs, indices = teacher.log_softmax(-1).topk(2)
        KD(standardise=True)(Signals(logits=student), Signals(top=TopK(log_probs, indices, torch.ones(6))), {}, SPAN)
    with pytest.raises(UserError, match="no `logits` among these signals, only embedding"):
        KD()(Signals(embedding=student), Signals(logits=teacher), {}, SPAN)
