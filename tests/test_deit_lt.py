"""DeiT-LT: class weights, who sees which image, what changes at the epoch of re-weighting, SAM, repeated
augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec, TrainSpec
from stillhouse.data import BatchKey, Loader, load
from stillhouse.distillation.own_input import ViewInput
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.methods.classification.deit_lt import (
    DeiTLT,
    Repeated,
    SharpnessAware,
    components,
    effective_number_weights,
    hard_loss,
)
from stillhouse.runs import recipe
from stillhouse.training.context import Progress
from stillhouse.training.engine import fit

RECIPE = Path(__file__).parents[1] / "recipes" / "classification" / "deit_lt.yaml"
CLASSES = 10


class Seeing(nn.Module):
    """A linear teacher that remembers its last input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.fc, self.seen = nn.Linear(64, CLASSES), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.fc(x.flatten(1))


def vit() -> VisionTransformerDistilled:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return VisionTransformerDistilled(**sizes, num_classes=CLASSES)


def module(start: int | None = 2, view: str | None = None, **options: object) -> tuple[DeiTLT, Seeing]:
    seeing = Seeing()
    teacher = FrozenTeacher(seeing, prepare=None if view is None else ViewInput(view))
    weights = torch.linspace(0.1, 3, CLASSES)
    return DeiTLT(vit(), teacher, weights, start, clean=view is not None, **options), seeing


def batch(n: int = 8) -> dict:
    draw = torch.Generator().manual_seed(1)
    x, weak = (torch.randn(n, 1, 8, 8, generator=draw) for _ in range(2))
    return {"input": x, "label": torch.arange(n) % CLASSES, "views": {"weak": weak}}


def seen_by(student: DeiTLT) -> list[Tensor]:
    seen: list[Tensor] = []
    student.student.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


def test_rare_classes_weigh_more_and_weights_have_mean_one() -> None:
    weights = effective_number_weights(torch.tensor([5000, 500, 50, 1]))
    assert weights.mean().item() == pytest.approx(1, abs=1e-6) and (weights.diff() > 0).all()
    nearly_inverse = effective_number_weights(torch.tensor([4, 2, 1]))  # beta^n is about 1 - n (1 - beta)
    torch.testing.assert_close(nearly_inverse / nearly_inverse[0], torch.tensor([1.0, 2.0, 4.0]), rtol=1e-3, atol=0)
    with pytest.raises(UserError, match="class 1 has no training samples"):
        effective_number_weights(torch.tensor([3, 0]))


def test_weights_are_of_the_teachers_labels_and_leave_a_single_sample_alone() -> None:
    logits, labels, weights = torch.randn(3, 4), torch.tensor([0, 3, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(hard_loss(logits, labels, weights), (rows * weights[labels]).sum() / 9)
    assert torch.equal(hard_loss(logits[:1], labels[:1], weights), hard_loss(logits[:1], labels[:1]))


def test_the_teacher_labels_the_students_mixed_images() -> None:
    made, teacher = module()
    student, given = seen_by(made), batch()
    terms = made(given, Progress(epoch=1))
    assert torch.equal(teacher.seen, student[0]) and not torch.equal(teacher.seen, given["input"])
    torch.testing.assert_close(terms["loss"], (terms["labels"] + terms["teacher"]) / 2)


def test_a_teacher_with_a_view_reads_unmixed_images_and_its_labels_are_mixed() -> None:
    made, teacher = module(view="weak")
    student, given = seen_by(made), batch()
    found = made(given, Progress(epoch=0))["teacher"]
    assert torch.equal(teacher.seen, given["views"]["weak"]) and not torch.equal(student[0], given["input"])
    mixed, blend = made.mixed(given, Progress(epoch=0))
    torch.testing.assert_close(blend(F.one_hot(given["label"], CLASSES).float()), mixed["label"])
    labels = blend(F.one_hot(teacher.fc(given["views"]["weak"].flatten(1)).argmax(-1), CLASSES).float())
    tokens = made.student.forward_features(mixed["input"])
    torch.testing.assert_close(found, F.cross_entropy(made.student.head_dist(tokens[:, 1]), labels))


def test_from_its_epoch_on_images_are_whole_labels_hard_and_classes_weighted() -> None:
    made, teacher = module(start=2)
    student, given = seen_by(made), batch()
    terms = made(given, Progress(epoch=2))
    assert torch.equal(student[0], given["input"]) and torch.equal(teacher.seen, given["input"])
    tokens = made.student.forward_features(given["input"])
    of_class, of_token = made.student.head(tokens[:, 0]), made.student.head_dist(tokens[:, 1])
    labels = teacher.fc(given["input"].flatten(1)).argmax(-1)
    torch.testing.assert_close(terms["labels"], F.cross_entropy(of_class, given["label"]))
    torch.testing.assert_close(terms["teacher"], F.cross_entropy(of_token, labels, weight=made.weights))


def test_without_such_an_epoch_classes_are_never_weighted() -> None:
    made, _ = module(start=None, mixup=0.0, cutmix=0.0)
    heavy, _ = module(start=None, mixup=0.0, cutmix=0.0)
    heavy.weights *= torch.arange(CLASSES)
    late = Progress(epoch=10**6, epochs=10**6)
    assert made(batch(), late)["teacher"] == heavy(batch(), late)["teacher"]


class Quadratic(nn.Module):
    """logits (w, 0): its cross-entropy has a gradient that can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.norm = nn.Parameter(torch.tensor([0.3, -0.4])), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.w.expand(len(x), 2)


def test_sam_takes_the_gradient_at_the_worst_point_nearby() -> None:
    net, rho = Quadratic(), 0.5
    made = SharpnessAware(net, torch.tensor([1, 1]), "ce", rho)
    given = {"input": torch.randn(4, 3) + 2, "label": torch.zeros(4, dtype=torch.long)}
    made(given, Progress())["loss"].backward()
    first, statistics = net.w.grad.clone(), net.norm.running_mean.clone()
    made.before_update(None)  # type: ignore[arg-type]
    assert torch.equal(net.w, torch.tensor([0.3, -0.4])), "the weights themselves do not move"
    worst = (net.w.detach() + rho * first / first.norm()).requires_grad_()
    F.cross_entropy(worst[None], torch.zeros(1, dtype=torch.long)).backward()
    torch.testing.assert_close(net.w.grad, worst.grad)
    assert torch.equal(net.norm.running_mean, statistics) and net.norm.momentum == 0.1


def test_repeated_augmentation_shows_fewer_samples_in_several_versions() -> None:
    spec = DataSpec(name="digits", size=60, views={"other": ["RandomHorizontalFlip"]})
    data = load(spec).dataset("train", train=True)
    repeated = Repeated(data, 3)
    found = repeated.batch(BatchKey(2, np.arange(12), 0, 12), 0)
    assert found["index"].tolist() == [0, 1, 2, 3] * 3 and found["views"]["other"].shape == found["input"].shape
    first, second, _ = found["input"].split(4)
    assert not torch.equal(first, second)
    assert torch.equal(first, data.batch(BatchKey(6, np.arange(4), 0, 4), 0)["input"])
    assert not torch.equal(first, repeated.batch(BatchKey(3, np.arange(12), 0, 12), 0)["input"][:4])


class Stopping(DeiTLT):
    """Stops where it is told to, as a killed process does."""

    stop = -1

    def forward(self, batch: dict, progress: Progress) -> dict[str, Tensor]:
        if progress.epoch * progress.steps_per_epoch + progress.batch == self.stop:
            raise KeyboardInterrupt
        return super().forward(batch, progress)


@pytest.mark.parametrize("stop", [3, 9])  # before and after re-weighting begins
def test_a_training_that_was_stopped_ends_in_the_same_weights(tmp_path: Path, stop: int) -> None:
    data = load(DataSpec(name="digits", size=64)).dataset("train", train=True)
    spec = TrainSpec(epochs=3, batch_size=16, log_every=1, checkpoint_seconds=0)

    def trained(folder: str, at: int = -1) -> dict[str, Tensor]:
        made = Stopping(vit(), FrozenTeacher(Seeing()), torch.linspace(0.1, 3, CLASSES), start=2)
        made.stop = at
        fit(made, Loader(data, 16, shuffle=True), spec, folder=tmp_path / folder, cpu=True)
        return made.student.state_dict()

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("cut", stop)
    assert all(map(torch.equal, whole.values(), trained("cut").values()))


def test_components_count_the_directions_of_the_variance() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0, 10.0, 0.1])
    assert components(torch.cat([x, torch.zeros(200, 5)], 1) + 7) == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (["distillation=soft"], "soft cannot be weighted by class"),
        (["teacher=null"], "give a teacher, or set distillation: none"),
        (["data.mixup=0.2"], "set mixup and cutmix at the top level"),
        (["teacher.train.accumulate=2"], r"set train\.accumulate to 1, or rho to 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        recipe.load(RECIPE, sets=changes)


def test_a_student_without_a_distillation_token_is_refused() -> None:
    with pytest.raises(UserError, match="must be a ViT of timm with a distillation token"):
        DeiTLT(nn.Linear(2, 2), None, torch.ones(2), None)
