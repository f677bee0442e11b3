"""What every objective promises: it builds and runs on what it says it needs, trains the student and not the teacher,
and keeps its paper's identities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse import catalog
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional.divergences import standardise
from stillhouse.functional.feature_maps import as_map, pooled, same_size
from stillhouse.functional.labels import without_classes
from stillhouse.objectives.ce import CrossEntropy, cross_entropy
from stillhouse.objectives.crd import CRD, Negatives
from stillhouse.objectives.dist import dist_loss
from stillhouse.objectives.dkd import DKD, dkd_loss
from stillhouse.objectives.dml import DML
from stillhouse.objectives.kd import KD, kd_loss
from stillhouse.objectives.nd import ND, class_means, nd_loss
from stillhouse.objectives.nkd_uskd import USKD, nkd_loss, uskd_loss
from stillhouse.objectives.pkt import pkt_loss
from stillhouse.objectives.pld import PLD, pld_loss
from stillhouse.objectives.rkd import RKD, rkd_angle_loss, rkd_distance_loss
from stillhouse.objectives.sp import sp_loss
from stillhouse.objectives.vid import VID
from stillhouse.signals import Batch, Signals

B, C, N = 6, 5, 24
LABELS = torch.tensor([0, 1, 2, 3, 4, 4])
SPAN = Progress(epoch=3, epochs=10)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Training:
    """The training set that `prepare` asks about: N samples with labels, and the teacher's mean embedding of each
    class."""

    def __init__(self, width: int, labels: Tensor | None = None) -> None:
        self.known = torch.arange(N) % C if labels is None else labels
        self.embeddings = torch.randn(len(self.known), width)

    def labels(self, split: str) -> Tensor:
        return self.known

    def generator(self, *key: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(len(key))

    def class_mean(self, what: str, of: str = "teacher") -> tuple[Tensor, Tensor]:
        return class_means(self.embeddings, self.known, C).nan_to_num(), torch.bincount(self.known, minlength=C)


def said(needs: frozenset[str], who: str, width: int, device: str = "cpu") -> Signals:
    """Random signals of a network (maps of three stages at 8, 4 and 2 pixels), holding exactly what `needs` names for
    it, with gradient."""
    made = lambda *shape: torch.randn(*shape, device=device).requires_grad_()  # noqa: E731
    out = Signals()
    for need in needs:
        if need == f"{who}.logits":
            out.logits = made(B, C)
        elif need == f"{who}.embedding":
            out.embedding = made(B, width)
        elif need.startswith(f"{who}.tap:"):
            layer = need.partition(":")[2]
            stage = int(layer.partition(":")[2]) % 4 or 4
            out.taps[layer] = made(B, width * stage, 16 >> stage, 16 >> stage)
    return out


def leaves(signals: Signals) -> list[Tensor]:
    return [x for x in (signals.logits, signals.embedding, *signals.taps.values()) if x is not None]


def ready(name: str, **options: object) -> tuple[Objective, Signals, Signals, Batch]:
    """An objective that is built and prepared, with signals and a batch that hold exactly what it needs."""
    objective = catalog.objective(name)(**({"negatives": 16} if name == "crd" else {}) | options)
    student, teacher = said(objective.needs, "student", 4), said(objective.needs, "teacher", 6)
    everything = {"label": LABELS, "index": torch.arange(B)}
    batch = {k: v for k, v in everything.items() if k in objective.needs}
    objective.build(student, teacher, batch)
    objective.prepare(Training(6))
    return objective, student, teacher, batch


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([v for k, v in terms.items() if not k.startswith("log:")]).sum()


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kd", {"temperature": 0}, "kd: temperature must be above 0; given: 0"),
        ("nkd", {"gamma": -1.0}, "nkd: gamma must be at least 0; given: -1.0"),
        ("ce", {"label_smoothing": 1.0}, "ce: label_smoothing must be at least 0 and below 1"),
        ("at", {"student_layers": ["stage:1"]}, "as many layers, at least one; given: 1 and 3"),
        ("vid", {"initial_variance": 0.0}, "vid: initial_variance"),
        ("crd", {"momentum": 1.5}, "crd: momentum must be"),
        ("rkd", {"distance_weight": 0.0, "angle_weight": 0.0}, "rkd: distance_weight"),
    ],
)
def test_an_option_out_of_range_is_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        catalog.objective(name)(**options)


# ---- labels and shapes -----------------------------------------------------------------------------------------------


def test_logits_of_other_classes_are_refused_with_both_shapes() -> None:
    for loss in (
        lambda s, t: kd_loss(s, t),
        lambda s, t: nkd_loss(s, t, LABELS),
        lambda s, t: dkd_loss(s, t, LABELS),
        lambda s, t: pld_loss(s, t, LABELS),
    ):
        with pytest.raises(UserError, match=r"\(6, 5\) but the teacher's \(6, 7\)"):
            loss(torch.randn(B, C), torch.randn(B, 7))


def test_labels_out_of_range_or_of_wrong_shape_are_refused() -> None:
    z, v = torch.randn(B, C), torch.randn(B, C)
    for loss in (nkd_loss, dkd_loss, pld_loss):
        with pytest.raises(UserError, match="class ids from 0 to 4; given: 0 to 5"):
            loss(z, v, LABELS + (LABELS == 4))
        with pytest.raises(UserError, match=r"given: torch.int64 \(5,\)"):
            loss(z, v, LABELS[:-1])
    with pytest.raises(UserError, match=r"shape \(6, 5\); given: \(6, 4\)"):
        nkd_loss(z, v, torch.rand(B, 4))


def test_ce_takes_soft_labels_tokens_and_pixels() -> None:
    z = torch.randn(B, C)
    soft = F.one_hot(LABELS, C).float()
    torch.testing.assert_close(cross_entropy(z, soft), cross_entropy(z, LABELS))
    tokens, ids = torch.randn(2, 3, C), torch.tensor([[0, 1, -100], [4, -100, 2]])
    kept = ids != -100
    torch.testing.assert_close(cross_entropy(tokens, ids), F.cross_entropy(tokens[kept], ids[kept]))
    pixels, where = torch.randn(2, C, 4, 4), torch.randint(0, C, (2, 4, 4))
    torch.testing.assert_close(cross_entropy(pixels, where), F.cross_entropy(pixels, where))
    with pytest.raises(UserError, match="from 0 to 4"):
        cross_entropy(z, LABELS + 1)
    smooth = CrossEntropy(label_smoothing=0.1)(Signals(logits=z), Signals(), {"label": LABELS}, SPAN)["loss"]
    torch.testing.assert_close(smooth, cross_entropy(z, 0.9 * soft + 0.1 / C))


def test_without_classes_keeps_the_order_of_the_rest() -> None:
    x = torch.arange(12.0).view(2, 6)
    assert without_classes(x, torch.tensor([0, 5])).tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert without_classes(x, torch.tensor([[4, 1], [2, 3]])).tolist() == [[0, 2, 3, 5], [6, 7, 10, 11]]


# ---- kd, standardisation, dkd, dist, dml -----------------------------------------------------------------------------


def test_kd_of_equal_logits_is_zero_and_an_ensemble_teaches_its_mean_probabilities() -> None:
    z = torch.randn(B, C)
    torch.testing.assert_close(kd_loss(z, z + 3), torch.tensor(0.0), atol=1e-5, rtol=0)
    members = tuple(Signals(logits=torch.randn(B, C)) for _ in range(2))
    mean = sum(F.softmax(m.logits / 4, dim=1) for m in members) / 2
    expected = 16 * F.kl_div(F.log_softmax(z / 4, dim=1), mean, reduction="batchmean")
    torch.testing.assert_close(KD()(Signals(logits=z), Signals(members=members), {}, SPAN)["loss"], expected)


def test_kd_of_tokens_leaves_out_padding() -> None:
    z, v, ids = torch.randn(2, 3, C), torch.randn(2, 3, C), torch.tensor([[0, 1, -100], [4, -100, 2]])
    kept = ids != -100
    loss = KD()(Signals(logits=z), Signals(logits=v), {"label": ids}, SPAN)["loss"]
    torch.testing.assert_close(loss, kd_loss(z[kept], v[kept]))


def test_standardised_logits_forget_shift_and_scale() -> None:
    z, v = torch.randn(B, C), torch.randn(B, C)
    torch.testing.assert_close(standardise(3 * z + 7), standardise(z), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(standardise(F.log_softmax(z, dim=1)), standardise(z), atol=1e-5, rtol=1e-5)
    option = KD(temperature=2.0, standardise=True)(Signals(logits=z), Signals(logits=v), {}, SPAN)["loss"]
    own = catalog.objective("logit_standardisation")()(Signals(logits=5 * z), Signals(logits=v - 1), {}, SPAN)["loss"]
    torch.testing.assert_close(option, own, atol=1e-5, rtol=1e-5)


def test_dkd_with_beta_of_the_teachers_doubt_is_kd() -> None:
    z, v = torch.randn(1, C), torch.randn(1, C)  # KD = TCKD + (1 - p_t) NCKD, for each sample
    doubt = 1 - F.softmax(v / 4, dim=1)[0, 2]
    terms = dkd_loss(z, v, torch.tensor([2]), alpha=1.0, beta=float(doubt))
    torch.testing.assert_close(terms["target"] + terms["non_target"], kd_loss(z, v), atol=1e-5, rtol=1e-5)


def test_dkd_and_review_kd_warm_up_as_their_code_does() -> None:
    objective, student, teacher, batch = ready("dkd")
    at = [total(objective(student, teacher, batch, Progress(epoch=e))) for e in (0, 9, 19, 30)]
    torch.testing.assert_close(torch.stack(at) / at[-1], torch.tensor([0.05, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(total(DKD(warmup_epochs=0)(student, teacher, batch, Progress())), at[-1])
    review, student, teacher, batch = ready("review_kd")
    at = [total(review(student, teacher, batch, Progress(epoch=e))) for e in (0, 10, 20, 30)]
    torch.testing.assert_close(torch.stack(at) / at[-1], torch.tensor([0.0, 0.5, 1.0, 1.0]))


def test_dist_is_zero_for_probabilities_in_linear_relation() -> None:
    p = F.softmax(torch.randn(B, C), dim=1)
    terms = dist_loss(0.5 * p + 0.1, p)
    torch.testing.assert_close(torch.stack(list(terms.values())), torch.zeros(2), atol=1e-5, rtol=0)
    assert dist_loss(p, p.flip(0))["intra"] > 0.1


def test_dml_trains_both_networks_and_refuses_a_frozen_teacher() -> None:
    z, v = torch.randn(B, C, requires_grad=True), torch.randn(B, C, requires_grad=True)
    terms = DML()(Signals(logits=z), Signals(logits=v), {"label": LABELS}, SPAN)
    total(terms).backward()
    p, q = F.softmax(z, dim=1).detach(), F.softmax(v, dim=1).detach()
    torch.testing.assert_close(z.grad, (p - q) / B)  # of KL(q || p) with q constant, and nothing else
    torch.testing.assert_close(v.grad, (q - p + q - F.one_hot(LABELS, C)) / B)
    with pytest.raises(UserError, match="give it as `peer:`"):
        DML()(Signals(logits=z), Signals(logits=v.detach()), {"label": LABELS}, SPAN)


# ---- nkd and uskd ----------------------------------------------------------------------------------------------------


def test_nkd_does_not_change_with_a_constant_per_row() -> None:
    z, v = torch.randn(B, C), torch.randn(B, C)
    for a, b in zip(nkd_loss(z, v, LABELS).values(), nkd_loss(z + 5, v - 3, LABELS).values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nkd_non_target_part_does_not_depend_on_the_target_logits() -> None:
    z, v = torch.randn(B, C), torch.randn(B, C)
    moved = F.one_hot(LABELS, C) * torch.randn(B, 1) * 4
    torch.testing.assert_close(
        nkd_loss(z + moved, v - moved, LABELS)["non_target"], nkd_loss(z, v, LABELS)["non_target"]
    )


def test_nkd_of_two_classes_has_no_non_target_part() -> None:
    z = torch.randn(4, 2, requires_grad=True)
    terms = nkd_loss(z, torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
    assert terms["non_target"].item() == 0
    total(terms).backward()
    assert z.grad.isfinite().all()
    with pytest.raises(UserError, match="at least 2 classes"):
        nkd_loss(torch.randn(4, 1), torch.randn(4, 1), torch.zeros(4, dtype=torch.long))


def test_nkd_takes_the_largest_class_of_soft_labels() -> None:
    z, v = torch.randn(B, C), torch.randn(B, C)
    soft = 0.7 * F.one_hot(LABELS, C) + 0.3 * F.one_hot((LABELS + 1) % C, C)
    torch.testing.assert_close(total(nkd_loss(z, v, soft)), total(nkd_loss(z, v, LABELS)))


def test_uskd_of_one_sample_has_plain_cross_entropy_as_its_target_part() -> None:
    z, u, y = torch.randn(1, C), torch.randn(1, C), torch.tensor([3])
    torch.testing.assert_close(uskd_loss(z, u, y)["target"], F.cross_entropy(z, y))


def test_uskd_parts_train_what_they_should() -> None:
    for label in (LABELS, F.softmax(torch.randn(B, C), dim=1)):
        z, u = torch.randn(B, C, requires_grad=True), torch.randn(B, C, requires_grad=True)
        for part, reached in (("target", z), ("non_target", z), ("weak", u)):
            z.grad = u.grad = None
            uskd_loss(z, u, label)[part].backward()
            assert reached.grad is not None and (u if reached is z else z).grad is None


def test_uskd_of_one_hot_soft_labels_is_finite_and_drops_a_second_class() -> None:
    z, u = torch.randn(B, C), torch.randn(B, C)
    hard, soft = uskd_loss(z, u, LABELS), uskd_loss(z, u, F.one_hot(LABELS, C).float())
    assert all(v.isfinite() for v in soft.values())
    torch.testing.assert_close(soft["target"], hard["target"])  # P2 = 0
    assert not torch.isclose(soft["non_target"], hard["non_target"])
    with pytest.raises(UserError, match="at least 3 classes"):
        uskd_loss(z[:, :2], u[:, :2], torch.rand(B, 2))


def test_uskd_ranks_on_probabilities_as_the_paper_or_on_logs_as_the_code() -> None:
    z, u, y = (
        torch.log(torch.tensor([[0.4, 0.35, 0.25]])),
        torch.log(torch.tensor([[0.3, 0.2, 0.5]])),
        torch.tensor([0]),
    )
    log_s = z.log_softmax(1)[0]
    score = {"probabilities": z.exp()[0] / (1 - 0.4), "logs": log_s / (1 - log_s[0])}
    for rank_on, final in score.items():
        order = (u.exp()[0] / (1 - 0.3) + final).argsort(descending=True)
        zipf = (1 / (order.argsort() + 1.0))[1:]
        expected = -(zipf / zipf.sum() * z[0, 1:].log_softmax(0)).sum()
        torch.testing.assert_close(uskd_loss(z, u, y, beta=1.0, rank_on=rank_on)["non_target"], expected)


def test_uskd_reads_tokens_and_maps() -> None:
    for tap in (torch.randn(B, 17, 8), torch.randn(B, 8, 3, 3)):
        objective, student = USKD(), Signals(logits=torch.randn(B, C), taps={"stage:-2": tap})
        objective.build(student, Signals(), {})
        assert objective.weak.weight.shape == (C, 8)
        assert total(objective(student, Signals(), {"label": LABELS}, SPAN)).isfinite()


# ---- pld -------------------------------------------------------------------------------------------------------------


def test_pld_gradient_is_its_closed_form_and_its_rows_sum_to_0() -> None:
    z, v = torch.randn(B, C, dtype=torch.float64, requires_grad=True), torch.randn(B, C, dtype=torch.float64)
    pld_loss(z, v, LABELS, temperature=2.0).backward()
    torch.testing.assert_close(z.grad.sum(1), torch.zeros(B, dtype=torch.float64), atol=1e-12, rtol=0)
    expected = torch.zeros_like(z)
    for b in range(B):
        order = [int(LABELS[b]), *(c for c in v[b].argsort(descending=True).tolist() if c != LABELS[b])]
        alpha = F.softmax(v[b] / 2, dim=0)
        for k, pick in enumerate(order):
            expected[b, order[k:]] += alpha[pick] * F.softmax(z[b, order[k:]].detach(), dim=0)
            expected[b, pick] -= alpha[pick]
    torch.testing.assert_close(z.grad, expected / B)


def test_pld_of_two_classes_is_weighted_cross_entropy() -> None:
    z, v, y = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    alpha = F.softmax(v, dim=1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(pld_loss(z, v, y), (alpha * F.cross_entropy(z, y, reduction="none")).mean())


def test_pld_with_a_one_hot_teacher_is_cross_entropy() -> None:
    z = torch.randn(B, C)
    torch.testing.assert_close(pld_loss(z, 200.0 * F.one_hot(LABELS, C), LABELS), F.cross_entropy(z, LABELS))


def test_pld_does_not_change_with_a_shift_or_an_order_of_classes_and_is_convex() -> None:
    z, v = torch.randn(B, C), torch.randn(B, C)
    loss = pld_loss(z, v, LABELS)
    torch.testing.assert_close(pld_loss(z + 50, v, LABELS), loss, atol=1e-5, rtol=1e-5)
    order = torch.randperm(C)
    torch.testing.assert_close(pld_loss(z[:, order], v[:, order], order.argsort()[LABELS]), loss)
    step = torch.randn(B, C)
    along = torch.stack([pld_loss(z + t * step, v, LABELS) for t in torch.linspace(-3, 3, 13)])
    assert (along[:-2] + along[2:] - 2 * along[1:-1] > -1e-5).all()


def test_pld_refuses_soft_labels_and_breaks_ties_by_class() -> None:
    with pytest.raises(UserError, match="class ids only"):
        PLD()(Signals(logits=torch.randn(B, C)), Signals(logits=torch.randn(B, C)), {"label": torch.rand(B, C)}, SPAN)
    z = torch.randn(1, 3)
    s = z[0]
    expected = ((s.logsumexp(0) - s[1]) + (s[[0, 2]].logsumexp(0) - s[0])) / 3
    torch.testing.assert_close(pld_loss(z, torch.zeros(1, 3), torch.tensor([1])), expected)


# ---- nd --------------------------------------------------------------------------------------------------------------


def test_nd_identities() -> None:
    means = torch.randn(C, 8)
    f_t, e = torch.randn(B, 8), F.normalize(means, dim=1)[LABELS]
    norm = f_t.norm(dim=1, keepdim=True)
    for f_s, value in ((norm * e, 0.0), (0 * e, 1.0), (-norm * e, 2.0)):
        torch.testing.assert_close(nd_loss(f_s, f_t, means, LABELS), torch.tensor(value), atol=1e-6, rtol=0)
    longer = 2 * norm * F.normalize(torch.randn(B, 8), dim=1)
    torch.testing.assert_close(nd_loss(3 * longer, f_t, means, LABELS), nd_loss(longer, f_t, means, LABELS))


def test_nd_grows_a_short_embedding_and_never_shrinks_a_long_one() -> None:
    means, f_t = torch.randn(C, 8), torch.randn(B, 8)
    e, norm = F.normalize(means, dim=1)[LABELS], f_t.norm(dim=1, keepdim=True)
    short = (0.5 * norm * e).requires_grad_()
    nd_loss(short, f_t, means, LABELS).backward()
    torch.testing.assert_close(short.grad, -e / norm / B)
    long = (2 * norm * F.normalize(torch.randn(B, 8), dim=1)).requires_grad_()
    nd_loss(long, f_t, means, LABELS).backward()
    torch.testing.assert_close((long.grad * long.detach()).sum(1), torch.zeros(B), atol=1e-6, rtol=0)


def test_nd_variants_are_its_two_halves() -> None:
    means, f_s, f_t = torch.randn(C, 8), torch.randn(B, 8), torch.randn(B, 8)
    cosine = 1 - F.cosine_similarity(f_s, means[LABELS]).mean()
    torch.testing.assert_close(nd_loss(f_s, f_t, means, LABELS, "cosine"), cosine)
    torch.testing.assert_close(nd_loss(0.25 * f_t, f_t, means, LABELS, "norm"), torch.tensor(0.75))
    assert nd_loss(2 * f_t, f_t, means, LABELS, "norm") == 0


def test_nd_names_a_class_without_a_mean_and_refuses_soft_labels() -> None:
    means = class_means(torch.randn(4, 8), torch.tensor([0, 1, 3, 4]), C)
    with pytest.raises(UserError, match="class 2 has no mean embedding"):
        nd_loss(torch.randn(B, 8), torch.randn(B, 8), means, LABELS)
    with pytest.raises(UserError, match="class ids only"):
        nd_loss(torch.randn(B, 8), torch.randn(B, 8), means, torch.rand(B, C))
    with pytest.raises(UserError, match=r"\(6, 4\), the teacher's \(6, 8\)"):
        nd_loss(torch.randn(B, 4), torch.randn(B, 8), means, LABELS)


def test_nd_reads_the_authors_table_and_logs_what_rises(tmp_path: Path) -> None:
    means = torch.randn(C, 6)
    table = tmp_path / "means.json"
    table.write_text(json.dumps({str(k): row for k, row in enumerate(means.tolist())}))
    objective, _, teacher, batch = ready("nd", class_means=str(table))
    torch.testing.assert_close(objective.means, means)
    objective.adapter = None
    doubled = 2 * teacher.embedding.norm(dim=1, keepdim=True) * F.normalize(means, dim=1)[LABELS]
    terms = objective(Signals(embedding=doubled), teacher, batch, SPAN)
    torch.testing.assert_close(terms["log:norm_ratio"], torch.tensor(2.0))
    torch.testing.assert_close(terms["log:cosine"], torch.tensor(1.0))
    assert not terms["log:cosine"].requires_grad
    table.write_text(json.dumps({"0": [1.0]}))
    with pytest.raises(UserError, match="classes 0 to 4 with 6 numbers each"):
        ready("nd", class_means=str(table))


def test_nd_adapter_refuses_to_train_on_one_sample() -> None:
    objective, _, _, _ = ready("nd")
    one = Signals(embedding=torch.randn(1, 4)), Signals(embedding=torch.randn(1, 6)), {"label": LABELS[:1]}, SPAN
    with pytest.raises(UserError, match="batch of one sample"):
        objective(*one)
    assert objective.eval()(*one)["loss"].isfinite()


def test_nd_makes_no_adapter_where_widths_agree() -> None:
    objective = ND()
    objective.build(
        Signals(logits=torch.randn(2, C), embedding=torch.randn(2, 6)), Signals(embedding=torch.randn(2, 6)), {}
    )
    assert objective.adapter is None and not objective.param_groups()


# ---- features and relations ------------------------------------------------------------------------------------------


def test_tokens_fold_to_a_map_without_the_class_token() -> None:
    patches = torch.randn(2, 9, 4)
    folded = as_map(torch.cat([torch.zeros(2, 1, 4), patches], dim=1))
    assert folded.shape == (2, 4, 3, 3)
    torch.testing.assert_close(folded[1, :, 1, 2], patches[1, 5])
    assert as_map(torch.randn(2, 201, 4)).shape == (2, 4, 14, 14)  # a class token and four registers
    assert as_map(torch.randn(2, 4)).shape == (2, 4, 1, 1)
    with pytest.raises(UserError, match=r"\(2, 12, 4\) cannot be read as a map"):
        as_map(torch.randn(2, 12, 4))
    with pytest.raises(UserError, match=r"\(2, 4, 3\)|\(2,\)"):
        pooled(torch.randn(2))


def test_maps_of_other_sizes_are_averaged_to_the_smaller() -> None:
    s, t = same_size(torch.randn(2, 3, 8, 4), torch.ones(2, 5, 4, 8))
    assert s.shape == (2, 3, 4, 4) and t.shape == (2, 5, 4, 4) and (t == 1).all()


@pytest.mark.parametrize("name", ["fitnet", "at", "nst", "vid", "review_kd"])
def test_feature_losses_accept_a_token_student_and_a_convolutional_teacher(name: str) -> None:
    objective, student, teacher, batch = ready(name)
    tokens = Signals(
        embedding=student.embedding, taps={k: torch.randn(B, 17, 12, requires_grad=True) for k in student.taps}
    )
    objective.build(tokens, teacher, batch)
    total(objective(tokens, teacher, batch, SPAN)).backward()
    assert all(x.grad.isfinite().all() for x in tokens.taps.values())


def test_relation_losses_are_zero_for_a_rotated_scaled_teacher() -> None:
    f_t = torch.randn(B, 8)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    f_s = 3 * f_t @ turn
    for loss in (rkd_distance_loss, rkd_angle_loss, sp_loss, pkt_loss):
        torch.testing.assert_close(loss(f_s, f_t), torch.tensor(0.0), atol=1e-6, rtol=0)
        assert loss(torch.randn(B, 3), f_t) > 1e-5
        with pytest.raises(UserError, match="gives 5 samples but the teacher 6"):
            loss(f_s[:5], f_t)


def test_rkd_survives_equal_embeddings() -> None:
    f_s = torch.ones(B, 4, requires_grad=True)
    total(RKD()(Signals(embedding=f_s), Signals(embedding=torch.randn(B, 8)), {}, SPAN)).backward()
    assert f_s.grad.isfinite().all()


def test_vid_starts_at_its_initial_variance() -> None:
    objective = ready("vid", initial_variance=5.0)[0]
    variance = F.softplus(objective.log_scales[0]) + VID.eps
    torch.testing.assert_close(variance, torch.full_like(variance, 5.0))


def test_review_kd_fuses_from_the_embedding_upwards() -> None:
    objective = ready("review_kd")[0]
    assert [f.att_conv is None for f in objective.fusions] == [False, False, False, True]
    assert {f.conv1[0].out_channels for f in objective.fusions} == {4}  # the width of the student's embedding
    assert {f.conv1[0].out_channels for f in ready("review_kd", max_width=3)[0].fusions} == {3}


# ---- crd -------------------------------------------------------------------------------------------------------------


def test_crd_negatives_are_of_another_class_and_reach_all_of_them() -> None:
    labels = torch.tensor([2, 0, 0, 1, 2, 0, 1, 2])
    index = torch.arange(8)
    drawn = Negatives(labels).draw(index, 400)
    assert (labels[drawn] != labels[index][:, None]).all()
    for i in index:
        assert set(drawn[i].tolist()) == set(torch.nonzero(labels != labels[i])[:, 0].tolist())
    with pytest.raises(UserError, match="at least two classes"):
        Negatives(torch.ones(8, dtype=torch.long))


def test_crd_memories_follow_only_the_samples_seen_in_training() -> None:
    objective, student, teacher, batch = ready("crd")
    before = objective.memory_student.clone()
    assert before.shape == (N, 128) and before.abs().max() <= (3 / 128) ** 0.5
    objective.eval()(student, teacher, batch, SPAN)
    assert torch.equal(objective.memory_student, before) and objective.z_student == -1
    objective.train()(student, teacher, batch, SPAN)
    v = F.normalize(objective.embed_student(student.embedding))
    torch.testing.assert_close(objective.memory_student[:B], F.normalize(0.5 * before[:B] + 0.5 * v))
    assert torch.equal(objective.memory_student[B:], before[B:])
    constant = objective.z_student.clone()
    assert constant > 0
    objective(student, teacher, batch, SPAN)
    assert torch.equal(objective.z_student, constant)


def test_crd_needs_as_much_memory_as_there_are_training_samples() -> None:
    objective = CRD(negatives=8, width=16)
    objective.build(Signals(embedding=torch.randn(2, 4)), Signals(embedding=torch.randn(2, 6)), {})
    objective.prepare(Training(6, labels=torch.arange(40) % 3))
    assert objective.memory_teacher.shape == (40, 16)
    with pytest.raises(UserError, match="at least two classes"):
        objective.prepare(Training(6, labels=torch.zeros(40, dtype=torch.long)))


# ---- many processes --------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(_gradients(rank, world), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _gradients(rank: int, world: int) -> dict[str, Tensor]:
    """The gradient of the input layer of a student, averaged over ranks as DDP does, for each loss with statistics over
    the batch."""
    draw = torch.Generator().manual_seed(7)
    x, first = torch.randn(B, 8, generator=draw), torch.randn(8, 4 + C + 4, generator=draw)
    f_t, v_t = torch.randn(B, 6, generator=draw), torch.randn(B, C, generator=draw)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    found = {}
    for name in ("dist", "sp", "rkd", "pkt", "uskd"):
        torch.manual_seed(3)
        objective = catalog.objective(name)()
        weight = first.clone().requires_grad_()
        out = x[mine] @ weight
        layers = {n.partition(":")[2]: out[:, -4:] for n in objective.needs if n.startswith("student.tap")}
        student = Signals(logits=out[:, 4 : 4 + C], embedding=out[:, :4], taps=layers)
        teacher = Signals(
            logits=v_t[mine],
            embedding=f_t[mine],
            taps={n.partition(":")[2]: f_t[mine] for n in objective.needs if "teacher.tap" in n},
        )
        objective.build(student, teacher, {})
        total(objective(student, teacher, {"label": LABELS[mine]}, SPAN)).backward()
        if world > 1:
            torch.distributed.all_reduce(weight.grad)
        found[name] = weight.grad / world
    return found


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path), 2), nprocs=2)
    alone = _gradients(0, 1)
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(
                gradient,
                alone[name],
                rtol=1e-4,
                atol=1e-4 * float(alone[name].abs().max()),
                msg=lambda m, n=name: f"{n}: {m}",
            )
