"""How hard each training sample is, small for easy: EL2N (Paul et al., arXiv 2107.07075), AUM (Pleiss et al., arXiv
2001.10528), forgetting events (Toneva et al., arXiv 1812.05159), all from short trainings on the whole training split.

AUM and forgetting look at every sample at the end of every epoch, in evaluation mode; the papers look at the batches as
they are trained on.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec, Model, ModelSpec, Spec, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Context
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import collect_logits
from stillhouse.functional.precision import full_precision
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.runs.run import Run

Score = Literal["el2n", "aum", "forgetting"]
SETTLED = 1e-3


class ScorerSpec(Spec):
    """The networks whose short training scores the training samples."""

    network: Model | None = Field(None, description="Default: the one of the recipe.")
    networks: int = Field(1, ge=1, description="Scores are averaged over them; 1 to 10.")
    score: Score = Field(
        "el2n",
        description="el2n: the error at the end; aum: the margin over all epochs; forgetting: how often what was "
        "right went wrong.",
    )
    train: TrainSpec = Field(
        default_factory=TrainSpec,
        description="Short, on the whole training split; published networks are scored at 10 to 20 epochs.",
    )


# ---- the scores ------------------------------------------------------------------------------------------------------


@full_precision
def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) |softmax(z_i) - onehot(y_i)|_2 of logits (N, C) or of several networks (R, N, C), whose scores are averaged:
    0 where a network is sure and right, sqrt(2) where it is sure and wrong.

    Raises:
        UserError: labels of another shape than (N,).
    """
    z = logits if logits.ndim == 3 else logits[None]
    if z.ndim != 3 or labels.shape != z.shape[1:2]:
        raise UserError(
            f"el2n compares logits (N, C) or (R, N, C) with labels (N,); given: {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    target = F.one_hot(labels.long(), z.shape[-1]).to(z)
    return (z.softmax(-1) - target).square().sum(-1).sqrt().mean(0)


@full_precision
def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) z_y - max_{c != y} z_c of logits (N, C): above 0 where the label has the largest logit."""
    own = logits.gather(-1, labels[:, None]).squeeze(-1)
    return own - logits.scatter(-1, labels[:, None], -torch.inf).amax(-1)


def aum(history: Tensor) -> Tensor:
    """(N,) minus the area under the margin: the mean of margins (E, N) over epochs, with its sign turned, so that small
    is easy."""
    return -history.mean(0)


def forgetting(history: Tensor) -> Tensor:
    """(N,) of margins (E, N): in how many epochs a sample that had been right went wrong; E for one that never was
    right."""
    right = history > 0
    lost = (right[:-1] & ~right[1:]).sum(0)
    return torch.where(right.any(0), lost, len(history)).to(history)


# ---- the trainings ---------------------------------------------------------------------------------------------------


class MarginRecorder(CrossEntropy):
    """Cross-entropy that records the margins of all training samples at the end of each epoch but the last.

    Args:
        epochs: of the training.
        samples: of the training split.
    """

    name = "watched"

    def __init__(self, epochs: int, samples: int) -> None:
        super().__init__()
        self.history: Tensor
        self.register_buffer("history", torch.zeros(epochs, samples))

    def begin_epoch(self, ctx: Context) -> None:
        if ctx.progress.epoch:
            found = [
                (batch["index"], margins(signals.logits, batch["label"]))
                for batch, signals in ctx.sweep("train", "student")
                if signals.logits is not None
            ]
            at, values = (torch.cat(parts) for parts in zip(*found))
            self.history[ctx.progress.epoch - 1, at.to(self.history.device)] = values.to(self.history)


def scores(run: Run, data: DataSpec, network: ModelSpec, scorer: ScorerSpec) -> Tensor:
    """Scores (N,) of a training split, on the host, small is easy: the mean over networks whose seeds are 0, 1, …

    Runs of all seeds share them.

    Args:
        network: scores where `scorer.network` names none.
    """
    spec = scorer.network or network
    found = []
    for number in range(scorer.networks):
        seen = _trained(run, data, spec, scorer, number)
        found.append(
            seen["el2n"]
            if scorer.score == "el2n"
            else {"aum": aum, "forgetting": forgetting}[scorer.score](seen["history"])
        )
    mean = torch.stack(found).mean(0)
    if scorer.score == "el2n" and float((mean < SETTLED).double().mean()) > 0.5:
        warnings.warn(
            "pca: most scores are 0, so that they hardly rank the samples; score the samples earlier (fewer "
            "scorer.train.epochs).",
            stacklevel=2,
        )
    return mean


def _trained(run: Run, data: DataSpec, spec: ModelSpec, scorer: ScorerSpec, number: int) -> dict[str, Tensor]:
    """`el2n` (N,) at the end of a training and, where it is needed, `history`, the margins (E, N): a stage."""
    watches, train = scorer.score != "el2n", scorer.train

    def make() -> dict[str, Tensor]:
        outer, run.seed = run.seed, number
        try:
            model, sweep = run.model(spec, data, role="scorer"), run.loader(data, "train")
            count = len(sweep.dataset)
            objective = MarginRecorder(train.epochs, count) if watches else CrossEntropy()
            module = Distillation(model, None, [objective], seed=number)
            run.fit(
                f"scorer.{number}",
                module,
                run.loader(data, "train", train.batch_size, train=True),
                train,
                splits={"train": sweep},
            )
            module.close()
            logits, labels = collect_logits(model.to(run.device), sweep, run.device)
        finally:
            run.seed = outer
        out = {"el2n": el2n(logits, labels)}
        if isinstance(objective, MarginRecorder):
            objective.history[-1] = margins(logits, labels).to(objective.history)
            out["history"] = objective.history.cpu()
        return out

    uses: dict[str, Any] = {
        "model": spec.model_dump(mode="json"),
        "data": run.data(data).fingerprint,
        "watches": watches,
        "seed": number,
    }
    uses["train"] = train.model_dump(mode="json", exclude={"log_every", "checkpoint_seconds", "trackers", "compile"})
    uses["augment"] = data.model_dump(mode="json", include={"augment", "mixup", "cutmix", "image_size"})
    return run.stage(f"scorer.{number}", make, uses)
