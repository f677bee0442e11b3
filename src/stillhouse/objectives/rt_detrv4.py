"""RT-DETRv4: a detector's deepest map learns the map of a foundation model, at a weight that its gradient's share sets.

paper: RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models
venue: arXiv 2025
arxiv: 2510.25257
task: detection
family: foundation features
use when: a real-time detector is light, and there is a strong image encoder; its inference does not change
needs: a detector with a transformer on its deepest map (RT-DETR, D-FINE), and a teacher with maps or patch tokens

Deep Semantic Injector: a linear layer on the map after the intra-scale transformer (AIFI), and the mean over places of
1 - cosine to the teacher's map, which is resized to the detector's grid. Gradient-guided Adaptive Modulation: before
each optimiser step, the share (percent) of the absolute gradient of all parameters that falls on the transformer; after
each epoch the weight moves so that the share lies within rho ± delta, as if the rest of the gradient were fixed. Where
the share misses the band, its far edge is aimed at, so that it crosses. The released code measures a bare model as 0,
and updates the weight in the first process alone; here the transformer is named by its module, and every process has
the reduced gradient. The published start weights (5, 5, 15, 20) suit the published detectors; rho must be chosen anew
for another one: measure the share without distillation for an epoch (start: 0) and take 1.5 to 2 times that.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError, nearest
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import map_tap
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals

NOTHING = 1e-6  # a share or weight below it is none
LARGEST_STEP = 10.0  # of the weight, either way, in an epoch


@full_precision
def injection_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images and places of 1 - cosine between maps (B, C, h, w) and (B, C, h', w'); the teacher's is resized
    to the student's grid (bilinear)."""
    teacher = teacher.detach()
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
    checks.same_shape("rt_detrv4", student, teacher)
    return (1 - F.cosine_similarity(F.normalize(student, dim=1), F.normalize(teacher, dim=1), dim=1)).mean()


def gradient_sum(gradients: list[Tensor]) -> Tensor:
    """The sum of the absolute values of all gradients, float32, on their device."""
    if not gradients:
        return torch.zeros(())
    return torch.stack([n.float() for n in torch._foreach_norm(gradients, 1)]).sum()


def gradient_share(encoder: list[Tensor], everything: list[Tensor]) -> Tensor:
    """Percent of the absolute gradient of `everything` that lies in `encoder`; 0 where there is none, NaN where it is
    not finite."""
    total = gradient_sum(everything)
    return 100 * gradient_sum(encoder).to(total.device) / total.clamp_min(torch.finfo(torch.float32).tiny)


def modulated(
    weight: float, share: float, rho: float, delta: float, fallback: float | None = None, final: bool = False
) -> float:
    """The weight of the next epoch (Gradient-guided Adaptive Modulation).

    Args:
        weight: of this epoch.
        share: percent of the gradient, mean over the epoch's steps.
        rho, delta: the band is rho - delta to rho + delta.
        fallback: the weight where no gradient was seen, and of the final epochs; None: as it is.
        final: whether the next epoch is one of the last, without augmentation.
    """
    if share < NOTHING or final:
        return weight if fallback is None else fallback
    low, high = rho - delta, rho + delta
    if low <= share <= high or weight <= NOTHING:
        return weight
    p, q = share / 100, (high if share < low else low) / 100
    if abs(p * (1 - q)) < 1e-9:
        return weight
    ratio = max(q * (1 - p) / (p * (1 - q)), 1 / LARGEST_STEP)
    return min(max(weight * ratio, weight / LARGEST_STEP), weight * LARGEST_STEP)


class RTDETRv4(Objective):
    """The injector, whose weight is adapted.

    Args:
        student_layer: the intra-scale transformer's layer, whose output is the map F5.
        teacher_layer: a map, or patch tokens, at the stride of that map.
        start: the weight of the first epoch.
        rho, delta: the band of the gradient's share, in percent.
        fallback: the weight where no gradient was seen, and of the final epochs; None: it stays.
        final_epochs: the last epochs, without augmentation in the paper, that have the fallback.
        adapt: whether the weight is adapted; false: it stays `start`.
        encoder: the module whose gradient counts; default: the module that holds `student_layer`.
    """

    name = "rt_detrv4"

    def __init__(
        self,
        student_layer: str = "model.encoder.aifi.0",
        teacher_layer: str = "norm",
        start: float = 10.0,
        rho: float = 11.0,
        delta: float = 1.0,
        fallback: float | None = None,
        final_epochs: int = 0,
        adapt: bool = True,
        encoder: str | None = None,
    ) -> None:
        super().__init__()
        checks.options("rt_detrv4", positive={"rho": rho}, non_negative={"start": start, "final_epochs": final_epochs})
        if not 0 < delta < rho or rho + delta >= 100:
            raise UserError(
                f"rt_detrv4: the band rho ± delta must lie between 0 and 100 percent; given: {rho} ± {delta}."
            )
        self.student_layer, self.teacher_layer = student_layer, teacher_layer
        self.encoder = encoder or student_layer.rpartition(".")[0] or student_layer
        self.rho, self.delta, self.fallback = rho, delta, fallback
        self.final_epochs, self.adapt = final_epochs, adapt
        self.needs = frozenset({f"student.tap:{student_layer}", f"teacher.tap:{teacher_layer}"})
        self.weight: Tensor
        self.sums: Tensor
        self.history: Tensor
        self.register_buffer("weight", torch.tensor(float(start)))
        self.register_buffer("sums", torch.zeros(4))  # of this epoch: shares, steps; cosines, batches
        self.register_buffer("history", torch.zeros(3))  # epochs until the band, epochs done, clamps in a row

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        ours, theirs = map_tap(student, self.student_layer), map_tap(teacher, self.teacher_layer)
        self.projector = nn.Linear(ours.shape[1], theirs.shape[1])

    def prepare(self, ctx: Context) -> None:
        modules = dict(ctx.student.named_modules())
        if self.encoder not in modules:
            close = nearest(self.encoder, modules)
            hint = f"; nearest: {', '.join(close)}" if close else ""
            raise UserError(f"rt_detrv4: the student has no submodule '{self.encoder}' for `encoder`{hint}.")

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        ours, theirs = map_tap(student, self.student_layer), map_tap(teacher, self.teacher_layer)
        projected = self.projector(ours.movedim(1, -1)).movedim(-1, 1)
        loss = injection_loss(projected, theirs)
        if self.training:
            with torch.no_grad():
                self.sums[2:] += torch.stack([1 - loss.detach(), torch.ones_like(loss)])
        return {"loss": self.weight.clone() * loss, "log:cosine": 1 - loss, "log:weight": self.weight.clone()}

    @torch.no_grad()
    def before_update(self, ctx: Context) -> None:
        """Add up the share of this step's gradient; one that is not finite does not count."""
        encoder = [p.grad for p in ctx.student.get_submodule(self.encoder).parameters() if p.grad is not None]
        others = [p.grad for m in (ctx.student, self) for p in m.parameters() if p.grad is not None]
        share = gradient_share(encoder, others).to(self.sums.device)
        counts = torch.isfinite(share).to(share.dtype)
        self.sums[:2] += torch.stack([share.nan_to_num(0.0, 0.0, 0.0), counts])

    def begin_epoch(self, ctx: Context) -> None:
        if self.sums[1] > 0:  # once an epoch
            self._close_epoch()
            final = ctx.progress.epoch >= ctx.progress.epochs - self.final_epochs
            self._modulate(final)
        self.sums.zero_()

    def _share(self) -> float:
        return float(self.sums[0] / self.sums[1].clamp_min(1))

    def _close_epoch(self) -> None:
        """Count the epoch, and whether it is the first in the band."""
        self.history[1] += 1
        if self.history[0] == 0 and abs(self._share() - self.rho) <= self.delta:
            self.history[0] = self.history[1]

    def _modulate(self, final: bool) -> None:
        if not self.adapt:
            return
        weight = float(self.weight)
        new = modulated(weight, self._share(), self.rho, self.delta, self.fallback, final)
        clamped = (
            not final and weight > NOTHING and max(new / weight, weight / max(new, NOTHING)) >= LARGEST_STEP * 0.999
        )
        self.history[2] = self.history[2] + 1 if clamped else 0
        if self.history[2] == 3:
            warnings.warn(
                f"rt_detrv4: for three epochs in a row the weight moved as far as it may (now {new:.3g}, the share is "
                f"{self._share():.2f} %, rho {self.rho}); measure the share without distillation and choose rho anew.",
                stacklevel=2,
            )
        self.weight.fill_(new)

    def figures(self) -> dict[str, float]:
        """Of the last epoch: the gradient's share (percent), the cosine, and the weight; and in which epoch the share
        was first within the band (one more than there were, if never)."""
        done = self.history.tolist()
        share, cosine = self._share(), float(self.sums[2] / self.sums[3].clamp_min(1))
        within = abs(share - self.rho) <= self.delta
        reached = done[0] or (done[1] + 1 if within else done[1] + 2)
        return {"gam_share": share, "gam_weight": float(self.weight), "dsi_cosine": cosine, "gam_epochs": reached}
