"""TopKLD: reverse KL on the teacher's K most probable tokens, forward KL on all others.

paper: Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models
venue: arXiv 2025
arxiv: 2501.06218
task: language, tokens of images
family: logits
use when: a model of tokens is quantised to few bits and will be sampled from its K most probable tokens
needs: teacher logits; labels or `mask` say which tokens count

With p the teacher's and q the student's probabilities, and S the teacher's K largest: D = sum over S of q log(q/p) - q
+ p, plus the sum over the rest of p log(p/q) - p + q. Mean over the tokens that count; temperature 1; no factor T^2.
K is a number of tokens, or `share` of the vocabulary. K = V gives the reverse KL, K = 0 the forward one. No official
code was found, and the abstract leaves open which direction stands on which part: `top: forward` is the other way
round. The terms - q + p, which cancel where one direction is used throughout, keep every term at least 0, so that
nothing is gained by moving mass from one part to the other; `plain: true` leaves them out. All three are
reconstructions, and so is the default share, 0.22, which is what VAR samples from (900 of 4,096).
On words it is one more objective (`quantized_distillation` with `objectives: [topkld]`); on images see
`low_bit_generation`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError, unknown
from stillhouse.functional import checks
from stillhouse.functional.counting import counted, counted_mean, step_count
from stillhouse.functional.divergences import weighed
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_losses import check_vocabulary
from stillhouse.signals import Batch, Signals, log_softmax

Direction = Literal["reverse", "forward"]


def top_mask(teacher_log_probs: Tensor, k: int) -> Tensor:
    """(..., V) bool: the k largest of each row, all for k of V or more, none for 0 or less; of equal ones, those of the
    lowest index. A constant.

    Raises:
        UserError: k that is no whole number.
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise UserError(f"topkld: k is a whole number of tokens; given: {k}.")
    order = teacher_log_probs.detach().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : max(k, 0)], True)


@full_precision
def topkld_rows(
    student_logits: Tensor, teacher_logits: Tensor, k: int, top: Direction = "reverse", plain: bool = False
) -> Tensor:
    """D of each position, (..., V) and (..., V) -> (...,); 0 for equal distributions, and with `plain` unset never
    below.

    Args:
        teacher_logits: a constant; log-probabilities serve as well.
        k: how many of the teacher's largest are the top part; see `top_mask`.
        top: the direction of the KL on that part; the rest has the other.
        plain: without the terms that make each summand at least 0.

    Raises:
        UserError: k that is no whole number, or another word for `top`.
    """
    if top not in get_args(Direction):
        raise unknown("direction of topkld", top, get_args(Direction))
    log_q, log_p = log_softmax(student_logits), log_softmax(teacher_logits.detach())
    reversed_part = top_mask(teacher_logits, k)
    if top == "forward":
        reversed_part = ~reversed_part
    gap = (log_q - log_p).masked_fill((log_q == -math.inf) & (log_p == -math.inf), 0.0)
    terms = torch.where(reversed_part, weighed(log_q, gap), weighed(log_p, -gap))
    if not plain:
        more = log_q.exp() - log_p.exp()
        terms = terms + torch.where(reversed_part, -more, more)
    return terms.sum(-1)


class TopKLD(Objective):
    """TopKLD of tokens.

    Args:
        k: the teacher's most probable tokens that are the top part; default: by `share`.
        share: of the vocabulary, rounded to a number of tokens.
        top: the direction on the top part.
        plain: without the terms that make each summand at least 0.
        temperature: of both distributions.
    """

    name = "topkld"
    needs = frozenset({"student.logits", "teacher.logits"})
    positions = True

    def __init__(
        self,
        k: int | None = None,
        share: float = 0.22,
        top: Direction = "reverse",
        plain: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        checks.options("topkld", positive={"temperature": temperature})
        if not 0 <= share <= 1:
            raise UserError(f"topkld: share is of the vocabulary, from 0 to 1; given: {share}.")
        if top not in get_args(Direction):
            raise unknown("direction of topkld", top, get_args(Direction))
        self.k, self.share, self.top, self.plain, self.temperature = k, share, top, plain, temperature

    def size(self, classes: int) -> int:
        """K of a vocabulary."""
        return round(self.share * classes) if self.k is None else self.k

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits, targets = student.require("logits"), teacher.log_probs(self.temperature).detach()
        check_vocabulary("topkld", logits.shape[-1], targets.shape[-1])
        checks.same_classes("topkld", logits, targets)
        logits = logits if self.temperature == 1 else logits.float() / self.temperature
        mask = counted(batch, logits.shape[:-1])
        rows = topkld_rows(logits, targets, self.size(logits.shape[-1]), self.top, self.plain)
        return {"loss": counted_mean(rows, mask, step_count(batch, rows, mask, share=self.training))}
