"""Sequence-level distillation: the teacher writes the completions once, and the student learns them like any text.

paper: Sequence-Level Knowledge Distillation
venue: EMNLP 2016
arxiv: 1606.07947
task: causal and encoder-decoder language models
family: generated data
use when: teacher and student have different tokenizers, or the teacher is too expensive to run together with the
student
needs: text data, a teacher that writes

The teacher's writing is a stage of its own, stored as text and shared by every recipe with the same teacher, prompts
and `generation`. The paper writes by beam search of width 5 (`temperature: 0, beams: 5`); drawing at temperature 1 also
shows the student what else the teacher would say. `learn: both` keeps the data's own completions as well (the paper's
mixture), `learn: originals` is the baseline that learns those alone. A text without prompts is continued from its first
`generation.prompt` tokens. The objectives are the recipe's: `seq_kd` is the paper's; a teacher's tokens can be added
where both have one tokenizer. The paper's interpolation, which picks the beam nearest to the reference, is not here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from stillhouse.config.specs import TeacherSpec
from stillhouse.data import Loader
from stillhouse.data.text import TextBundle
from stillhouse.data.token_dataset import Rows, TokenDataset
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.ragged import RaggedArray
from stillhouse.methods.distillation import Config as GeneralConfig
from stillhouse.methods.distillation import GeneralDistillation, describe
from stillhouse.models.language import left_padded, own_tokenizer, prompt_rows
from stillhouse.models.tokenizer import encode, marks, size
from stillhouse.models.writing import Generation, TextWriter
from stillhouse.processes import share
from stillhouse.randomness import keyed
from stillhouse.runs.method import Stage
from stillhouse.runs.run import Run
from stillhouse.tasks.tokens import Tokens


class Config(GeneralConfig):
    generation: Generation = Field(
        default_factory=lambda: Generation(temperature=0.0), description="How the teacher writes."
    )
    learn: Literal["written", "both", "originals"] = Field(
        "written", description="The completions that the student learns: the teacher's, both, or the data's own."
    )
    writing_batch: int = Field(64, ge=1, description="Prompts that are continued at once.")


class SequenceKD(GeneralDistillation[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        stages = super().plan(config, run)
        if config.learn == "originals":
            return stages
        bundle, spec = run.data(config.data, Tokens), self._writer(config)
        if not isinstance(bundle, TextBundle):
            raise UserError(f"method sequence_kd needs text; data.name is '{config.data.name}'.")
        model = run.model(spec.network, spec.data or config.data, "teacher", spec.seed or 0)
        count = len(bundle.dataset("train"))
        does = (
            f"the teacher continues {count:,} prompts, by up to {config.generation.max_new_tokens} tokens each "
            "(stored, shared)"
        )
        return [*stages[:-1], Stage("writing", does, {"teacher": describe(spec.model or "", model)}), stages[-1]]

    @staticmethod
    def _writer(config: Config) -> TeacherSpec:
        spec = config.all_teachers.get("teacher")
        if spec is None or spec.model is None:
            raise UserError("method sequence_kd needs `teacher`, a live model that writes.")
        return spec

    def teachers(self, config: Config, run: Run) -> dict[str, Any]:
        """Only those that an objective reads: the writer's tokens need not be the student's."""
        objectives = [objective_from_spec(o).objective for o in config.objectives]
        read = {o.teacher for o in objectives if any(n.startswith("teacher.") for n in o.needs)}
        return {
            name: run.teacher(name, spec, config.data) for name, spec in config.all_teachers.items() if name in read
        }

    def loader(self, config: Config, run: Run) -> Any:
        """The student's training batches: what the teacher wrote."""
        if config.learn == "originals":
            return super().loader(config, run)
        bundle, spec = run.data(config.data, Tokens), self._writer(config)
        model = run.network("teacher", spec, config.data)
        theirs = run.data(spec.data) if spec.data is not None else bundle
        tokens = own_tokenizer(spec.model or "") or theirs.task.tokenizer
        uses = {
            "teacher": FrozenTeacher(model),
            "data": bundle,
            "generation": config.generation,
            "batch": config.writing_batch,
        }
        made = run.stage(
            "writing", lambda: written(model, tokens, bundle, config.generation, config.writing_batch, run.device), uses
        )
        run.record["written"] = {"samples": len(made), "ended": sum(ended for _, ended in made), "example": made[0][0]}
        rows = rewritten_rows(bundle, made, config.generation.prompt, originals=config.learn == "both")
        data = TokenDataset(rows, bundle.task.kind, bundle.task.tokenizer, bundle.task.decoder_start)
        return Loader(data, config.train.batch_size, seed=run.seed, shuffle=True, drop_last=True, **share())


def written(
    model: nn.Module, tokens: Any, bundle: TextBundle, how: Generation, batch_size: int, device: torch.device
) -> list[tuple[str, bool]]:
    """What a model writes for each training prompt, in index order, and whether it came to an end by itself. Drawn
    under keys of the batch's number.

    Args:
        model: a causal model or encoder-decoder.
        tokens: its tokenizer; prompts reach it as text.
        bundle: the student's data.
        batch_size: prompts at once.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or bundle.task.context + how.max_new_tokens
    writer = TextWriter(tokens, bundle.task.kind, limit, how, size(tokens))
    prompts = bundle.task.tokenizer.batch_decode(given(bundle, how.prompt), skip_special_tokens=True)
    model.to(device)
    out: list[tuple[str, bool]] = []
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        rows = prompt_rows(tokens, prompts[start : start + batch_size], bundle.task.kind, limit)
        inputs = left_padded(rows, tokens.pad_token_id, device)
        with keyed("writing", number):
            texts = writer.write(
                model, dict(inputs), limit - inputs["input_ids"].shape[1] if bundle.task.kind == "causal" else limit
            )
        ended = (
            (texts == tokens.eos_token_id).any(1).tolist() if tokens.eos_token_id is not None else [False] * len(texts)
        )
        out += zip(tokens.batch_decode(texts, skip_special_tokens=True), ended)
    return out


def given(bundle: TextBundle, prompt: int) -> list[list[int]]:
    """The prompt of each training sample, in the student's ids; of a text without one, its first tokens."""
    rows = bundle.splits["train"]
    if rows.positions is not None:
        raise UserError("Samples packed into rows have no prompts to write from; set data.options.pack: false.")
    starts, labels, special = rows.inputs.starts, rows.labels, len(marks(bundle.task.tokenizer)[0])
    assert labels is not None
    out = []
    for first, last in pairwise(starts):
        ids = rows.inputs.values[first:last]
        if bundle.task.kind == "causal":
            asked = int((labels.values[first:last] != IGNORED).argmax())
            ids = ids[: asked + 1 if asked >= max(special, 1) else prompt]
        out.append(ids.tolist())
    return out


def rewritten_rows(bundle: TextBundle, made: list[tuple[str, bool]], prompt: int, *, originals: bool = False) -> Rows:
    """The training rows with what was written in place of their completions; what does not fit into the context is cut,
    what is empty left out.

    Raises:
        UserError: nothing was written at all.
    """
    tokens, context, old = bundle.task.tokenizer, bundle.task.context, bundle.splits["train"]
    end = [] if tokens.eos_token_id is None else [tokens.eos_token_id]
    inputs: list[list[int]] = []
    labels: list[list[int]] = []
    for before, ids, (_, ended) in zip(given(bundle, prompt), encode(tokens, [text for text, _ in made]), made):
        answer = ids + (end if ended else [])
        if not answer:
            continue
        if bundle.task.kind == "seq2seq":
            inputs.append(before)
            labels.append(answer[:context])
            continue
        whole = (before + answer)[: context + 1]
        if len(whole) > len(before):
            inputs.append(whole[:-1])
            labels.append([IGNORED] * (len(before) - 1) + whole[len(before) :])
    if not inputs:
        raise UserError(
            "sequence_kd: the teacher wrote nothing that fits; raise data.options.context or generation.max_new_tokens."
        )
    if originals:
        assert old.labels is not None
        for ours, theirs in ((inputs, old.inputs), (labels, old.labels)):
            ours += [row.tolist() for row in np.split(theirs.values, theirs.starts[1:-1])]
    return Rows(RaggedArray.of(inputs), RaggedArray.of(labels))
