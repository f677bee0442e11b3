"""SSLD: its losses' identities, which unlabelled images it picks, and a teacher whose statistics do not drift."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.config.specs import DataSpec, ModelSpec, TrainSpec
from stillhouse.data import Loader, load
from stillhouse.data.joined import JoinedDataset, Part, unlabelled
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.functional.divergences import soft_cross_entropy
from stillhouse.methods.classification.ssld import (
    Agreement,
    BatchStatistics,
    Config,
    OnlyClassifier,
    jensen_shannon,
    near_duplicates,
    slower,
    symmetric_kl,
    thumbnails,
    top_of_each_class,
)
from stillhouse.models import build
from stillhouse.signals import Signals


def pair(scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return scale * torch.randn(6, 9), scale * torch.randn(6, 9)


def test_the_loss_is_zero_at_agreement_and_the_same_both_ways() -> None:
    s, t = pair()
    assert symmetric_kl(s, s).item() == pytest.approx(0, abs=1e-7)
    assert symmetric_kl(s, t).item() == pytest.approx(symmetric_kl(t, s).item(), rel=1e-5)


def test_soft_cross_entropy_less_the_teachers_entropy_is_the_divergence() -> None:
    s, t = pair()
    q = t.softmax(-1)
    entropy = -(q * q.log()).sum(-1).mean()
    divergence = (q * (q.log() - s.log_softmax(-1))).sum(-1).mean()
    assert (soft_cross_entropy(s, q) - entropy).item() == pytest.approx(divergence.item(), rel=1e-4)
    reverse = (s.softmax(-1) * (s.log_softmax(-1) - q.log())).sum(-1).mean()
    assert symmetric_kl(s, t).item() == pytest.approx(0.5 * (divergence + reverse).item(), rel=1e-4)


def test_the_true_jensen_shannon_divergence_is_bounded() -> None:
    s, t = pair(50.0)
    assert 0 < jensen_shannon(s, t).item() <= math.log(2) + 1e-6
    assert jensen_shannon(s, s).item() == pytest.approx(0, abs=1e-6)


def test_losses_stay_finite_in_half_precision_and_for_confident_logits() -> None:
    s = (100 * torch.randn(4, 10)).bfloat16().requires_grad_()
    symmetric_kl(s, 100 * torch.randn(4, 10)).backward()
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("loss", ["js", "ce", "jensen_shannon"])
def test_labels_are_never_read(loss: str) -> None:
    s, t = pair()
    wrong = {"label": torch.full((6,), -1)}
    assert torch.isfinite(Agreement(loss)(Signals(logits=s), Signals(logits=t), wrong, Progress())["loss"])


def test_unequal_classes_are_refused() -> None:
    with pytest.raises(UserError, match="same classes"):
        symmetric_kl(torch.randn(2, 10), torch.randn(2, 9))


def test_the_highest_scores_of_every_class_stay() -> None:
    scores, classes = torch.rand(300), torch.randint(4, (300,))
    kept = top_of_each_class(scores, classes * 2, 20)  # classes 1, 3, 5 have no image
    assert torch.equal(kept, kept.sort().values)
    for c in range(4):
        of_class = (classes == c).nonzero()[:, 0]
        best = of_class[scores[of_class].topk(20).indices]
        assert set(best.tolist()) == set(kept[classes[kept] == c].tolist())
    assert len(top_of_each_class(scores, classes, 1000)) == 300


def test_copies_and_mirrored_copies_of_test_images_are_found_and_others_are_not() -> None:
    images = torch.rand(40, 3, 16, 16)
    pool = torch.cat(
        [images[:3] * 0.9 + 0.05, images[3:5].flip(-1), torch.rand(20, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)]
    )
    assert near_duplicates(pool, thumbnails(images), 0.98).tolist() == [True] * 5 + [False] * 21


def test_a_pool_is_normalised_as_the_target_is_and_gives_no_labels() -> None:
    target = load(DataSpec(name="digits", size=50))
    pool = load(DataSpec(name="digits", size=80, seed=3))
    pool.task = replace(pool.task, mean=(0.5,), std=(0.2,))
    joined = JoinedDataset(
        [
            Part(target.dataset("train", train=False), np.arange(50), labelled=True),
            unlabelled(pool, target, train=False),
        ]
    )
    batch = next(iter(Loader(joined, 130)))
    assert (
        batch["label"][50:].eq(-1).all()
        and batch["label"][:50].ge(0).all()
        and torch.equal(batch["label"], joined.labels())
    )
    grey = batch["input"] * 0.3762 + 0.3055
    assert grey.min() >= -1e-3 and grey.max() <= 1.001
    assert torch.equal(batch["index"], torch.arange(130))


def test_a_shuffled_join_gives_every_sample_once() -> None:
    target = load(DataSpec(name="digits", size=50))
    rows = np.array([4, 9, 11])
    joined = JoinedDataset(
        [Part(target.dataset("train", train=False), np.arange(50)), unlabelled(target, target, rows, train=False)]
    )
    alone = next(iter(Loader(joined, 53)))["input"]
    batches = list(Loader(joined, 10, seed=2, shuffle=True))
    index = torch.cat([b["index"] for b in batches])
    assert torch.equal(index.sort().values, torch.arange(53))
    assert torch.equal(torch.cat([b["input"] for b in batches]), alone[index])
    assert torch.equal(alone[50:], alone[torch.from_numpy(rows)])


def test_a_pool_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"pool: the images of 'digits' have shape \(1, 16, 16\)"):
        unlabelled(load(DataSpec(name="digits", image_size=16)), load(DataSpec(name="digits")), train=True)


def test_a_teacher_on_batch_statistics_answers_otherwise_but_does_not_drift() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = 3 + torch.randn(8, 1, 8, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    teacher = BatchStatistics(net)
    said = teacher({"input": x}).logits
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net[1].training and net[1].track_running_stats
    assert not torch.allclose(said, net(x), atol=1e-3)
    with pytest.raises(UserError, match="at least two"):
        teacher({"input": x[:1]})


def test_the_last_stage_trains_the_classifier_alone() -> None:
    student = build(ModelSpec(model="stillhouse:resnet8"), 10, (3, 32, 32))
    module = OnlyClassifier(student, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), [Agreement()])
    module.choose({"input": torch.randn(2, 3, 32, 32)})
    module.train()
    assert [n for n, p in student.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    assert not any(m.training for m in student.modules()) and isinstance(module, Distillation)


def test_the_second_stage_has_a_hundredth_of_the_rate() -> None:
    spec = slower(TrainSpec(epochs=360, schedule={"warmup_epochs": 5}), 30, 0.01)
    assert spec.epochs == 30 and spec.optimizer.lr == pytest.approx(5e-4) and spec.schedule.warmup_epochs == 0


def test_labels_with_a_pool_are_refused() -> None:
    with pytest.raises(ValueError, match="no labels for a pool"):
        Config.model_validate(
            {
                "data": "digits",
                "pool": "digits",
                "loss": "labels",
                "teacher": "stillhouse:mlp",
                "student": "stillhouse:mlp",
            }
        )
