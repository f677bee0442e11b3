"""ProC-KD: prototypes learned from the teacher's local features augment the student's, so that a teacher of other
classes can teach.

paper: Prototype-guided Cross-task Knowledge Distillation for Large-scale Models
venue: Frontiers of Information Technology & Electronic Engineering 26(6), 2025
arxiv: 2212.13180
task: classification
family: features
use when: a strong transformer exists, but for other classes than the student's
needs: labels; token layers of the teacher; a student of tokens with a final norm and head

Used with `ce`. The teacher's tokens of three layers are fused, described by their residuals to the prototypes
(VLAD) and augmented; the student's last tokens are augmented by the same prototypes; both go through the student's own
norm and head and learn the labels (`prototype`, `augmented`); the plain logits follow the augmented ones
(`consistency`), and the student's layers the teacher's (`features`). The product is the plain student. The released
code defines the modules, followed here to the letter, but trains with the cross-entropy of the plain logits alone:
these four terms, their weights of 1 and the token error are the reconstruction. The authors leave the fused layers
open; ours are the last three stages, and blocks 4, 8 and 12 of 12 (`blocks.3`, …) are the choice for a deep teacher.
`rank` shrinks the widest layer (P d^2 weights), which the paper keeps whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError, unknown
from stillhouse.functional import checks
from stillhouse.functional.divergences import kl_divergence
from stillhouse.functional.feature_maps import LAST_STAGES, grid_of
from stillhouse.functional.labels import check_label
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def vlad(x: Tensor, assignment: Tensor, prototypes: Tensor) -> Tensor:
    """Residuals of tokens to prototypes, summed by soft assignment: V_p = sum_n a_np (x_n - c_p), each of unit length,
    flattened, again of unit length.

    Args:
        x: (B, N, D).
        assignment: (B, N, P), rows sum to 1.
        prototypes: (P, D).

    Returns:
        (B, P * D); zeros where all residuals are zero.
    """
    residuals = assignment.transpose(1, 2) @ x - assignment.sum(1)[..., None] * prototypes
    return F.normalize(F.normalize(residuals, dim=-1).flatten(1), dim=-1)


class Prototypes(nn.Module):
    """Prototypes and the layers that describe and augment tokens with them; all act on each token by itself.

    Args:
        teacher_widths: channels of the teacher's fused layers.
        width: D, the student's channels.
        count: P.
        rank: of the layer from descriptor (P * D) to D; None: full.
    """

    def __init__(self, teacher_widths: list[int], width: int, count: int = 72, rank: int | None = None) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.rand(count, width))
        self.fuse = nn.Linear(sum(teacher_widths), width)
        self.assign = nn.Linear(width, count)
        self.describe = (
            nn.Linear(count * width, width)
            if rank is None
            else nn.Sequential(nn.Linear(count * width, rank, bias=False), nn.Linear(rank, width))
        )
        self.transform = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.encode = nn.Linear(width, width)
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    @full_precision
    def fused(self, features: list[Tensor]) -> Tensor:
        """The teacher's layers (B, N, ·) as one (B, N, D)."""
        return F.relu(self.fuse(torch.cat(features, dim=-1).to(self.fuse.weight.dtype)))

    @full_precision
    def assignment(self, fused: Tensor) -> Tensor:
        """Soft assignment of tokens (B, N, D) to prototypes, (B, N, P)."""
        scores: Tensor = self.assign(F.normalize(fused, dim=-1))
        return scores.softmax(-1)

    @full_precision
    def described(self, fused: Tensor, assignment: Tensor) -> Tensor:
        """Tokens (B, N, D) joined with the descriptor of their image, (B, N, D), not negative."""
        descriptor = self.describe(vlad(F.normalize(fused, dim=-1), assignment, self.prototypes))
        out: Tensor = self.transform(torch.cat([fused, descriptor[:, None].expand_as(fused)], dim=-1))
        return out

    @full_precision
    def augmented(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D), each with what the prototypes it attends to say of it: ReLU(mix([e; r]) + x), (B, N, D)."""
        encoded, prototypes = self.encode(x), self.encode(self.prototypes)
        recalled = (encoded @ prototypes.T).softmax(-1) @ prototypes
        return F.relu(self.mix(torch.cat([encoded, recalled], dim=-1)) + x)


class ProCKD(Objective):
    """Prototype-guided distillation across label spaces.

    Args:
        prototypes: how many.
        teacher_layers: the fused layers.
        student_layers: the student's layers that follow them, pair by pair; only read where `feature_weight` is above
            0.
        norm, head: the student's final norm and classifier, by submodule.
        prototype_weight, augmented_weight, consistency_weight, feature_weight: of the terms.
        learn_prototypes: False leaves them as drawn (ablation).
        rank: bounds the rank of the descriptor's layer.
    """

    name = "proc_kd"

    def __init__(
        self,
        prototypes: int = 72,
        teacher_layers: list[str] = LAST_STAGES,
        student_layers: list[str] = LAST_STAGES,
        norm: str = "norm",
        head: str = "head",
        prototype_weight: float = 1.0,
        augmented_weight: float = 1.0,
        consistency_weight: float = 1.0,
        feature_weight: float = 1.0,
        learn_prototypes: bool = True,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.weights = {
            "prototype": prototype_weight,
            "augmented": augmented_weight,
            "consistency": consistency_weight,
            "features": feature_weight,
        }
        checks.options("proc_kd", positive={"prototypes": prototypes, "rank": 1 if rank is None else rank})
        checks.options("proc_kd", non_negative={f"the weight of {k}": v for k, v in self.weights.items()})
        self.count, self.learn_prototypes, self.rank = prototypes, learn_prototypes, rank
        self.norm, self.head, self.last = norm, head, f"{norm}:in"
        if feature_weight:
            checks.same_layers("proc_kd", student_layers, teacher_layers)
        self.teacher_layers, self.student_layers = list(teacher_layers), list(student_layers) if feature_weight else []
        taps = {f"student.tap:{layer}" for layer in (self.last, *self.student_layers)} | {
            f"teacher.tap:{layer}" for layer in teacher_layers
        }
        self.needs = frozenset({"student.logits", "label"} | taps)
        self._readout: tuple[nn.Module, nn.Module] | None = None  # the student's own, so not registered here

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        last = tokens(student.require(f"tap:{self.last}"))
        taught = [tokens(teacher.require(f"tap:{layer}")) for layer in self.teacher_layers]
        if len({t.shape[1] for t in taught}) > 1:
            raise UserError(
                "proc_kd: the fused teacher layers must have as many tokens; given: "
                f"{', '.join(str(t.shape[1]) for t in taught)}."
            )
        self.parts = Prototypes([t.shape[-1] for t in taught], last.shape[-1], self.count, self.rank)
        self.parts.prototypes.requires_grad_(self.learn_prototypes)
        grid = grid_of(last.shape[1], student.image)
        self.class_token = grid is None or grid.prefix > 0
        self.projections = nn.ModuleList()
        for layer, f_t in zip(self.student_layers, taught):
            f_s = tokens(student.require(f"tap:{layer}"))
            if f_s.shape[1] != f_t.shape[1]:
                raise UserError(
                    f"proc_kd: the student has {f_s.shape[1]} tokens but the teacher {f_t.shape[1]}; give both the "
                    "same patches, or set feature_weight to 0."
                )
            same = f_s.shape[-1] == f_t.shape[-1]
            self.projections.append(nn.Identity() if same else nn.Linear(f_s.shape[-1], f_t.shape[-1]))

    def prepare(self, ctx: Context) -> None:
        there = dict(ctx.student.named_modules())
        for option, name in (("norm", self.norm), ("head", self.head)):
            if name not in there:
                raise unknown(f"submodule of the student for proc_kd's `{option}`:", name, there)
        self._readout = (there[self.norm], there[self.head])

    def _logits(self, x: Tensor) -> Tensor:
        if self._readout is None:
            raise UserError(
                "proc_kd: prepare() was not called, so the student's norm and head are not known; train with the "
                "engine, or call it once."
            )
        norm, head = self._readout
        x = norm(x)
        logits: Tensor = head(x[:, 0] if self.class_token else x.mean(1))
        return logits

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        label, plain, parts = batch["label"], student.require("logits"), self.parts
        check_label("proc_kd", label, plain)
        taught = [tokens(teacher.require(f"tap:{layer}")).detach() for layer in self.teacher_layers]
        fused = parts.fused(taught)
        assignment = parts.assignment(fused)
        from_teacher = self._logits(parts.augmented(parts.described(fused, assignment)))
        augmented = self._logits(parts.augmented(tokens(student.require(f"tap:{self.last}"))))
        terms = {
            "prototype": F.cross_entropy(from_teacher.float(), label),
            "augmented": F.cross_entropy(augmented.float(), label),
            "consistency": kl_divergence(plain, augmented.detach().float().log_softmax(-1)),
        }
        if self.student_layers:
            pairs = zip(self.projections, self.student_layers, taught)
            errors = [
                F.mse_loss(project(tokens(student.require(f"tap:{layer}"))).float(), f_t.float())
                for project, layer, f_t in pairs
            ]
            terms["features"] = torch.stack(errors).mean()
        out = {name: self.weights[name] * value for name, value in terms.items()}
        out["log:dead_prototypes"] = (assignment.detach().mean((0, 1)) < 0.1 / self.count).float().mean()
        return out


def tokens(x: Tensor) -> Tensor:
    """A feature as tokens (B, N, D): a map (B, D, H, W) is read pixel by pixel. Raises `UserError` for another number
    of axes."""
    if x.ndim == 3:
        return x
    if x.ndim == 4:
        return x.flatten(2).transpose(1, 2)
    raise UserError(
        f"proc_kd: a feature of shape {tuple(x.shape)} holds no tokens; tap a layer that gives (B, N, D), or a map "
        "(B, D, H, W)."
    )
