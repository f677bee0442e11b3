"""ReviewKD: the student's deep layers, fused into its shallow ones, are compared with the teacher's maps at several
sizes.

paper: Distilling Knowledge via Knowledge Review
venue: CVPR 2021
arxiv: 2104.09044
task: classification
family: features
use when: both networks have stages of maps; among the strongest of the feature losses
needs: layers of student and teacher, and their embeddings

From deep to shallow, an attention-based fusion (ABF) mixes what came from below with the student's stage and predicts
the teacher's map there; the hierarchical context loss (HCL) is the mean squared error at full size and pooled to 4, 2
and 1, with halving weights. Weight 1 to 8 by pair of networks, after a linear warm-up of 20 epochs, of which the first
counts 0. The pooled embedding is the deepest layer, as in the authors' code; the taps of a stage are its outputs, where
that code takes the teacher's before their last ReLU. Labels are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import LAST_STAGES, as_map, map_tap
from stillhouse.functional.hierarchical_context import hcl_loss
from stillhouse.signals import Batch, Signals


class ABF(nn.Module):
    """Attention-based fusion of one stage (figure 3b).

    Args:
        in_channel: width of the student's stage.
        mid_channel: width of the fused map that is passed on.
        out_channel: width of the teacher's stage.
        fuse: whether a deeper stage is fused in; not so for the deepest.
    """

    def __init__(self, in_channel: int, mid_channel: int, out_channel: int, fuse: bool) -> None:
        super().__init__()
        inwards = nn.Conv2d(in_channel, mid_channel, 1, bias=False)
        outwards = nn.Conv2d(mid_channel, out_channel, 3, padding=1, bias=False)
        self.conv1 = nn.Sequential(inwards, nn.BatchNorm2d(mid_channel))
        self.conv2 = nn.Sequential(outwards, nn.BatchNorm2d(out_channel))
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channel, 2, 1), nn.Sigmoid()) if fuse else None
        nn.init.kaiming_uniform_(inwards.weight, a=1)
        nn.init.kaiming_uniform_(outwards.weight, a=1)

    def forward(self, x: Tensor, y: Tensor | None = None, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """The prediction of the teacher's map (B, out, h, w) and the fused map to pass on (B, mid, h, w).

        Args:
            x: the student's stage (B, in, H, W).
            y: the fused map of the stage below (B, mid, ·, ·), where this one fuses.
            size: (h, w) of the teacher's map; default: that of x.
        """
        x = self.conv1(x)
        if self.att_conv is not None:
            assert y is not None
            conv, squash = self.att_conv
            assert isinstance(conv, nn.Conv2d)
            of_x, of_y = conv.weight.split(
                x.shape[1], dim=1
            )  # the convolution of both, joined, without joining them; of y at its own size
            score = F.conv2d(x, of_x, conv.bias) + F.interpolate(F.conv2d(y, of_y), x.shape[2:], mode="nearest")
            attention = squash(score)
            x = torch.addcmul(x * attention[:, :1], F.interpolate(y, x.shape[2:], mode="nearest"), attention[:, 1:])
        if size is not None and tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, size, mode="nearest")
        return self.conv2(x), x


class ReviewKD(Objective):
    """Knowledge review.

    Args:
        warmup_epochs: epochs over which the loss grows linearly to its full weight; 0: none.
        student_layers, teacher_layers: the stages, shallow to deep, pair by pair.
        embedding: take the pooled embeddings as the deepest layer.
        max_width: upper bound of the width of the fused maps, which is else that of the deepest student layer.
    """

    name = "review_kd"

    def __init__(
        self,
        warmup_epochs: float = 20.0,
        student_layers: list[str] = LAST_STAGES,
        teacher_layers: list[str] = LAST_STAGES,
        embedding: bool = True,
        max_width: int = 512,
    ) -> None:
        super().__init__()
        checks.options("review_kd", non_negative={"warmup_epochs": warmup_epochs}, positive={"max_width": max_width})
        checks.same_layers("review_kd", student_layers, teacher_layers)
        self.warmup_epochs, self.embedding, self.max_width = warmup_epochs, embedding, max_width
        self.student_layers, self.teacher_layers = list(student_layers), list(teacher_layers)
        needs = {f"student.tap:{s}" for s in student_layers} | {f"teacher.tap:{t}" for t in teacher_layers}
        self.needs = frozenset(needs | ({"student.embedding", "teacher.embedding"} if embedding else set()))

    def _maps(self, signals: Signals, layers: list[str]) -> list[Tensor]:
        """Shallow to deep."""
        maps = [map_tap(signals, layer) for layer in layers]
        return [*maps, as_map(signals.require("embedding"))] if self.embedding else maps

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        widths = [
            (s.shape[1], t.shape[1])
            for s, t in zip(self._maps(student, self.student_layers), self._maps(teacher, self.teacher_layers))
        ]
        mid, deepest = min(self.max_width, widths[-1][0]), len(widths) - 1
        self.fusions = nn.ModuleList(ABF(s, mid, t, fuse=i != deepest) for i, (s, t) in enumerate(widths))

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        warmth = min(1.0, progress.epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        terms: list[Tensor] = []
        passed = None
        stages = zip(self.fusions, self._maps(student, self.student_layers), self._maps(teacher, self.teacher_layers))
        for fusion, f_s, f_t in reversed(list(stages)):
            predicted, passed = fusion(f_s, passed, tuple(f_t.shape[2:]))
            terms.append(hcl_loss(predicted, f_t))
        return {"loss": warmth * torch.stack(terms).sum()}
