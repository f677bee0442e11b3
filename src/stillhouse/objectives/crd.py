"""CRD: the student's embedding of a sample is told apart, by contrast, from the teacher's embeddings of samples of
other classes.

paper: Contrastive Representation Distillation
venue: ICLR 2020
arxiv: 1910.10699
task: classification
family: features
use when: the structure of the teacher's embedding should pass on, and a memory of the training set's size is no burden
needs: the index of each sample; embeddings of student and teacher; labels of the training set

Noise-contrastive estimation with 16,384 negatives a sample out of two memories (one row of 128 numbers for each
training sample and network), temperature 0.07, momentum 0.5, weight 0.8; the student against the teacher's memory and
the reverse. Negatives come from the other classes of the training set, drawn with replacement (the authors' code draws
without where there are enough). Labels of the batch are not used, so mixup is no error, but an index then stands for a
mixed image. Over many processes the memories follow the samples of all ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def nce_loss(scores: Tensor, samples: int, eps: float = 1e-7) -> Tensor:
    """Noise-contrastive loss of normalised scores, summed over candidates, mean over the batch (eq. 18 of the paper's
    appendix).

    Args:
        scores: (B, 1 + K), exp(similarity / temperature) / Z, the positive first.
        samples: N of the training set; the noise is uniform, 1 / N.
    """
    negatives = scores.shape[1] - 1
    noise = negatives / samples
    positive = (scores[:, 0] / (scores[:, 0] + noise + eps)).log()
    rest = (noise / (scores[:, 1:] + noise + eps)).log().sum(1)
    return -(positive + rest).mean()


@full_precision
def scores_in(memory: Tensor, anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """exp(anchor . memory row / temperature) of each candidate: (N, d), (B, d), (B, 1 + K) -> (B, 1 + K).

    All N similarities are made in one product and then picked: for N below K * d that is less memory than picking rows.
    """
    return ((anchors @ memory.t()).gather(1, candidates) / temperature).exp()


class Negatives(nn.Module):
    """Draws training indices of other classes, uniformly and with replacement.

    Args:
        labels: class ids (N,) of the training set in index order.
    """

    labels: Tensor
    order: Tensor
    counts: Tensor
    starts: Tensor

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        if labels.ndim != 1 or int((torch.bincount(labels) > 0).sum()) < 2:
            raise UserError(
                "crd: needs class ids of at least two classes in the training set, to draw negatives of another class."
            )
        counts = torch.bincount(labels)
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)  # samples, class after class
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)

    def draw(self, index: Tensor, k: int) -> Tensor:
        """(B,) -> (B, k) indices whose class is not that of the row's sample."""
        own = self.labels[index]
        start, count = self.starts[own][:, None], self.counts[own][:, None]
        others = len(self.order) - count
        place = (torch.rand(len(index), k, device=index.device) * others).long().minimum(others - 1)
        return self.order[place + (place >= start) * count]  # step over the row's own class


class CRD(Objective):
    """Contrastive representation distillation.

    Args:
        width: of the two linear embeddings and the memories.
        negatives: a sample.
        temperature: of the similarities.
        momentum: share of a memory's row that remains when its sample is seen.
    """

    name = "crd"
    needs = frozenset({"student.embedding", "teacher.embedding", "index"})
    default_weight = 0.8
    memory_student: Tensor
    memory_teacher: Tensor

    def __init__(
        self, width: int = 128, negatives: int = 16384, temperature: float = 0.07, momentum: float = 0.5
    ) -> None:
        super().__init__()
        checks.options(
            "crd",
            positive={"width": width, "negatives": negatives, "temperature": temperature},
            share={"momentum": momentum},
        )
        self.width, self.negatives, self.temperature, self.momentum = width, negatives, temperature, momentum

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        self.embed_student = nn.Linear(student.require("embedding").shape[-1], self.width)
        self.embed_teacher = nn.Linear(teacher.require("embedding").shape[-1], self.width)

    def prepare(self, ctx: Context) -> None:
        labels = ctx.labels("train")
        device = self.embed_student.weight.device
        bound = 1 / math.sqrt(self.width / 3)
        for name in ("memory_student", "memory_teacher"):
            uniform = torch.rand(len(labels), self.width, generator=ctx.generator("crd", name))
            self.register_buffer(name, ((2 * uniform - 1) * bound).to(device))
        for name in ("z_student", "z_teacher"):  # normalising constants, estimated on the first batch
            self.register_buffer(name, torch.tensor(-1.0, device=device))
        self.sampler = Negatives(labels.cpu()).to(device)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        v_s = gather(F.normalize(self.embed_student(student.require("embedding")).float()))
        v_t = gather(F.normalize(self.embed_teacher(teacher.require("embedding").detach()).float()))
        index = gather(batch["index"])
        candidates = torch.cat([index[:, None], self.sampler.draw(index, self.negatives)], dim=1)
        terms = {
            "student": self._contrast(self.memory_teacher, v_s, candidates, "z_student"),
            "teacher": self._contrast(self.memory_student, v_t, candidates, "z_teacher"),
        }
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self._remember(self.memory_student, v_s, index)
                self._remember(self.memory_teacher, v_t, index)
        return terms

    def _contrast(self, memory: Tensor, anchors: Tensor, candidates: Tensor, constant: str) -> Tensor:
        """The loss of anchors against a memory. Its gradient is taken here, so that the backward pass neither reads the
        memory nor keeps scores."""
        learns = anchors.requires_grad and torch.is_grad_enabled()
        leaf = anchors.detach().requires_grad_(learns)
        scores = scores_in(memory, leaf, candidates, self.temperature)
        estimate = gather(scores.detach().mean()[None]).mean() * len(memory)
        z = torch.where(getattr(self, constant) < 0, estimate, getattr(self, constant))
        if self.training:
            setattr(self, constant, z)
        loss = nce_loss(scores / z, len(memory))
        if not learns:
            return loss
        (grad,) = torch.autograd.grad(loss, leaf)
        along = (anchors * grad).sum()
        return loss.detach() + (along - along.detach())

    def _remember(self, memory: Tensor, v: Tensor, index: Tensor) -> None:
        rows = self.momentum * memory[index] + (1 - self.momentum) * v
        memory.index_copy_(0, index, F.normalize(rows))
