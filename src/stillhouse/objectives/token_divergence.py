"""Token divergences: the losses that papers on language models compare themselves with, by name.

paper: several, each named below
task: language
family: logits
use when: a baseline for `taid` or `gkd` is wanted
needs: teacher logits; labels or `mask` say which tokens count

`forward` and `reverse` KL, `js` (generalised Jensen-Shannon; Lin 1991, and arXiv 2306.13649), `total_variation` (arXiv
2307.15190), `skew_forward` and `skew_reverse` (DistiLLM, arXiv 2402.03898) and `adaptive` (AKL, arXiv 2404.02657), each
as the released code of TAID (arXiv 2501.16937) computes it: temperature 1, means over the tokens that count, and
cross-entropies in the place of the forward divergences (their gradient is equal). Of a teacher's top k, the k tokens
and all others as one are compared, but for `adaptive`, which needs all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError, unknown
from stillhouse.functional import checks, token_losses
from stillhouse.functional.counting import both, counted, counted_mean, step_count
from stillhouse.functional.token_losses import check_vocabulary, coarse
from stillhouse.signals import Batch, Signals

Divergence = Literal["forward", "reverse", "js", "total_variation", "skew_forward", "skew_reverse", "adaptive"]


def divergence_rows(
    student_logits: Tensor, teacher_log_probs: Tensor, divergence: Divergence = "forward", share: float | None = None
) -> Tensor:
    """A divergence by name, (..., V) and (..., V) -> (...,).

    Args:
        share: the teacher's share of the mixture (`js`, 0.1; `skew_forward`, 0.1), the student's (`skew_reverse`, 0.1),
            or the mass below the teacher's head (`adaptive`, 0.5).
    """
    if divergence in _SHARED:
        rows, default = _SHARED[divergence]
        return rows(student_logits, teacher_log_probs, default if share is None else share)
    return _PLAIN[divergence](student_logits, teacher_log_probs)


_PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": token_losses.cross_entropy_rows,
    "reverse": token_losses.reverse_kl_rows,
    "total_variation": token_losses.total_variation_rows,
}
_SHARED: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], float]] = {
    "js": (token_losses.jsd_rows, 0.1),
    "skew_forward": (token_losses.skew_forward_rows, 0.1),
    "skew_reverse": (token_losses.skew_reverse_rows, 0.1),
    "adaptive": (token_losses.adaptive_kl_rows, 0.5),
}


class TokenDivergence(Objective):
    """A divergence of tokens by name.

    Args:
        divergence: which.
        share: of the mixture, or of the head (see `divergence_rows`); default: TAID's.
    """

    name = "token_divergence"
    needs = frozenset({"student.logits", "teacher.logits"})
    positions = True

    def __init__(self, divergence: Divergence = "forward", share: float | None = None) -> None:
        super().__init__()
        if divergence not in get_args(Divergence):
            raise unknown("divergence", divergence, get_args(Divergence))
        if share is not None and (divergence not in _SHARED or not 0 < share < 1):
            raise UserError(
                f"token_divergence: share is between 0 and 1, of {', '.join(_SHARED)}; given: {share} with "
                f"{divergence}."
            )
        self.divergence, self.share = divergence, share
        self.reads_top = divergence != "adaptive"  # which depends on the order of the classes

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits, top = student.require("logits"), teacher.only_top
        mask = counted(batch, logits.shape[:-1])
        if top is not None:
            logits, targets, known = coarse(logits, top)
            mask = both(mask, known)
        else:
            targets = teacher.log_probs().detach()
            check_vocabulary("token_divergence", logits.shape[-1], targets.shape[-1])
            checks.same_classes("token_divergence", logits, targets)
        rows = divergence_rows(logits, targets, self.divergence, self.share)
        return {"loss": counted_mean(rows, mask, step_count(batch, rows, mask, share=self.training))}
