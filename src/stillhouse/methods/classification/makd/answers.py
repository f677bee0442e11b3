"""Sources of MaKD's answers: the classes for which each question is a yes, with noise or as a model's training data; or
a model on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.catalog import load_file
from stillhouse.config.specs import Data, Model, Spec, TrainSpec
from stillhouse.errors import UserError, unknown

ClassAnswers = dict[str, list[str | int]]
"""Question -> names of the classes for which the answer is yes."""

_GIVEN = (
    "Question -> names of the classes for which the answer is yes; here, in a JSON file, or given by "
    "file:PATH.py:FUNCTION."
)


def read_class_answers(given: ClassAnswers | str) -> ClassAnswers:
    """The mapping itself, or that of a JSON file, or what `file:PATH.py:FUNCTION` gives."""
    if not isinstance(given, str):
        return given
    if given.startswith("file:"):
        module, name = load_file(given)
        make = getattr(module, name or "answers", None)
        if not callable(make):
            raise UserError(f"aspects: '{given}' names no function.")
        read = make()
    else:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"aspects: there is no file of class answers '{given}'.")
        read = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(read, dict) or not all(isinstance(v, list) for v in read.values()):
        raise UserError(f"aspects: '{given}' must give a mapping of questions to lists of class names.")
    return read


def class_matrix(answers: ClassAnswers, questions: Sequence[str], classes: Sequence[str]) -> Tensor:
    """1 where a class is a yes, else 0: (C, Q). Raises `UserError` for a class that is none, with the nearest."""
    table = torch.zeros(len(classes), len(questions))
    for j, question in enumerate(questions):
        for name in map(str, answers[question]):
            if name not in classes:
                raise unknown(f"class (under aspects, '{question}')", name, classes)
            table[classes.index(name), j] = 1.0
    return table


class NoisyAnswers(Spec):
    """Class answers as they are, with noise of each image's own."""

    answers: ClassAnswers | str = Field(description=_GIVEN)
    flip: float = Field(0.1, ge=0, lt=1, description="Share of answers turned round, drawn by image and question.")
    confidence: float = Field(0.95, gt=0.5, le=1, description="P(yes) of a yes; a no is 1 - confidence.")


class TrainedAnnotator(Spec):
    """A small image-and-text model that learns to answer from class answers, in place of a large multimodal one."""

    answers: ClassAnswers | str = Field(description=_GIVEN)
    network: Model = Field(description="Its image encoder.")
    dim: int = Field(64, ge=1, description="Width that images and questions are compared in.")
    data: Data | None = Field(None, description="What it is trained on; default: the recipe's data.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    seed: int = Field(0, description="Its own, so that all seeds of a bench share one.")


class VisionLanguage(Spec):
    """A vision-language model of transformers, in a folder on disk."""

    path: str = Field(description="Folder of model and processor.")
    prompt: str = Field(
        "<image>\n{question}", description="Where the processor has no chat template: the text around a question."
    )
    yes_word: str = Field("Yes", description="The answer that counts as yes; one token.")
    no_word: str = Field("No", description="The answer that counts as no; one token.")
    batch_size: int = Field(8, ge=1, description="Questions in one batch.")
