"""Two more losses on maps for the recipes of this folder, as objectives of a file: each channel as a distribution over
positions (CWD; Shu et al., ICCV 2021, arXiv 2011.13256), and maps that correlate (PKD; Cao et al., NeurIPS 2022, arXiv
2207.02039). And the RetinaNets of the paper's settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNet as Retina
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from stillhouse import Batch, Objective, Progress, Signals, UserError
from stillhouse.functional.channelwise import channelwise_divergence
from stillhouse.functional.feature_maps import map_tap, same_size
from stillhouse.functional.precision import full_precision


@full_precision
def pearson_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of maps (B, C, H, W) whose channels have mean 0 and deviation 1 over batch and
    space: 1 - r, with r the mean Pearson correlation of a channel (PKD, eq. 4)."""
    first, second = (
        (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True).clamp_min(1e-6)
        for x in (student, teacher.detach())
    )
    return (first - second).square().mean() / 2


class MapObjective(Objective):
    """A loss on maps, pair by pair; a 1x1 convolution brings the student's map to the teacher's width.

    Args:
        student_layers, teacher_layers: the layers; `logits` is the map of logits, which has no convolution.
    """

    def __init__(self, student_layers: list[str], teacher_layers: list[str]) -> None:
        super().__init__()
        if len(student_layers) != len(teacher_layers) or not student_layers:
            raise UserError(f"{self.name}: give as many student_layers as teacher_layers, and one at least.")
        self.pairs = list(zip(student_layers, teacher_layers))
        sides = [("student", s) for s, _ in self.pairs] + [("teacher", t) for _, t in self.pairs]
        self.needs = frozenset(f"{side}.logits" if x == "logits" else f"{side}.tap:{x}" for side, x in sides)

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        pairs = [(read(student, s), read(teacher, t)) for s, t in self.pairs]
        self.align = nn.ModuleList(
            nn.Identity() if mine.shape[1] == other.shape[1] else nn.Conv2d(mine.shape[1], other.shape[1], 1)
            for mine, other in pairs
        )

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of a pair of maps of one shape."""
        raise NotImplementedError

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        terms = []
        for align, (s, t) in zip(self.align, self.pairs):
            mine, other = same_size(read(student, s), read(teacher, t).detach())
            terms.append(self.distance(align(mine).float(), other.float()))
        return {"loss": torch.stack(terms).sum()}


class CWD(MapObjective):
    """Channel-wise divergence.

    Args:
        temperature: of both distributions.
    """

    name = "cwd"
    positions = True

    def __init__(
        self,
        student_layers: list[str] = ["stage:-1"],  # noqa: B006 (never changed)
        teacher_layers: list[str] = ["stage:-1"],  # noqa: B006
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.temperature = temperature

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return channelwise_divergence(student, teacher, self.temperature)


class PKD(MapObjective):
    """Correlation of maps."""

    name = "pkd"
    positions = True

    def __init__(
        self,
        student_layers: list[str] = ["stage:-1"],  # noqa: B006
        teacher_layers: list[str] = ["stage:-1"],  # noqa: B006
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pearson_distance(student, teacher)


def read(signals: Signals, layer: str) -> Tensor:
    """A layer's map (B, C, H, W), or the map of logits."""
    return signals.require("logits").movedim(-1, 1) if layer == "logits" else map_tap(signals, layer)


class RetinaNet(Retina):  # type: ignore[misc]  # torchvision has no types
    """torchvision's RetinaNet on a ResNet of any depth. Its pyramid is `backbone.fpn.layer_blocks.0` to `.2` and
    `backbone.fpn.extra_blocks.p6`, `.p7`.

    Args:
        num_classes: K.
        backbone: a ResNet of torchvision.
        weights_backbone: DEFAULT: its published weights; None: random.
    """

    def __init__(self, num_classes: int = 80, backbone: str = "resnet50", weights_backbone: str | None = None) -> None:
        trunk = resnet_fpn_backbone(
            backbone_name=backbone,
            weights=weights_backbone,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        super().__init__(trunk, num_classes)
