"""Training of the residual token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.gather import gather
from stillhouse.methods.image_text.residualvit.encoder import VideoEncoder
from stillhouse.methods.image_text.residualvit.losses import Directions, caption_loss, feature_distance
from stillhouse.methods.image_text.residualvit.reduction import kept_count, random_patches
from stillhouse.models.image_text import scale
from stillhouse.signals import Batch, Signals
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

Loss = Literal["ce", "mse"]


class ResidualTraining(TrainingModule):
    """Frames after the first of a clip are read in part and learn to be as they are whole, with a token of the first.

    Patches are drawn at random, whichever are read later; merging and smaller images train as they are used.

    Args:
        student: the encoder, of which the residual token alone learns.
        loss: ce: by the captions of the batch; mse: by the embeddings themselves.
        directions: see `caption_loss`.
    """

    student: VideoEncoder

    def __init__(self, student: VideoEncoder, loss: Loss = "ce", directions: Directions = "v") -> None:
        super().__init__()
        self.student, self._loss, self._directions = student, loss, directions

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        given, net = batch["input"], self.student
        frames = given["pixel_values"]
        clips, count = frames.shape[:2]
        with torch.no_grad():
            whole = F.normalize(net.get_image_features(frames.flatten(0, 1)).float(), dim=-1).view(clips, count, -1)
            text = net.get_text_features(given["input_ids"], given["attention_mask"])
            text = gather(F.normalize(text.float(), dim=-1))
        later = frames[:, 1:].flatten(0, 1)
        key = whole[:, 0].repeat_interleave(count - 1, 0)
        student = net.partial(later, key, self.drawn(later)).view(clips, count - 1, -1)
        cosine = F.cosine_similarity(student.detach().float(), whole[:, 1:], dim=-1).mean()
        student, teacher = gather(student), gather(whole[:, 1:].contiguous())
        if self._loss == "mse":
            return {"loss": feature_distance(student, teacher), "cosine": cosine}
        return {"loss": caption_loss(student, teacher, text, scale(net), self._directions), "cosine": cosine}

    def drawn(self, frames: Tensor) -> Tensor | None:
        """(B, K) random patches; None where none is dropped."""
        net = self.student
        if net.reduction.mode in ("merge", "resolution"):
            return None
        noise = torch.randn(len(frames), net.patches, device=frames.device)
        return random_patches(noise, kept_count(net.patches, net.reduction.drop, training=True))

    def read_student(self, batch: Batch) -> Signals:
        frames = batch["input"]["pixel_values"]
        image = F.normalize(self.student.get_image_features(frames), dim=-1)
        return Signals(embedding=image, parts={"image": image})
