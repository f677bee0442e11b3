"""BD-KD: two networks learn together, and per sample the student stresses forward or reverse divergence by who of the
two is surer.

paper: BD-KD: Balancing the Divergences for Online Knowledge Distillation
venue: arXiv 2024
arxiv: 2212.12965
task: classification
family: online
use when: there is no trained teacher, and the student's confidences should be well calibrated without recalibration
needs: labels; a larger network that trains along, `teacher: {peer: …}`

The student's own cross-entropy is the objective `ce`; the terms here are the student's balanced divergence, and the
peer's cross-entropy and divergence. Each side takes the other's prediction as a constant; both step at once, at the
same rate. No code was released, and the paper's text says that both divergences are used with sample-wise weights that
adapt, and that the teacher's term must not limit it. What is left open is chosen here and may be set: the criterion is
the entropy of both predictions at `entropy_temperature` (default: `temperature`); a student surer than its peer gets
`delta` times the forward divergence, a less sure one (or a tie) `delta` times the reverse (`rule: swap` exchanges
them); the peer is drawn by KL(student || peer)
(`peer_divergence: forward` for the other); delta 2, temperature 4 (2 for about ten classes), all terms weighed 1, with
T^2. `delta: 1` is the fixed balance, the sum of both divergences, and the objective `dml` at temperature T is the
forward one alone. More than two networks are not covered.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.divergences import weighed
from stillhouse.functional.precision import full_precision
from stillhouse.objectives.ce import cross_entropy
from stillhouse.signals import Batch, Signals


@full_precision
def divergences(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Per sample, forward KL(teacher || student) and reverse KL(student || teacher) at temperature T; (B, C) and (B, C)
    -> (B,) and (B,). No factor T^2."""
    checks.same_classes("bd_kd", student_logits, teacher_logits)
    checks.one_prediction_a_sample("bd_kd", student_logits)
    log_s, log_t = (
        F.log_softmax(student_logits / temperature, dim=-1),
        F.log_softmax(teacher_logits / temperature, dim=-1),
    )
    ratio = log_t - log_s
    return weighed(log_t, ratio).sum(-1), -weighed(log_s, ratio).sum(-1)


@full_precision
def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / T); (B, C) -> (B,)."""
    log_p = F.log_softmax(logits / temperature, dim=-1)
    return -weighed(log_p, log_p).sum(-1)


def surer(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Where the student is surer than the teacher (of lower entropy at temperature T), (B,) bool, without gradient."""
    return entropy(student_logits.detach(), temperature) < entropy(teacher_logits.detach(), temperature)


def balanced_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    delta: float = 2.0,
    rule: Literal["default", "swap"] = "default",
    entropy_temperature: float | None = None,
) -> Tensor:
    """The student's term: T^2 mean(w_F forward + w_R reverse), with the teacher as a constant; (B, C) and (B, C) ->
    scalar.

    Args:
        student_logits, teacher_logits: (B, C).
        temperature: of both divergences.
        delta: weight of the stressed divergence; the other has 1.
        rule: `default` stresses the forward one where the student is surer than the teacher, else the reverse one;
            `swap` the other way round.
        entropy_temperature: at which the two are compared; None: at `temperature`.
    """
    forward, reverse = divergences(student_logits, teacher_logits.detach(), temperature)
    stress_forward = surer(student_logits, teacher_logits, entropy_temperature or temperature) ^ (rule == "swap")
    return (
        temperature**2
        * (torch.where(stress_forward, delta, 1.0) * forward + torch.where(stress_forward, 1.0, delta) * reverse).mean()
    )


def peer_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    direction: Literal["reverse", "forward"] = "reverse",
) -> Tensor:
    """The peer's term, with the student as a constant: T^2 mean KL(student || peer) (`reverse`), or KL(peer || student)
    (`forward`); scalar."""
    forward, reverse = divergences(student_logits.detach(), teacher_logits, temperature)
    return temperature**2 * (reverse if direction == "reverse" else forward).mean()


class BDKD(Objective):
    """Balanced online distillation of a student and a peer.

    Args:
        temperature: of the divergences.
        delta: weight of the divergence that a sample stresses; 1 is the fixed balance.
        rule: which divergence a student surer than its peer stresses: `default` forward, `swap` reverse.
        entropy_temperature: at which the entropies are compared; default: `temperature`.
        peer_divergence: direction of the peer's own divergence.
    """

    name = "bd_kd"
    needs = frozenset({"student.logits", "teacher.logits", "label"})

    def __init__(
        self,
        temperature: float = 4.0,
        delta: float = 2.0,
        rule: Literal["default", "swap"] = "default",
        entropy_temperature: float | None = None,
        peer_divergence: Literal["reverse", "forward"] = "reverse",
    ) -> None:
        super().__init__()
        checks.options("bd_kd", positive={"temperature": temperature}, non_negative={"delta": delta})
        if entropy_temperature is not None:
            checks.options("bd_kd", positive={"entropy_temperature": entropy_temperature})
        self.temperature, self.delta, self.rule = temperature, delta, rule
        self.entropy_temperature, self.peer_divergence = entropy_temperature, peer_divergence

    def prepare(self, ctx: Context) -> None:
        if getattr(ctx.teachers[self.teacher], "model", None) is ctx.student:
            raise UserError(
                f"bd_kd: the teacher '{self.teacher}' and the student are one and the same network; give the peer a "
                "network of its own."
            )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        mine, peer = student.require("logits"), teacher.logits
        if peer is None or (torch.is_grad_enabled() and not peer.requires_grad):
            raise UserError(
                f"bd_kd: the teacher '{self.teacher}' must be a network that trains along: give it as `peer:`, not as "
                "`model:`."
            )
        return {
            "student": balanced_divergence(
                mine, peer, self.temperature, self.delta, self.rule, self.entropy_temperature
            ),
            "peer_ce": cross_entropy(peer, batch["label"]),
            "peer": peer_divergence(mine, peer, self.temperature, self.peer_divergence),
            "log:surer": surer(mine, peer, self.entropy_temperature or self.temperature).float().mean(),
        }
