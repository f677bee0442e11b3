"""Where MaKD's answers come from: a file, a vision-language model on disk, a small image-and-text model trained here,
or noisy class answers.

Each source gives P(yes) of every question for every training image, (N, Q); models answer by two logits, for "Yes" and
"No".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.methods.classification.makd.answers import (
    ClassAnswers,
    NoisyAnswers,
    TrainedAnnotator,
    VisionLanguage,
    class_matrix,
    read_class_answers,
)
from stillhouse.methods.classification.makd.image_text import trained_annotator
from stillhouse.methods.classification.makd.vision_language import ask
from stillhouse.randomness import generator
from stillhouse.runs.run import Run


class AspectsSpec(Spec):
    """Questions, and exactly one source of answers."""

    questions: str | list[str] | None = Field(
        None, description="A text file, one question a line, or the questions; default: those of `answers`."
    )
    file: str | None = Field(
        None,
        description="JSON {index in the training split: [Q numbers]}, or safetensors with `aspects` (N, Q) or "
        "`yes_no` (N, Q, 2).",
    )
    vision_language: VisionLanguage | None = None
    trained: TrainedAnnotator | None = None
    annotated: NoisyAnswers | None = None
    drop_below: float = Field(
        0.0,
        ge=0,
        description="Drop questions whose answers vary less than this (variance over the images); they carry no "
        "information.",
    )
    permute: bool = Field(False, description="Give each image another's answers (ablation).")

    @model_validator(mode="after")
    def _one_source(self) -> AspectsSpec:
        given = [k for k in ("file", "vision_language", "trained", "annotated") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of file, vision_language, trained, annotated (given: {', '.join(given) or 'none'})"
            )
        if self.questions is None and self.trained is None and self.annotated is None:
            raise ValueError("questions are needed with file and vision_language")
        return self

    @property
    def class_answers(self) -> ClassAnswers | None:
        source = self.trained or self.annotated
        return None if source is None else read_class_answers(source.answers)

    def questions_asked(self) -> list[str]:
        """The questions in order.

        Raises `UserError` for none, for one asked twice, or for one without class answers where those are the source.
        """
        known = self.class_answers
        asked = list(known or {}) if self.questions is None else read_questions(self.questions)
        if not asked:
            raise UserError("aspects.questions: there are no questions.")
        twice = next((q for q in asked if asked.count(q) > 1), None)
        if twice is not None:
            raise UserError(f"aspects.questions: '{twice}' is asked twice.")
        unanswered = next((q for q in asked if known is not None and q not in known), None)
        if unanswered is not None:
            raise UserError(f"aspects: the question '{unanswered}' has no class answers under `answers`.")
        return asked


def read_questions(given: str | Sequence[str]) -> list[str]:
    """Questions of a list, or of a text file with one a line; blanks around them and empty lines go."""
    if isinstance(given, str):
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"aspects.questions: there is no file '{given}'.")
        given = path.read_text(encoding="utf-8").splitlines()
    return [q.strip() for q in given if q.strip()]


def question_prompt(classes: Sequence[str], count: int = 100) -> str:
    """A request to a language model for candidate questions about these classes."""
    return (
        f"Here are the classes of an image data set: {', '.join(classes)}. Write {count} yes-or-no questions about "
        "visible features (shape, colour, texture, "
        "parts, context, behaviour) that tell these classes apart. Each question must be clear, about one feature, "
        "and "
        "different from the others. "
        "Give one question a line and nothing else."
    )


def selection_prompt(questions: Sequence[str], classes: Sequence[str], count: int = 50) -> str:
    """A request to a language model to keep the most relevant and most distinct questions."""
    listed = "\n".join(questions)
    return (
        f"Of the questions below, choose the {count} that are most relevant for telling apart {', '.join(classes)} "
        "and "
        "most distinct from each other. "
        f"Give one question a line, unchanged, and nothing else.\n{listed}"
    )


@full_precision
def aspect_probs(yes_no: Tensor) -> Tensor:
    """P(yes) = exp(l_yes) / (exp(l_yes) + exp(l_no)), in float32; (..., 2) -> (...)."""
    return yes_no.softmax(-1)[..., 0]


def aspect_table(spec: AspectsSpec, data: DataSpec, run: Run) -> tuple[list[str], Tensor]:
    """The questions that are kept and their answers for every training image, in index order: P(yes), (N, Q).

    Raises:
        UserError: answers that are missing, not Q, or not in [0, 1] (the image is named); no question left.
    """
    questions, count = spec.questions_asked(), len(run.data(data).dataset("train", train=False))
    if spec.file is not None:
        answers = read_answers(spec.file, count, len(questions))
    else:
        uses = {
            "aspects": spec.model_dump(mode="json", exclude={"drop_below", "permute"}),
            "questions": questions,
            "data": run.data(data).fingerprint,
        }
        answers = run.stage("aspects", lambda: _answer(spec, questions, data, run), uses)["answers"]["aspects"]
    varying = (answers.var(0, correction=0) >= spec.drop_below).tolist()
    if not any(varying):
        raise UserError(f"aspects.drop_below: no question's answers vary by {spec.drop_below} or more; lower it.")
    questions, answers = [q for q, v in zip(questions, varying) if v], answers[:, torch.tensor(varying)]
    return questions, answers[
        torch.randperm(count, generator=generator(run.seed, "permute aspects"))
    ] if spec.permute else answers


def _answer(spec: AspectsSpec, questions: list[str], data: DataSpec, run: Run) -> dict[str, dict[str, Tensor]]:
    if spec.annotated is not None:
        return {"answers": {"aspects": annotate(spec.annotated, questions, data, run)}}
    if spec.trained is not None:
        model = trained_annotator(spec.trained, questions, run, data).to(run.device).eval()
        with torch.no_grad():
            parts = [
                model(batch["input"].to(run.device), questions).float().cpu() for batch in run.loader(data, "train")
            ]
    else:
        assert spec.vision_language is not None
        parts = ask(spec.vision_language, questions, data, run)
    yes_no = torch.cat(parts)
    return {"answers": {"yes_no": yes_no, "aspects": aspect_probs(yes_no)}}


def read_answers(path: str, count: int, questions: int) -> Tensor:
    """The answers in a file, (count, questions), in index order.

    Raises `UserError` naming the first image whose answers are missing or wrong.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"aspects.file: there is no file '{path}'.")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(str(file))
        if not {"aspects", "yes_no"} & set(tensors):
            raise UserError(
                f"aspects.file: {path} must hold `aspects` (N, Q) or `yes_no` (N, Q, 2); it holds: "
                f"{', '.join(tensors) or 'nothing'}."
            )
        table = tensors["aspects"].float() if "aspects" in tensors else aspect_probs(tensors["yes_no"])
        if table.shape != (count, questions):
            raise UserError(
                f"aspects.file: {path} holds answers of shape {tuple(table.shape)}, but {count} images and "
                f"{questions} "
                f"questions need {(count, questions)}."
            )
    else:
        try:
            rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"aspects.file: {path} is neither safetensors nor JSON ({error}).") from None
        absent = next((i for i in range(count) if str(i) not in rows), None)
        if absent is not None or len(rows) != count:
            what = f"image '{absent}' has no answers" if absent is not None else f"it holds {len(rows)} images"
            raise UserError(
                f"aspects.file: {path}: {what}; the training split has {count} images, '0' to '{count - 1}'."
            )
        wrong = next((i for i in range(count) if len(rows[str(i)]) != questions), None)
        if wrong is not None:
            raise UserError(
                f"aspects.file: {path}: image '{wrong}' has {len(rows[str(wrong)])} answers to {questions} questions."
            )
        table = torch.tensor([rows[str(i)] for i in range(count)], dtype=torch.float32)
    bad = (~((table >= 0) & (table <= 1))).any(1).nonzero()
    if len(bad):
        raise UserError(f"aspects.file: {path}: an answer for image '{int(bad[0])}' is not a number from 0 to 1.")
    return table


def annotate(spec: NoisyAnswers, questions: list[str], data: DataSpec, run: Run) -> Tensor:
    """Class answers of every training image, some turned round, softened: (N, Q)."""
    answers = class_matrix(read_class_answers(spec.answers), questions, run.data(data).classes)[
        run.loader(data, "train").labels()
    ]
    turned = torch.rand(answers.shape, generator=generator(data.seed, "turn answers")) < spec.flip
    return 1 - spec.confidence + (2 * spec.confidence - 1) * torch.where(turned, 1 - answers, answers)
