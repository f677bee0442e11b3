"""TGeo-KD: a small network reads the triangle of student, teacher and label and decides per sample how much to trust
the teacher.

paper: Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation
venue: ICLR 2024
arxiv: 2312.15112
task: classification
family: logits, learned weights
use when: labels or teacher are unreliable on some samples, and no fixed weight between them is right for all
needs: class ids; teacher logits; held-out training samples (`data.holdout`), and the teacher's mean prediction of each
class, made once at the start

It takes the place of ce and kd: list it alone. The fusion network is trained so that the student does better on
held-out samples after a step with its weights. The paper states this bilevel problem but no solver, and the released
scripts do not solve it (one never changes the network, one trains it on the
training loss), so `solver: unroll` is standard one-step unrolling (a choice): a virtual SGD step of rate `virtual_lr`
(open; under Adam its size hardly matters), the held-out loss after it, an Adam step of the fusion network (1e-3, open),
every `every` batches (1, open); then the student steps with the new
weights as constants. `solver: joint` is the released CIFAR code: fusion network and student minimise the training loss
together, without its slips (a broadcast to B x B, no T^2). `edges: signed` is the paper; `squared` and `products` are
what its code computes. Published: `hidden` [128] for images, [32] and [64]
for tables (the attack-detection code: [32, 16], slope 0.01), temperature 4 (CIFAR-100), 1.5 (ImageNet); on problems of
few classes use 1. `geometry` gives the paper's ablation. The virtual step runs in full precision, without dropout, and
leaves batch statistics alone. The held-out labels
are what it believes: where they are as wrong as the training labels (`data.label_noise`), it learns to distrust a good
teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.labels import check_label, hard_only
from stillhouse.functional.precision import full_precision, without_autocast
from stillhouse.functional.token_losses import forward_kl_rows
from stillhouse.signals import Batch, Signals, read_logits

Edges = Literal["signed", "squared", "products"]
Geometry = Literal["label", "intra", "inter"]


def geometry_parts(
    student: Tensor, teacher: Tensor, mean: Tensor, label: Tensor, edges: Edges = "signed"
) -> dict[str, Tensor]:
    """Edges and vertices of both triangles by name, in the published order; eq. 10 of the paper (`signed`) or the
    released scripts.

    Args:
        student, teacher, mean, label: S, T, the teacher's mean prediction of the sample's class (Tbar) and the one-hot
            label G; each (B, C).
    """
    s, t, m, g = student, teacher, mean, label
    vertices = {"S": s, "T": t, "Tbar": m, "G": g}
    if edges == "signed":
        return {"G-S": g - s, "G-T": g - t, "T-S": t - s, "G-Tbar": g - m, "Tbar-S": m - s, **vertices}
    if edges == "squared":
        pairs = {"(Tbar-S)^2": m - s, "(G-S)^2": g - s, "(T-S)^2": t - s, "(T-G)^2": t - g, "(Tbar-G)^2": m - g}
        return {"S": s, "T": t, "G": g, "Tbar": m, **{name: edge.square() for name, edge in pairs.items()}}
    lengths = {"|S-G|": (s - g).abs(), "|S-T|": (s - t).abs(), "|S-Tbar|": (s - m).abs()}
    return {**vertices, **lengths, "(G-Tbar)*(G-S)": (g - m) * (g - s), "(G-T)*(G-S)": (g - t) * (g - s)}


def geometry_state(
    student: Tensor, teacher: Tensor, mean: Tensor, label: Tensor, edges: Edges = "signed", geometry: Geometry = "inter"
) -> Tensor:
    """What the fusion network reads; four times (B, C) -> (B, 9C), or less for the paper's ablation.

    Args:
        geometry: `inter` all; `intra` without the class mean; `label` also without the edge between student and
            teacher.
    """
    parts = geometry_parts(student, teacher, mean, label, edges)
    if geometry != "inter":
        parts = {name: x for name, x in parts.items() if "Tbar" not in name}
    if geometry == "label":
        parts = {name: x for name, x in parts.items() if not ("S" in name and "T" in name)}
    return torch.cat(list(parts.values()), dim=-1)


@full_precision
def sample_losses(
    student_logits: Tensor, teacher_log_probs: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Per sample, KL(teacher || student) at temperature T, without T^2, and the cross-entropy.

    Args:
        student_logits: (B, C).
        teacher_log_probs: (B, C), log-probabilities at that temperature.
        labels: (B,) class ids.

    Returns:
        (B,) and (B,).
    """
    return forward_kl_rows(student_logits / temperature, teacher_log_probs), F.cross_entropy(
        student_logits, labels, reduction="none"
    )


def fused_loss(ratio: Tensor, kd: Tensor, ce: Tensor) -> Tensor:
    """mean_i [ratio_i kd_i + (1 - ratio_i) ce_i]; three times (B,) -> scalar. Eq. 4 of the paper.

    Raises:
        UserError: shapes that differ, which would broadcast to all pairs.
    """
    if not ratio.shape == kd.shape == ce.shape:
        raise UserError(
            f"tgeo_kd: ratio, kd and ce must all have shape (B,); given: {tuple(ratio.shape)}, {tuple(kd.shape)}, "
            f"{tuple(ce.shape)}."
        )
    return (ratio * kd + (1 - ratio) * ce).mean()


class FusionNetwork(nn.Sequential):
    """Linear layers with (leaky) ReLU between them, and a sigmoid: (B, D) -> fusion ratio (B,). Its last bias starts at
    0, near ratio 0.5.

    Args:
        inputs: D.
        hidden: widths of the hidden layers.
        slope: of the ReLU below 0.
    """

    def __init__(self, inputs: int, hidden: Sequence[int] = (128,), slope: float = 0.0) -> None:
        widths = [inputs, *hidden, 1]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.LeakyReLU(slope)]
        last = layers[-2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.bias)
        super().__init__(*layers[:-1])

    def forward(self, state: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(state)).squeeze(-1)


def class_means(probs: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of the rows of each class; (N, C) and (N,) -> (classes, C). A class without samples is uniform."""
    counts = probs.new_zeros(classes).index_add_(0, labels, probs.new_ones(len(labels)))
    sums = probs.new_zeros(classes, probs.shape[1]).index_add_(0, labels, probs)
    return filled(sums / counts.clamp_min(1)[:, None], counts)


def filled(means: Tensor, counts: Tensor) -> Tensor:
    """The means with uniform rows where a class has no samples."""
    return torch.where((counts > 0)[:, None], means, 1 / means.shape[1])


class TGeoKD(Objective):
    """Distillation with a learned fusion ratio per sample, in place of ce and kd.

    Args:
        temperature: of the divergence.
        hidden, slope: the fusion network's hidden layers.
        edges, geometry: what it reads (see `geometry_state`).
        solver: how it is trained.
        lr: its Adam rate (`unroll`).
        virtual_lr: rate of the virtual step.
        every: batches between its steps.
        outer_batch: held-out samples of one of its steps.
    """

    name = "tgeo_kd"
    mean: Tensor  # (C, C), the teacher's mean prediction of each class
    fusion: FusionNetwork
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        temperature: float = 4.0,
        hidden: tuple[int, ...] = (128,),
        slope: float = 0.0,
        edges: Edges = "signed",
        geometry: Geometry = "inter",
        solver: Literal["unroll", "joint"] = "unroll",
        lr: float = 1e-3,
        virtual_lr: float = 0.1,
        every: int = 1,
        outer_batch: int = 128,
    ) -> None:
        super().__init__()
        checks.options(
            "tgeo_kd",
            positive={
                "temperature": temperature,
                "lr": lr,
                "virtual_lr": virtual_lr,
                "every": every,
                "outer_batch": outer_batch,
            },
            non_negative={"slope": slope},
        )
        self.temperature, self.hidden, self.slope, self.edges, self.geometry = (
            temperature,
            tuple(hidden),
            slope,
            edges,
            geometry,
        )
        self.solver, self.lr, self.virtual_lr, self.every, self.outer_batch = solver, lr, virtual_lr, every, outer_batch
        self.needs = frozenset(
            {"student.logits", "teacher.logits", "label"} | ({"holdout"} if solver == "unroll" else set())
        )

    # ---- the fusion ratio --------------------------------------------------------------------------------------------

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        classes = student.require("logits").shape[1]
        self.register_buffer("mean", torch.full((classes, classes), 1 / classes))
        probe = torch.zeros(1, classes)
        self.fusion = FusionNetwork(
            geometry_state(probe, probe, probe, probe, self.edges, self.geometry).shape[1], self.hidden, self.slope
        )
        if self.solver == "unroll":
            self.optimizer = self.keep_optimizer("fusion", torch.optim.Adam(self.fusion.parameters(), self.lr))

    def param_groups(self) -> list[dict[str, Any]]:
        return [] if self.solver == "unroll" else super().param_groups()

    def prepare(self, ctx: Context) -> None:
        if self.solver == "unroll":
            available = len(ctx.labels("holdout"))
            self.outer_batch = min(self.outer_batch, available)
        means, counts = ctx.class_mean("probs", self.teacher)
        self.mean.copy_(filled(means, counts))

    @full_precision
    def ratio(self, student_logits: Tensor, teacher_log_probs: Tensor, labels: Tensor) -> Tensor:
        """How much each sample trusts the teacher, (B,) in (0, 1); differentiable in the fusion network.

        Args:
            student_logits: (B, C).
            teacher_log_probs: (B, C), at temperature 1.
            labels: (B,) class ids.
        """
        student_probs = torch.softmax(student_logits, dim=-1)
        one_hot = F.one_hot(labels, student_probs.shape[1]).to(student_probs.dtype)
        return self.fusion(
            geometry_state(
                student_probs, teacher_log_probs.exp(), self.mean[labels], one_hot, self.edges, self.geometry
            )
        )

    def _losses(self, student_logits: Tensor, teacher: Signals, labels: Tensor) -> tuple[Tensor, Tensor]:
        kl, ce = sample_losses(student_logits, teacher.log_probs(self.temperature), labels, self.temperature)
        return self.temperature**2 * kl, ce

    # ---- training ----------------------------------------------------------------------------------------------------

    def before_step(self, batch: Batch, teacher: Signals, ctx: Context) -> None:
        number = ctx.progress.epoch * ctx.progress.steps_per_epoch + ctx.progress.batch
        if self.solver != "unroll" or number % self.every:
            return
        with without_autocast(batch["label"].device.type), plainly(ctx.student):
            outer = self.held_out_loss(ctx.student, batch, teacher, ctx.holdout(self.outer_batch))
            gradients = torch.autograd.grad(outer, list(self.fusion.parameters()))
        for parameter, gradient in zip(self.fusion.parameters(), _mean_over_ranks(gradients)):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_out_loss(self, student: nn.Module, batch: Batch, teacher: Signals, held_out: Batch) -> Tensor:
        """Cross-entropy on held-out samples after one virtual SGD step with the present ratios: a scalar,
        differentiable in the fusion network. Eqs. 4, 5."""
        weights: dict[str, Tensor] = {name: p for name, p in student.named_parameters() if p.requires_grad}
        logits = _call(student, weights, batch)
        _check(logits, batch["label"])
        ratio = self.ratio(logits.detach(), teacher.log_probs(), batch["label"])
        inner = fused_loss(ratio, *self._losses(logits, teacher, batch["label"]))
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True, materialize_grads=True)
        stepped = {name: p.detach() - self.virtual_lr * slope for (name, p), slope in zip(weights.items(), slopes)}
        return F.cross_entropy(_call(student, stepped, held_out), held_out["label"])

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits, labels, teacher = student.require("logits"), batch["label"], teacher.detach()
        _check(logits, labels)
        known = teacher.log_probs()
        checks.same_classes("tgeo_kd", logits, known)
        if self.solver == "joint":
            ratio = self.ratio(logits, known, labels)
        else:
            with torch.no_grad():
                ratio = self.ratio(logits, known, labels)
        right = (known.argmax(-1) == labels).float()
        return {
            "loss": fused_loss(ratio, *self._losses(logits, teacher, labels)),
            "log:ratio": ratio.mean(),
            "log:ratio_teacher_right": _mean_where(ratio, right),
            "log:ratio_teacher_wrong": _mean_where(ratio, 1 - right),
        }


def _check(logits: Tensor, labels: Tensor) -> None:
    hard_only("tgeo_kd", labels)
    check_label("tgeo_kd", labels, logits)


def _mean_where(x: Tensor, where: Tensor) -> Tensor:
    """The mean over the samples that count, or over all where none does."""
    where = torch.where(where.sum() > 0, where, torch.ones_like(where))
    return (x * where).sum() / where.sum()


def _call(model: nn.Module, weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """Logits under other weights; running statistics are those of copies, so the model's own stay as they are."""
    x = batch["input"]
    state = {**weights, **{name: b.clone() for name, b in model.named_buffers()}}
    return read_logits(
        functional_call(model, state, () if isinstance(x, dict) else (x,), x if isinstance(x, dict) else None)
    )


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Inside, the model can be differentiated twice: no dropout, attention by its plain formula, nothing compiled."""
    dropping = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    with ExitStack() as stack:
        stack.enter_context(nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH))
        if getattr(model, "_compiled_call_impl", None) is not None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in dropping:
                module.training = False
            yield
        finally:
            for module in dropping:
                module.training = True


def _mean_over_ranks(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients averaged over processes, which DDP does not do for a step of an own optimiser."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return gradients
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    return [part.view_as(g) for part, g in zip(parts, gradients)]
