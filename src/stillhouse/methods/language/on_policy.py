"""On-policy distillation: the student writes, and the teacher gives the probability of each token of it.

paper: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes
venue: ICLR 2024
arxiv: 2306.13649
task: causal and encoder-decoder language models
family: on-policy
use when: what the student writes by itself drifts from the texts it was trained on
needs: text data, a teacher of the same tokenizer, a divergence of tokens (gkd)

A step trains on the student's own continuations of a batch's prompts with probability `lmbda`, else on the batch's
completions (Algorithm 1 of the paper); no gradient flows through the writing. The divergence is the recipe's objective:
`gkd` with its beta is the paper's. A text without prompts is continued from its first `generation.prompt` tokens. The
paper starts from a student fine-tuned on the task: give it as `student.checkpoint`, or set `warm_epochs`, of which
every batch is the data's. The paper's mixture with reinforcement learning is not here.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Context
from stillhouse.distillation.teachers import StoredTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.methods.distillation import Config as GeneralConfig
from stillhouse.methods.distillation import GeneralDistillation
from stillhouse.models.writing import Generation, TextWriter
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.tasks.tokens import Tokens


class Config(GeneralConfig):
    lmbda: float = Field(0.5, ge=0, le=1, description="Share of the steps that train on the student's own writing.")
    warm_epochs: int = Field(0, ge=0, description="Epochs before the student writes.")
    generation: Generation = Field(default_factory=Generation, description="How the student writes.")


class OnPolicyDistillation(Distillation):
    """A distillation whose batches are, with probability `lmbda`, rewritten by the student before the step.

    Args:
        writer: continues prompts.
        lmbda: the probability; drawn from torch's default generator, which the loop seeds by step.
        warm_epochs: epochs before which nothing is rewritten.
        The rest is `Distillation`'s.

    Raises:
        UserError: an objective that would take the student's writing for the truth, or a teacher that cannot read it.
    """

    def __init__(self, *args: Any, writer: TextWriter, lmbda: float = 0.5, warm_epochs: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.writer, self.lmbda, self.warm_epochs = writer, lmbda, warm_epochs
        stored = [name for name, teacher in self.teachers.items() if isinstance(teacher, StoredTeacher)]
        if lmbda and stored:
            raise UserError(
                f"on_policy: the teacher '{stored[0]}' is read from a store, which knows nothing of what the student "
                "writes; give a live teacher."
            )
        for entry in self.entries:
            if (
                lmbda
                and "label" in entry.objective.needs
                and not any(n.startswith("teacher.") for n in entry.objective.needs)
            ):
                raise UserError(
                    f"on_policy: '{entry.label}' would teach the student its own writing as the truth; leave it out, "
                    "or set lmbda: 0 (train on the data alone)."
                )

    def before_step(self, batch: Batch, ctx: Context) -> None:
        """Rewrites the batch in place, or leaves it.

        Among accumulated batches, a rewritten one weighs by itself: the others' tokens are not written yet.
        """
        if ctx.progress.epoch >= self.warm_epochs and torch.rand(()).item() < self.lmbda:
            batch.update(self.writer.rewritten(self.student, batch))
            batch.pop("token_count", None)
        super().before_step(batch, ctx)


class OnPolicy(GeneralDistillation[Config]):
    def module(self, config: Config, run: Run, student: Any, teachers: dict[str, Any]) -> Distillation:
        task: Tokens = run.data(config.data, Tokens).task
        return OnPolicyDistillation(
            student,
            teachers,
            [objective_from_spec(o) for o in config.objectives],
            seed=run.seed,
            embedding=config.student.embedding,
            task=task,
            chunked=config.chunked,
            writer=TextWriter(task.tokenizer, task.kind, task.context, config.generation, task.num_classes),
            lmbda=config.lmbda,
            warm_epochs=config.warm_epochs,
        )
