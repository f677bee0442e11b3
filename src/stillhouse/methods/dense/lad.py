"""LAD: a light teacher that sees the label, corrupted, as a fourth channel teaches an RGB network of its own size.

paper: LAD: Make a Strong Teacher with Label Assistance
venue: ECCV 2024
arxiv: 2407.13254
task: segmentation
family: privileged information
use when: there is no big teacher, or none fits the memory: labels of the same images make a light one strong
needs: images with masks at the images' size (label_stride 1), and one architecture

Each class gets a random scalar, drawn again for every image and step, and each pixel a little noise: the channel shows
where regions end, and not what they are. Stage T trains the teacher on two such channels of one image at once, with the
channel-wise divergence of both outputs in both directions (dual path). Stage S trains the student, which has three
channels, with the cross-entropy and the channel-wise divergence to the teacher's maps, whose codes are then fixed. The
published factor of the channel, 100, is for images of 0 to 255; here images are normalised, and 100 / 57 is the same
share. The auxiliary head counts 0.4 in both stages; the released student stage has 0.02, as it continues a trained one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, MethodConfig, Model, Spec, TrainSpec
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import judge
from stillhouse.functional.channelwise import channelwise_divergence
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.precision import full_precision
from stillhouse.methods.distillation import describe
from stillhouse.objectives.ce import cross_entropy
from stillhouse.randomness import generator
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, read_logits
from stillhouse.tasks.segmentation import Segmentation
from stillhouse.training.module import TrainingModule


def fixed_codes(classes: int) -> Tensor:
    """(K + 1,) the codes of stage S, (k - round((K + 1) / 2)) / 10; the last is of what is ignored."""
    return (torch.arange(classes + 1) - round((classes + 1) / 2)) / 10


def label_channel(
    labels: Tensor,
    codes: Tensor,
    noise: Tensor,
    pixel_noise: float = 0.03,
    scale: float = 100 / 57,
    ignore_index: int = IGNORED,
) -> Tensor:
    """The label as an input channel (section 3.2): scale (code[y] + sigma_p noise), (B, 1, H, W).

    Args:
        labels: class ids (B, H, W) from 0 to K - 1, or `ignore_index`.
        codes: (B, K + 1) of each image, or (K + 1,) of all; ignored pixels take the last.
        noise: (B, 1, H, W), standard normal.
        pixel_noise: sigma_p.
        scale: in the unit of the images, of which it is about 1.75 standard deviations.
    """
    ids = torch.where(labels == ignore_index, codes.shape[-1] - 1, labels)
    coded = codes.expand(len(labels), -1).gather(1, ids.flatten(1)).view_as(noise)
    return scale * (coded + pixel_noise * noise)


@dataclass
class Maps:
    """What a network gives: maps of logits (B, K, h, w) at its own stride, and those of its auxiliary head."""

    main: Tensor
    aux: Tensor | None = None


@full_precision
def pixel_loss(maps: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Mean cross-entropy of maps (B, K, h, w), enlarged to the labels (B, H, W); 0 where no pixel counts."""
    large = F.interpolate(maps, labels.shape[-2:], mode="bilinear", align_corners=True)
    return cross_entropy(large.movedim(1, -1), labels, ignore_index=ignore_index)


def task_loss(maps: Maps, labels: Tensor, aux_weight: float, ignore_index: int = IGNORED) -> Tensor:
    """The cross-entropy, and that of the auxiliary head."""
    loss = pixel_loss(maps.main, labels, ignore_index)
    return loss if maps.aux is None else loss + aux_weight * pixel_loss(maps.aux, labels, ignore_index)


def consistency_loss(first: Tensor, second: Tensor, temperature: float = 4.0) -> Tensor:
    """CWD(o1, o2) + CWD(o2, o1) of the maps of one image under two label channels; each target is a constant."""
    return channelwise_divergence(first, second, temperature) + channelwise_divergence(second, first, temperature)


def with_label_channel(network: nn.Module, channels: int) -> nn.Module:
    """The network with one input channel more in its first convolution, whose weights start from N(0, 1e-4); in place.

    Raises:
        UserError: no convolution takes the images' channels.
    """
    plain = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    name = next((n for n, m in plain.items() if m.in_channels == channels), None)
    if name is None:
        raise UserError(
            f"lad: no convolution of {type(network).__name__} takes {channels} channels, so the label has no way in; "
            "take a network whose first layer is a convolution of the image."
        )
    parent, _, last = name.rpartition(".")
    old = plain[name]
    new = copy.deepcopy(old)
    new.in_channels = channels + 1
    extra = 1e-4 * torch.randn_like(old.weight[:, :1])
    new.weight = nn.Parameter(torch.cat([old.weight.detach(), extra], 1))
    setattr(network.get_submodule(parent), last, new)
    return network


def maps_of(task: Segmentation, network: nn.Module, images: Tensor) -> Maps:
    """A network's maps at its own stride."""
    output = task.call(network, {"input": images})
    return Maps(read_logits(output), output.get("aux") if isinstance(output, Mapping) else None)


class AssistedTeacher(Spec):
    """The label-assisted teacher and its training (stage T)."""

    network: Model | None = Field(None, description="Its architecture; default: the student's.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How it is fitted; once, shared by all seeds.")
    labels: bool = Field(True, description="False: the baseline that sees the image alone, without dual path.")
    codes: Literal["random", "fixed"] = Field("random", description="fixed: it can copy the label.")
    pixel_noise: float = Field(0.03, ge=0, description="sigma_p of its training, before the scale.")
    consistency: float = Field(5.0, ge=0, description="Weight of the dual path's divergence.")
    seed: int = Field(0, description="Of its weights and training.")


class Config(MethodConfig):
    data: Data
    student: Model
    teacher: AssistedTeacher = Field(default_factory=AssistedTeacher)
    scale: float = Field(100 / 57, gt=0, description="Of the label's channel, in standard deviations of the images.")
    pixel_noise: float = Field(0.02, ge=0, description="sigma_p while the student is trained.")
    distillation: float = Field(3.0, ge=0, description="Weight of the divergence to the teacher; 0: no teacher.")
    temperature: float = Field(4.0, gt=0, description="T of the channel-wise divergence.")
    aux_weight: float = Field(0.4, ge=0, description="Of an auxiliary head, where the network has one.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How the student is fitted.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])


class Channel:
    """Puts labels beside images, as the recipe says.

    Args:
        config: the scale and the noise of stage S, and what the teacher sees.
        classes: K.
    """

    def __init__(self, config: Config, classes: int) -> None:
        self.config, self.classes = config, classes

    def random(self, images: Tensor, labels: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """Codes from N(0, 1) for each image, and the noise of stage T. Without `draw`, by the step's own key."""
        codes = torch.randn(len(images), self.classes + 1, device=images.device, generator=draw)
        return self.joined(images, labels, codes, self.config.teacher.pixel_noise, draw)

    def fixed(self, images: Tensor, labels: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """The codes of stage S and its noise."""
        codes = fixed_codes(self.classes).to(images.device)
        return self.joined(images, labels, codes, self.config.pixel_noise, draw)

    def permuted(self, images: Tensor, labels: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """The codes of stage S, given to other classes."""
        codes = fixed_codes(self.classes).roll(self.classes // 2).to(images.device)
        return self.joined(images, labels, codes, self.config.pixel_noise, draw)

    def joined(
        self,
        images: Tensor,
        labels: Tensor,
        codes: Tensor,
        pixel_noise: float,
        draw: torch.Generator | None,
    ) -> Tensor:
        """(B, C + 1, H, W): images with the label's channel, or with zeros where the teacher sees none."""
        if not self.config.teacher.labels:
            return torch.cat([images, torch.zeros_like(images[:, :1])], 1)
        noise = torch.randn(images[:, :1].shape, device=images.device, generator=draw)
        channel = label_channel(labels, codes, noise, pixel_noise, self.config.scale)
        return torch.cat([images, channel.to(images.dtype)], 1)


def _labels(batch: Batch) -> Tensor:
    """The masks (B, H, W) at the images' size. Raises `UserError` for others."""
    labels: Tensor = batch["label"]
    if labels.shape[-2:] != batch["input"].shape[-2:]:
        raise UserError(
            f"lad: masks of {tuple(labels.shape[-2:])} are not of the size of the images, "
            f"{tuple(batch['input'].shape[-2:])}; set data.options.label_stride: 1."
        )
    return labels


class TeacherTraining(TrainingModule):
    """Stage T: two label channels of one image, the cross-entropy of both, and their consistency.

    Args:
        network: of four channels.
        task: how it is called.
        channel: what it sees.
        config: the weights.
    """

    def __init__(self, network: nn.Module, task: Segmentation, channel: Channel, config: Config) -> None:
        super().__init__()
        self.student = network
        self.task, self.channel, self.config = task, channel, config

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.student.parameters())}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`, `ce` and `consistency`, unweighted."""
        images, labels, options = batch["input"], _labels(batch), self.config.teacher
        see = self.channel.random if options.codes == "random" else self.channel.fixed
        first = maps_of(self.task, self.student, see(images, labels))
        ce = task_loss(first, labels, self.config.aux_weight)
        if not options.labels:
            return {"loss": ce, "ce": ce}
        second = maps_of(self.task, self.student, see(images, labels))
        ce = ce + task_loss(second, labels, self.config.aux_weight)
        agreed = consistency_loss(first.main, second.main, self.config.temperature)
        return {"loss": ce + options.consistency * agreed, "ce": ce, "consistency": agreed}


class StudentTraining(TrainingModule):
    """Stage S: the cross-entropy, and the channel-wise divergence to the teacher, which alone sees the label's channel.

    Args:
        student: of the images' channels.
        teacher: of one more; None: the cross-entropy alone.
        task, channel, config: as in stage T.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        task: Segmentation,
        channel: Channel,
        config: Config,
    ) -> None:
        super().__init__()
        self.student = student
        self.task, self.channel, self.config = task, channel, config
        self._teacher = (teacher,)  # no submodule: it is in no checkpoint and no optimiser

    def build(self, batch: Batch) -> None:
        """Move the teacher to the student's device."""
        for teacher in self._teacher:
            if teacher is not None:
                teacher.to(next(self.student.parameters()).device).eval().requires_grad_(False)

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.student.parameters())}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`, `ce` and `channelwise`, unweighted."""
        images, labels, (teacher,) = batch["input"], _labels(batch), self._teacher
        ours = maps_of(self.task, self.student, images)
        ce = task_loss(ours, labels, self.config.aux_weight)
        if teacher is None:
            return {"loss": ce, "ce": ce}
        with torch.no_grad():
            theirs = maps_of(self.task, teacher, self.channel.fixed(images, labels))
        distilled = channelwise_divergence(ours.main, theirs.main, self.config.temperature)
        return {"loss": ce + self.config.distillation * distilled, "ce": ce, "channelwise": distilled}


TEACHER = Stage("teacher", "train a teacher that sees labels (stored, shared)")
STUDENT = Stage("student", "train the student")


class LabelAssistance(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Segmentation)
        check_groups(bundle.task, config.evaluate)
        _labels(next(iter(run.loader(config.data, "train", 1, train=True))))
        stages = []
        if config.distillation:
            network = self._teacher_network(config, run)
            sees = "images and noised labels" if config.teacher.labels else "images"
            named = {"teacher": describe((config.teacher.network or config.student).model, network)}
            steps = self._steps(config.data, config.teacher.train, run)
            stages.append(
                TEACHER.filled(does=f"train a teacher that sees {sees} (stored, shared)", models=named, steps=steps)
            )
        student = {"student": describe(config.student.model, run.model(config.student, config.data))}
        losses = "cross-entropy" + (" and the teacher's maps" if config.distillation else "")
        steps = self._steps(config.data, config.train, run)
        stages.append(STUDENT.filled(does=f"train the student with {losses}", models=student, steps=steps))
        return stages

    def run(self, config: Config, run: Run) -> Student:
        task = run.data(config.data, Segmentation).task
        channel, figures = Channel(config, len(task.classes)), {}
        teacher = None
        if config.distillation:
            teacher = self._teacher_network(config, run)
            trained = self._trained_teacher(config, run, teacher, channel)
            teacher.load_state_dict(trained["weights"])
            figures = dict(trained["figures"])
        student = run.model(config.student, config.data)
        module = StudentTraining(student, teacher, task, channel, config)
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        evaluate, splits = run.validating(config.data), run.splits(config.data)
        fitted = run.fit(STUDENT, module, loader, config.train, evaluate=evaluate, splits=splits)
        return run.student(student, config.student, config.data, {**figures, "train_seconds": fitted.seconds})

    @staticmethod
    def _steps(data: DataSpec, train: TrainSpec, run: Run) -> int:
        return train.epochs * len(run.loader(data, "train", train.batch_size, train=True))

    @staticmethod
    def _teacher_network(config: Config, run: Run) -> nn.Module:
        network = run.model(config.teacher.network or config.student, config.data, "teacher", config.teacher.seed)
        return with_label_channel(network, len(run.data(config.data).task.mean))

    def _trained_teacher(self, config: Config, run: Run, network: nn.Module, channel: Channel) -> dict[str, Any]:
        """The weights after stage T, and test figures with random codes, fixed ones, and those permuted."""
        bundle, options = run.data(config.data), config.teacher

        def make() -> dict[str, Any]:
            with run.seeded(options.seed):
                loader = run.loader(config.data, "train", options.train.batch_size, train=True)
                run.fit(TEACHER, TeacherTraining(network, bundle.task, channel, config), loader, options.train)
            figures = {}
            for name, see in {"": channel.random, "_fixed": channel.fixed, "_permuted": channel.permuted}.items():
                seen = AssistedBatches(run.loader(config.data, "test"), see)
                found = judge(bundle.task, network, seen, next(network.parameters()).device, ["segmentation"])
                figures[f"miou_teacher{name}"] = found["miou"]
            return {"weights": state_on_cpu(network), "figures": figures}

        uses = config.model_dump(mode="json", include={"data", "scale", "pixel_noise", "temperature", "aux_weight"})
        uses["teacher"] = {**options.model_dump(mode="json"), "train": options.train.identity()}
        uses["network"] = (options.network or config.student).model_dump(mode="json")
        return run.stage(TEACHER, make, {**uses, "content": bundle.fingerprint})


class AssistedBatches:
    """Test batches as the teacher sees them, with masks at the images' size; the draw is keyed by batch.

    Args:
        batches: images and whole masks.
        see: a method of `Channel`.
    """

    def __init__(self, batches: Any, see: Any) -> None:
        self.batches, self.see = batches, see

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            images, size = batch["input"], batch["input"].shape[-2:]
            small = F.interpolate(batch["label"][:, None].float(), size, mode="nearest")[:, 0].long()
            yield {**batch, "input": self.see(images, small, generator("lad", number))}
