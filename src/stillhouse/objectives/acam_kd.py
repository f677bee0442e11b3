"""ACAM-KD: maps are compared under spatial and channel masks that teacher and student choose together, for every
image.

paper: Adaptive and Cooperative Attention Masking for Knowledge Distillation
venue: ICCV 2025
arxiv: 2503.06307
task: classification, detection, segmentation
family: features
use when: networks have maps at matching places, above all in dense prediction (pyramid levels, or the map of logits:
layer `logits`)
needs: layers of student and teacher

Added to the task's own loss. At each layer the teacher's map asks the student's by cross-attention; from the fused
map, M units give a mask over positions and one over channels; the squared differences under them are `spatial` and
`channel`, and the overlap of the masks is `diversity`. Published: M = 6 for detection, the number of classes for
segmentation. `inherit` starts the named parts of the student from the teacher's weights where they fit. No code was
released; from descriptions of the paper. Reconstructions: the sum of a mask divides its term, as in MasKD, whose
normalisation this is (some notes print it as a factor); the channel units start from N(0, 1), the spatial ones from
N(0, 0.01^2); gradients flow into the masks from both sides. `scale_free` and `detach_student_in_fusion` are ours, for
tasks in which the masks would fade under the loss (watch `faintest_mask`); recipes/dense has a detector's pyramid and
a segmenter's logits. Diversity is the mean over pairs of masks,
in [0, 1]; `diversity: joint` is the printed form, M - 1 times as large. Maps above `max_tokens` positions have keys
and values pooled, which approximates the attention. `mask_source` gives the ablations: `none` is the plain mean
squared error.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError, unknown
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import map_tap
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals

Source = Literal["cooperative", "teacher", "student", "none"]
Parts = Literal["both", "spatial", "channel"]
Diversity = Literal["pairwise", "joint"]
FAINT = 0.05


@full_precision
def masked_losses(
    difference: Tensor, spatial: Tensor, channel: Tensor, scale_free: bool = False
) -> tuple[Tensor, Tensor]:
    """The spatial and the channel term: squared masked differences over the masks' sums, mean over units and batch.

    L_s = mean_bm sum_cp (M_s[m,p] D[c,p])^2 / (C sum_p M_s[m,p]), and likewise L_c with channels and positions
    exchanged.

    Args:
        difference: D, (B, C, L).
        spatial: (B, M, L), in [0, 1]. All ones give the mean squared error.
        channel: (B, M, C).
        scale_free: divide by the sum of squared masks, so that fainter masks do not cost less.
    """
    squares = difference.square()
    _, channels, length = difference.shape
    weigh_s, weigh_c = spatial.square(), channel.square()
    area_s, area_c = (weigh_s.sum(-1), weigh_c.sum(-1)) if scale_free else (spatial.sum(-1), channel.sum(-1))
    over_positions = torch.einsum("bml,bl->bm", weigh_s, squares.sum(1)) / (channels * area_s + 1e-6)
    over_channels = torch.einsum("bmc,bc->bm", weigh_c, squares.sum(2)) / (length * area_c + 1e-6)
    return over_positions.mean(), over_channels.mean()


@full_precision
def mask_overlap(masks: Tensor, form: Diversity = "pairwise") -> Tensor:
    """Dice overlap of the units' masks (B, M, n): 1 for equal masks, 0 for disjoint ones (`joint`: M - 1 and 0); mean
    over the batch. M = 1 gives 0."""
    units = masks.shape[1]
    if units < 2:
        return masks.sum() * 0.0
    products = masks @ masks.transpose(1, 2)
    norms = products.diagonal(dim1=1, dim2=2)
    others = 1.0 - torch.eye(units, dtype=masks.dtype, device=masks.device)
    if form == "joint":
        return (2 * (products * others).sum((1, 2)) / (2 * norms.sum(1) + 1e-12)).mean()
    dice = 2 * products / (norms[:, :, None] + norms[:, None, :] + 1e-12)
    return (dice * others).sum((1, 2)).mean() / (units * (units - 1))


@full_precision
def cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C_q)) v over positions, (B, C_q, H, W), (B, C_q, h, w), (B, C, h, w) -> (B, C, H, W); the
    attention matrix is never stored.

    Queries and keys are filled with zeros up to C channels, which leaves the scores as they are and lets fused kernels
    run.
    """
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (query, key, value))
    fill = (0, v.shape[-1] - q.shape[-1])
    out = F.scaled_dot_product_attention(
        F.pad(q, fill)[:, None], F.pad(k, fill)[:, None], v[:, None], scale=1 / math.sqrt(q.shape[-1])
    )
    return out[:, 0].transpose(1, 2).reshape(len(q), v.shape[-1], *query.shape[2:])


class Level(nn.Module):
    """Alignment, fusion and masks of one layer.

    Args:
        student_channels, channels: of the student's and the teacher's map; a 1x1 convolution aligns them where they
            differ.
        units: M.
        query: which side asks in the fusion.
        max_tokens: positions above which keys and values are average-pooled.
    """

    def __init__(
        self,
        student_channels: int,
        channels: int,
        units: int = 6,
        query: Literal["teacher", "student"] = "teacher",
        max_tokens: int = 4096,
    ) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.align: nn.Module = (
            nn.Identity() if student_channels == channels else nn.Conv2d(student_channels, channels, 1)
        )
        self.to_query, self.to_key, self.to_value = (
            nn.Conv2d(channels, width, 1) for width in (inner, inner, channels)
        )
        self.channel_units = nn.Parameter(torch.randn(units, 1))
        self.spatial_units = nn.Parameter(0.01 * torch.randn(units, channels))
        self.query, self.max_tokens = query, max_tokens

    @full_precision
    def aligned(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's map in the teacher's width and size."""
        student = self.align(student)
        if student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
        return student

    @full_precision
    def fuse(self, student: Tensor, teacher: Tensor) -> Tensor:
        """What one side answers the other's queries, (B, C, H, W)."""
        asks, answers = (teacher, student) if self.query == "teacher" else (student, teacher)
        if answers.shape[2] * answers.shape[3] > self.max_tokens:
            shrink = math.ceil(math.sqrt(answers.shape[2] * answers.shape[3] / self.max_tokens))
            answers = F.avg_pool2d(answers, shrink, ceil_mode=True, count_include_pad=False)
        return cross_attention(self.to_query(asks), self.to_key(answers), self.to_value(answers))

    @full_precision
    def masks(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Spatial masks (B, M, L) and channel masks (B, M, C) of a fused map."""
        spatial = torch.sigmoid(torch.einsum("mc,bcl->bml", self.spatial_units, fused.flatten(2)))
        return spatial, torch.sigmoid(self.channel_units * fused.mean((2, 3))[:, None])


class ACAMKD(Objective):
    """Distillation of maps under cooperative masks.

    Args:
        student_layers, teacher_layers: layers, pair by pair; `logits` is the map of logits.
        masks: units M of each layer.
        distill_weight, diversity_weight: alpha of the masked terms, lambda of the masks' overlap.
        parts: use both kinds of masks, or one.
        mask_source: what the masks are made from: both networks, one of them, or no masks at all.
        query: which side asks in the fusion.
        diversity: `pairwise` or `joint`, see `mask_overlap`.
        detach_student_in_fusion: no gradient into the student by way of the masks.
        standardise: standardise both maps per channel over batch and space, for features of a large scale.
        scale_free: divide the masked terms by the sum of squared masks, so that masks cannot lower them by fading.
        ignore_index: differences at positions with this label (B, H, W) are set to zero.
        max_tokens: positions above which keys and values of the fusion are average-pooled.
        inherit: submodules that start from the teacher's weights where name and shape agree.
    """

    name = "acam_kd"
    same_classes = False
    positions = True
    faintest: Tensor

    def __init__(
        self,
        student_layers: list[str] = ["stage:-1"],  # noqa: B006 (never changed; its default is shown to users)
        teacher_layers: list[str] = ["stage:-1"],  # noqa: B006
        masks: int = 6,
        distill_weight: float = 1.0,
        diversity_weight: float = 1.0,
        parts: Parts = "both",
        mask_source: Source = "cooperative",
        query: Literal["teacher", "student"] = "teacher",
        diversity: Diversity = "pairwise",
        detach_student_in_fusion: bool = False,
        standardise: bool = False,
        scale_free: bool = False,
        ignore_index: int | None = None,
        max_tokens: int = 4096,
        inherit: list[str] = [],  # noqa: B006
    ) -> None:
        super().__init__()
        checks.same_layers("acam_kd", student_layers, teacher_layers)
        checks.options("acam_kd", positive={"masks": masks, "max_tokens": max_tokens})
        checks.options("acam_kd", non_negative={"distill_weight": distill_weight, "diversity_weight": diversity_weight})
        for option, value, valid in (
            ("parts", parts, Parts),
            ("mask_source", mask_source, Source),
            ("diversity", diversity, Diversity),
        ):
            if value not in get_args(valid):
                raise unknown(f"acam_kd {option}", value, get_args(valid))
        self.pairs = list(zip(student_layers, teacher_layers))
        self.units, self.distill_weight, self.diversity_weight = masks, distill_weight, diversity_weight
        self.use, self.mask_source, self.query, self.diversity = parts, mask_source, query, diversity
        self.detach_student_in_fusion, self.standardise, self.ignore_index = (
            detach_student_in_fusion,
            standardise,
            ignore_index,
        )
        self.scale_free, self.max_tokens, self.inherit = scale_free, max_tokens, list(inherit)
        sides = [("student", layer) for layer in student_layers] + [("teacher", layer) for layer in teacher_layers]
        maps = {f"{side}.logits" if layer == "logits" else f"{side}.tap:{layer}" for side, layer in sides}
        self.needs = frozenset(maps if ignore_index is None else maps | {"label"})

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        maps = self._maps(student, teacher)
        self.levels = nn.ModuleList(
            Level(f_s.shape[1], f_t.shape[1], self.units, self.query, self.max_tokens) for f_s, f_t in maps
        )
        self.register_buffer("faintest", torch.ones(()))

    def _maps(self, student: Signals, teacher: Signals) -> list[tuple[Tensor, Tensor]]:
        return [(map_of(student, s), map_of(teacher, t)) for s, t in self.pairs]

    def prepare(self, ctx: Context) -> None:
        if self.inherit:
            teacher = getattr(ctx.teachers[self.teacher], "model", None)
            inherit_weights(ctx.student, teacher, self.inherit)

    def begin_epoch(self, ctx: Context) -> None:
        if self.faintest < FAINT:
            warnings.warn(
                "acam_kd: the mean of a mask has sunk below 0.05, so it distils little; lower distill_weight or "
                "masks, or set scale_free.",
                stacklevel=2,
            )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        terms: list[dict[str, Tensor]] = []
        for level, (f_s, f_t) in zip(self.levels, self._maps(student, teacher)):
            assert isinstance(level, Level)
            terms.append(self._terms(level, f_s.float(), f_t.detach().float(), batch))
        out = {name: torch.stack([t[name] for t in terms]).sum() for name in terms[0] if not name.startswith("log:")}
        if "log:faintest_mask" in terms[0]:
            out["log:faintest_mask"] = torch.stack([t["log:faintest_mask"] for t in terms]).amin()
            self.faintest.copy_(out["log:faintest_mask"])
        return out

    def _terms(self, level: Level, student: Tensor, teacher: Tensor, batch: Batch) -> dict[str, Tensor]:
        student = level.aligned(student, teacher)
        if self.standardise:
            student, teacher = standardised(student), standardised(teacher)
        difference = teacher - student
        if self.ignore_index is not None:
            seen = (batch["label"] != self.ignore_index).to(difference.dtype)[:, None]
            difference = difference * F.interpolate(seen, difference.shape[2:], mode="nearest")
        difference = difference.flatten(2)
        if self.mask_source == "none":
            return {"mse": self.distill_weight * difference.square().mean()}
        asked = student.detach() if self.detach_student_in_fusion else student
        fused = (
            level.fuse(asked, teacher)
            if self.mask_source == "cooperative"
            else teacher
            if self.mask_source == "teacher"
            else asked
        )
        spatial, channel = level.masks(fused)
        over_positions, over_channels = masked_losses(difference, spatial, channel, self.scale_free)
        out, used = {}, []
        if self.use != "channel":
            out["spatial"], used = self.distill_weight * over_positions, [spatial]
        if self.use != "spatial":
            out["channel"], used = self.distill_weight * over_channels, [*used, channel]
        overlaps = [mask_overlap(masks, self.diversity) for masks in used]
        out["diversity"] = self.diversity_weight * torch.stack(overlaps).sum()
        out["log:faintest_mask"] = torch.stack([masks.detach().mean((0, 2)).amin() for masks in used]).amin()
        return out


def map_of(signals: Signals, layer: str) -> Tensor:
    """A layer's map (B, C, H, W), or the map of logits. Raises `UserError` for logits that are no map."""
    if layer != "logits":
        return map_tap(signals, layer)
    logits = signals.require("logits")
    if logits.ndim != 4:
        raise UserError(f"acam_kd: the layer `logits` must give maps (B, H, W, C); given: {tuple(logits.shape)}.")
    return logits.movedim(-1, 1)


def standardised(x: Tensor) -> Tensor:
    """A map (B, C, H, W) with mean 0 and deviation 1 per channel over batch and space."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + 1e-6)


@torch.no_grad()
def inherit_weights(student: nn.Module, teacher: nn.Module | None, names: list[str]) -> None:
    """Copy each of the teacher's layers under these submodules to the student's layer of the same name, where all its
    shapes agree.

    Raises:
        UserError: a teacher that is no network, a name that is no submodule of the student, or one under which nothing
            agrees.
    """
    if teacher is None:
        raise UserError("acam_kd: inherit needs a teacher that is one network.")
    theirs = dict(teacher.named_modules())
    mine = dict(student.named_modules())
    for name in names:
        if name not in mine:
            raise unknown("submodule of the student for acam_kd's `inherit`:", name, mine)
        layers = [
            (m, theirs[n])
            for n, m in mine.items()
            if (n == name or n.startswith(f"{name}.")) and n in theirs and next(m.children(), None) is None
        ]
        fitting = [(m, t) for m, t in layers if m.state_dict() and shapes(m) == shapes(t)]
        if not fitting:
            raise UserError(
                f"acam_kd: inherit: no layer under '{name}' of the student has the name and shapes of one of the "
                "teacher's; leave it out."
            )
        for layer, other in fitting:
            layer.load_state_dict(other.state_dict())


def shapes(layer: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a layer's weights and buffers by name."""
    return {k: v.shape for k, v in layer.state_dict().items()}
