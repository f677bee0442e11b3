"""OFA-KD: exit branches turn the student's stages into logits, which learn from a teacher of any architecture, the true
class strengthened.

paper: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation
venue: NeurIPS 2023
arxiv: 2310.19444
task: classification
family: logits
use when: teacher and student differ in architecture (CNN, transformer, MLP-mixer), so that their inner features cannot
be compared
needs: labels; teacher logits; four stages of the student (three work too)

Two terms, `logits` and `branches` (their sum over the stages), are added to the cross-entropy `ce`; all weights are 1
and one eps serves all logits or each has its own. Published eps lie between 1 and 1.5, larger for weaker teachers.
Branches are dropped with the training. Stage 4 is the last, so a network of three stages has 2, 3 and 4. Transformers
here are cut in quarters; the authors take blocks 2, 4, 10, 12 of 12
(`layers: [blocks.1, blocks.3, blocks.9, blocks.11]`). Branches of tokens merge patches down to a grid of `grid` (7 at
224 px; set the last stage's own at other sizes). Where paper and released code differ the code is followed: eps also
acts on the other classes and the label enters once, by `ce`;
`nontarget_exponent: false` and `include_hard: true` are the paper. Soft labels count as their largest class, as in the
code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.divergences import soft_cross_entropy
from stillhouse.functional.feature_maps import grid_of
from stillhouse.functional.labels import check_label, class_ids
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals

HEADS = 4


@full_precision
def ofa_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    eps: float = 1.0,
    temperature: float = 1.0,
    nontarget_exponent: bool = True,
    include_hard: bool = False,
) -> Tensor:
    """Cross-entropy with enhanced targets, mean over the batch: -sum_k w_k log q_k, with w = (p + m)^eps - m and m the
    one-hot label.

    Args:
        student_logits, teacher_logits: (B, C). The teacher's may be log-probabilities.
        labels: class ids (B,), or soft labels (B, C), of which the largest class is the target.
        eps: the exponent; 1 is plain soft cross-entropy.
        temperature: divides both logits; no factor T^2 is applied.
        nontarget_exponent: raise the other classes to eps too (released code); False leaves them p_k (paper).
        include_hard: leave out the "- m", so that the hard label is in the loss (paper).

    Raises:
        UserError: shapes that do not fit, or (on the CPU) a class id out of range.
    """
    checks.same_classes("ofa_kd", student_logits, teacher_logits)
    check_label("ofa_kd", labels, student_logits)
    p = F.softmax(teacher_logits.detach() / temperature, dim=-1)
    mask = torch.zeros_like(p).scatter_(1, class_ids(labels)[:, None], 1.0)
    raised = (p + mask) ** eps
    if not nontarget_exponent:
        raised = torch.where(mask.bool(), raised, p)
    return soft_cross_entropy(student_logits / temperature, raised if include_hard else raised - mask)


class SepConv(nn.Module):
    """Two depthwise-separable 3x3 convolutions with batch norm; the first halves the map. (B, inputs, H, W) to (B,
    outputs, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.op = nn.Sequential(*separable(inputs, inputs, stride=2), *separable(inputs, outputs, stride=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


def separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """A depthwise 3x3 and a pointwise convolution, batch norm, ReLU."""
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    return [depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class PatchMerging(nn.Module):
    """2x2 neighbours of a square grid, column by column, joined and projected: (B, g * g, inputs) to (B, g * g / 4,
    outputs)."""

    def __init__(self, inputs: int, outputs: int, act: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * inputs)
        self.reduction = nn.Linear(4 * inputs, outputs, bias=False)
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        side = math.isqrt(length) // 2
        x = x.view(rows, side, 2, side, 2, width).permute(0, 1, 3, 4, 2, 5).reshape(rows, side * side, 4 * width)
        out: Tensor = self.act(self.reduction(self.norm(x)))
        return out


class PatchesOnly(nn.Module):
    """Applies `fn` to the patches alone: the first `class_tokens` tokens pass by."""

    def __init__(self, fn: nn.Module, class_tokens: int) -> None:
        super().__init__()
        self.fn, self.class_tokens = fn, class_tokens

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.fn(x[:, self.class_tokens :])
        return torch.cat([x[:, : self.class_tokens], patches], dim=1) if self.class_tokens else patches


class Readout(nn.Module):
    """The class token, or the mean over tokens: (B, L, D) to (B, D)."""

    def __init__(self, class_tokens: int) -> None:
        super().__init__()
        self.class_tokens = class_tokens

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.class_tokens else x.mean(1)


def map_branch(stage: int, channels: int, width: int, num_classes: int) -> nn.Sequential:
    """The branch of a map (B, channels, H, W): one `SepConv` for each stage after this one (the last has a 1x1
    convolution), pooling, classifier.

    Args:
        stage: 1 to 4; 4 is the last.
        width: channels before the classifier, the larger of both networks' embeddings.
    """
    steps = 4 - stage
    widths = [channels * 2**i for i in range(steps)] + [width]
    body: list[nn.Module] = [SepConv(a, b) for a, b in itertools.pairwise(widths)] or [nn.Conv2d(channels, width, 1)]
    return initialised(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)))


def token_branch(
    stage: int, length: int, channels: int, width: int, num_classes: int, class_tokens: int | None = None, grid: int = 7
) -> nn.Sequential:
    """The branch of tokens (B, length, channels): patches are merged to the last stage's grid, transformer blocks,
    readout, classifier.

    Args:
        stage: 1 to 4; 4 is the last.
        width: the student's embedding width.
        class_tokens: tokens before the patches; None: 1 where only that makes the grid square, else 0.
        grid: side of the last stage's grid of patches.

    Raises:
        UserError: tokens that make no square, a grid that cannot be halved, a width that four heads do not divide or
            that does not fit.
    """
    from timm.models.vision_transformer import Block

    where = f"ofa_kd: stage {stage} has {length} tokens of {channels} channels"
    side = math.isqrt(length)
    class_tokens = int(side * side != length) if class_tokens is None else class_tokens
    if class_tokens not in (0, 1) or side * side + class_tokens != length:
        raise UserError(
            f"{where}: a branch needs a square grid of patches after no or one class token; tap another layer."
        )
    merges = max(int(math.log2(side / grid)), 0)
    if side % 2**merges:
        raise UserError(
            f"{where}: a grid of {side} x {side} cannot be halved {merges} times; set `grid` to the last stage's grid."
        )
    if channels != width and (class_tokens or not merges):
        raise UserError(
            f"{where}, but the student's embedding has {width}; without merging, or with a class token, both must be "
            f"equal (`grid` is {grid})."
        )
    if width % HEADS:
        raise UserError(
            f"{where}: the branch's {HEADS} attention heads do not divide the student's embedding of {width}."
        )
    merging = [PatchMerging(channels if i == 0 else width, width, act=i == 0 or i < merges - 1) for i in range(merges)]
    blocks = [
        Block(width, HEADS, mlp_ratio=4.0, qkv_bias=False, norm_layer=nn.LayerNorm) for _ in range(max(4 - stage, 1))
    ]
    first = PatchesOnly(nn.Sequential(*merging), class_tokens)
    return initialised(
        nn.Sequential(first, nn.Sequential(*blocks), Readout(class_tokens), nn.Linear(width, num_classes))
    )


def initialised(branch: nn.Sequential) -> nn.Sequential:
    """Convolutions He-normal by fan-out, linear layers truncated normal of deviation 0.02 with zero bias, as
    released."""
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return branch


class OFAKD(Objective):
    """Distillation through exit branches.

    Args:
        eps: exponent of the enhanced targets; a list gives one per stage and, last, one for the final logits.
        stages: which of the four stages get a branch.
        layers: the student's layers in place of its stages, one per entry of `stages`.
        temperature: divides the logits of teacher, student and branches.
        logits_weight, branch_weight: of the two terms.
        grid: side of the last stage's grid of patches, for students of tokens.
        width: channels before the classifiers of maps; default: the larger embedding of student and teacher. Give it
            for a teacher without embedding.
        maps_as_tokens: read the student's maps as tokens, as the authors do of Swin.
        nontarget_exponent, include_hard: see `ofa_loss`.
    """

    name = "ofa_kd"

    def __init__(
        self,
        eps: float | list[float] = 1.0,
        stages: list[int] = [1, 2, 3, 4],  # noqa: B006 (never changed; its default is shown to users)
        layers: list[str] | None = None,
        temperature: float = 1.0,
        logits_weight: float = 1.0,
        branch_weight: float = 1.0,
        grid: int = 7,
        width: int | None = None,
        maps_as_tokens: bool = False,
        nontarget_exponent: bool = True,
        include_hard: bool = False,
    ) -> None:
        super().__init__()
        self.stages, self.eps = list(stages), exponents(eps, stages)
        if layers is not None and len(layers) != len(stages):
            raise UserError(
                f"ofa_kd: layers must name one layer for each of the {len(stages)} stages; given: {len(layers)}."
            )
        self.layers = list(layers) if layers is not None else [f"stage:{s - 5}" for s in stages]
        checks.options(
            "ofa_kd", positive={"temperature": temperature, "grid": grid, "width": 1 if width is None else width}
        )
        checks.options("ofa_kd", non_negative={"logits_weight": logits_weight, "branch_weight": branch_weight})
        self.temperature, self.weights, self.grid, self.width = temperature, (logits_weight, branch_weight), grid, width
        self.maps_as_tokens, self.nontarget_exponent, self.include_hard = (
            maps_as_tokens,
            nontarget_exponent,
            include_hard,
        )
        needs = {
            "label",
            "student.logits",
            "student.embedding",
            "teacher.logits",
            *(f"student.tap:{layer}" for layer in self.layers),
        }
        self.needs = frozenset(needs | ({"teacher.embedding"} if width is None else set()))

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        own = student.require("embedding").shape[-1]
        widest = self.width or max(own, 0 if teacher.embedding is None else teacher.embedding.shape[-1])
        classes = student.require("logits").shape[-1]
        self.branches = nn.ModuleDict()
        for stage, layer in zip(self.stages, self.layers):
            feature = self._feature(student, layer)
            if feature.ndim == 4:
                self.branches[str(stage)] = map_branch(stage, feature.shape[1], widest, classes)
            elif feature.ndim == 3:
                grid = grid_of(feature.shape[1], student.image)
                if grid is not None and grid.height != grid.width:
                    raise UserError(
                        f"ofa_kd: the student's layer '{layer}' has {grid.height} x {grid.width} patches, but a "
                        "branch of tokens merges a square grid; "
                        "give square images."
                    )
                self.branches[str(stage)] = token_branch(
                    stage, feature.shape[1], feature.shape[2], own, classes, grid=self.grid
                )
            else:
                raise UserError(
                    f"ofa_kd: the student's layer '{layer}' gives {tuple(feature.shape)}; a branch needs a map (B, C, "
                    "H, W) or tokens (B, L, D)."
                )

    def _feature(self, student: Signals, layer: str) -> Tensor:
        x = student.require(f"tap:{layer}")
        return x.flatten(2).transpose(1, 2) if self.maps_as_tokens and x.ndim == 4 else x

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        label, targets = batch["label"], teacher.log_probs()
        target = class_ids(label)
        options = (self.temperature, self.nontarget_exponent, self.include_hard)
        out = {"logits": self.weights[0] * ofa_loss(student.require("logits"), targets, label, self.eps[-1], *options)}
        total = out["logits"].new_zeros(())
        for stage, layer, eps in zip(self.stages, self.layers, self.eps):
            logits = self.branches[str(stage)](self._feature(student, layer))
            total = total + ofa_loss(logits, targets, label, eps, *options)
            out[f"log:accuracy_stage{stage}"] = (logits.detach().argmax(-1) == target).float().mean()
        return out | {"branches": self.weights[1] * total}


def exponents(eps: float | Sequence[float], stages: Sequence[int]) -> list[float]:
    """One exponent per stage and one for the final logits. Raises `UserError` for a wrong count, exponents not above 0,
    or stages not among 1 to 4."""
    if not stages or len(set(stages)) != len(stages) or not set(stages) <= {1, 2, 3, 4}:
        raise UserError(f"ofa_kd: stages must be different ones of 1, 2, 3, 4 (4 is the last); given: {list(stages)}.")
    given = [float(eps)] if isinstance(eps, int | float) else [float(e) for e in eps]
    if len(given) not in (1, len(stages) + 1):
        raise UserError(
            f"ofa_kd: eps must be one number, or {len(stages) + 1}: one per stage and, last, one for the final "
            f"logits; given: {len(given)}."
        )
    for e in given:
        checks.options("ofa_kd", positive={"eps": e})
    return given if len(given) > 1 else given * (len(stages) + 1)
