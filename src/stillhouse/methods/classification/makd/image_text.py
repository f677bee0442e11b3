"""A small image-and-text model that answers questions about images, in place of a large multimodal one; trained on
class answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec
from stillhouse.distillation.objective import Progress
from stillhouse.methods.classification.makd.answers import TrainedAnnotator, class_matrix, read_class_answers
from stillhouse.models import build
from stillhouse.randomness import key, keyed
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.training.module import TrainingModule


class ImageText(nn.Module):
    """Answers questions about images: the image's vector is compared with two vectors of the question, one for yes and
    one for no.

    Args:
        image: a network that gives `dim` numbers.
        dim: width of the comparison.
        buckets: words are distinguished by their hash modulo this.
    """

    def __init__(self, image: nn.Module, dim: int, buckets: int = 4096) -> None:
        super().__init__()
        self.image, self.dim, self.buckets = image, dim, buckets
        self.words = nn.EmbeddingBag(buckets, dim, mode="mean")
        self.text = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 2 * (dim + 1)))

    def forward(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """(B, ...) images and Q questions to (B, Q, 2) logits of yes and no."""
        hashed = [[key(word) % self.buckets for word in re.findall(r"\w+", q.lower())] for q in questions]
        offsets = torch.tensor([0, *(len(h) for h in hashed[:-1])]).cumsum(0)
        ids = torch.tensor([i for h in hashed for i in h])
        device = self.words.weight.device
        text = self.text(self.words(ids.to(device), offsets.to(device))).view(len(questions), 2, self.dim + 1)
        return torch.einsum("bd,qkd->bqk", F.normalize(self.image(images), dim=-1), text[..., 1:]) + text[..., 0]


class AnnotatorTraining(TrainingModule):
    """Trains an `ImageText` on class answers: cross-entropy over yes and no, mean over images and questions."""

    answers: Tensor

    def __init__(self, student: ImageText, questions: list[str], answers: Tensor) -> None:
        super().__init__()
        self.student, self.questions = student, questions
        self.register_buffer("answers", answers, persistent=False)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits, yes = self.student(batch["input"], self.questions).float(), self.answers[batch["label"]]
        accuracy = ((logits.detach()[..., 0] > logits.detach()[..., 1]) == (yes > 0.5)).float().mean()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), 1 - yes.flatten().long()), "accuracy": accuracy}


def trained_annotator(spec: TrainedAnnotator, questions: list[str], run: Run, data: DataSpec) -> ImageText:
    """The small image-and-text model, trained once and stored; its share of right answers on test images is recorded
    with the run."""
    from stillhouse.runs.products import state_on_cpu

    source = spec.data or data
    bundle = run.data(source)
    with keyed("model", "annotator", spec.seed):
        model = ImageText(build(spec.network, spec.dim, bundle.input_shape), spec.dim)
    answers = class_matrix(read_class_answers(spec.answers), questions, bundle.classes)

    def make() -> dict[str, Any]:
        with run.seeded(spec.seed):
            run.fit(
                "annotator",
                AnnotatorTraining(model, questions, answers),
                run.loader(source, "train", spec.train.batch_size, train=True),
                spec.train,
            )
        return {
            "weights": state_on_cpu(model),
            "figures": {"answers_right": _share_right(model, questions, answers, source, run)},
        }

    uses = {
        **spec.model_dump(mode="json"),
        "train": spec.train.identity(),
        "questions": questions,
        "answers": answers.tolist(),
    }
    stored = run.stage("annotator", make, {**uses, "data": bundle.fingerprint})
    model.load_state_dict(stored["weights"])
    run.record["annotator"] = stored["figures"]
    return model


@torch.no_grad()
def _share_right(model: ImageText, questions: list[str], answers: Tensor, data: DataSpec, run: Run) -> float:
    model.eval()
    device, right, seen = next(model.parameters()).device, 0.0, 0
    for batch in run.loader(data, "test"):
        logits = model(batch["input"].to(device), questions).cpu()
        right += float(((logits[..., 0] > logits[..., 1]) == (answers[batch["label"]] > 0.5)).float().mean(1).sum())
        seen += len(logits)
    return right / seen
