"""DIST: the student keeps the teacher's correlations between classes of a sample and between samples of a class, not
its exact probabilities.

paper: Knowledge Distillation from A Stronger Teacher
venue: NeurIPS 2022
arxiv: 2205.10536
task: classification
family: logits
use when: the teacher is much stronger than the student, or trained with a stronger recipe
needs: teacher logits

L = T^2 (beta * (1 - mean Pearson of rows) + gamma * (1 - mean Pearson of columns)) of softmax(z / T). Published: beta
1, gamma 1, T 1 on ImageNet;
2, 2, 4 on CIFAR-100. Columns run over the batch: over many processes, over the rows of all ranks. Labels are not used.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def dist_loss(student_probs: Tensor, teacher_probs: Tensor) -> dict[str, Tensor]:
    """`inter`: 1 - mean Pearson correlation of rows (classes of a sample), `intra`: of columns (samples of a class);
    eqs. 8 and 9 of the paper.

    Args:
        student_probs, teacher_probs: (B, C) softmax(z / T).
    """
    checks.same_classes("dist", student_probs, teacher_probs)
    checks.one_prediction_a_sample("dist", student_probs)
    teacher_probs = teacher_probs.detach()
    return {
        "inter": 1 - pearson(student_probs, teacher_probs).mean(),
        "intra": 1 - pearson(student_probs.t(), teacher_probs.t()).mean(),
    }


@full_precision
def pearson(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson correlation of each row of x with that of y, (N, M) and (N, M) -> (N,); 0 where a row is constant. Each
    norm is at least eps."""
    return F.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), dim=1, eps=eps)


class DIST(Objective):
    """Inter-class and intra-class relation matching.

    Args:
        beta, gamma: weights of the relations between classes and between samples.
        temperature: of both softmaxes.
    """

    name = "dist"
    needs = frozenset({"student.logits", "teacher.logits"})

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        checks.options("dist", positive={"temperature": temperature}, non_negative={"beta": beta, "gamma": gamma})
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        student_probs = gather(self._probs(student))
        terms = dist_loss(student_probs, gather(self._probs(teacher).detach()))
        scale = self.temperature**2
        return {"inter": self.beta * scale * terms["inter"], "intra": self.gamma * scale * terms["intra"]}

    def _probs(self, signals: Signals) -> Tensor:
        if signals.logits is None:
            return signals.log_probs(self.temperature).exp()
        return F.softmax(signals.logits.float() / self.temperature, dim=-1)
