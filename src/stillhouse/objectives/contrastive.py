"""Contrastive: an image is nearest to its own text, and a text to its own image, among all of the batch.

provides: contrastive
paper: Learning Transferable Visual Models From Natural Language Supervision
venue: ICML 2021
arxiv: 2103.00020
task: image and text
family: supervision
use when: images have captions; it is the plain training of networks that embed both
needs: images with texts

The loss is the mean of two cross-entropies, over the rows and over the columns of the scaled cosines. Samples of one
`label` describe each other, as captions written from class names do: each of them is an equally right answer, so that
no sample is pushed from its own class. With `loss: sigmoid` every pair is judged by itself, as SigLIP does (Zhai et
al., ICCV 2023, arXiv 2303.15343); that needs a network with a bias, and starts from a scale of 10 and a bias of -10.
Over many processes the batch is that of all of them, with gradient. The scale of the cosines is learned, and is put
back to at most 100 after each step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, label: Tensor | None = None) -> Tensor:
    """Mean over both directions of the cross-entropy of scaled cosines with the right answers.

    Args:
        image, text: unit embeddings (B, D); row i of both belong together.
        scale: what cosines are multiplied by, ().
        label: (B,) samples of equal labels are right for each other; default: each for itself alone.
    """
    logits = scale * image @ text.T
    if label is None:
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    right = (label[:, None] == label[None, :]).to(logits.dtype)
    target = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@full_precision
def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, label: Tensor | None = None) -> Tensor:
    """SigLIP's loss: of every pair the logistic loss of whether it belongs together, summed over a row, mean over rows.

    Args:
        image, text, scale, label: see `contrastive_loss`.
        bias: what is added to scaled cosines, ().
    """
    logits = scale * image @ text.T + bias
    own = torch.arange(len(logits), device=logits.device) if label is None else label
    sign = 2.0 * (own[:, None] == own[None, :]).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum(1).mean()


class Contrastive(Objective):
    """The contrastive loss of a batch of images with their texts.

    Args:
        loss: softmax, as CLIP; sigmoid, as SigLIP.
        by_label: whether samples of one label are right for each other.
    """

    name = "contrastive"
    needs = frozenset({"student.part:image", "student.part:text", "label"})

    def __init__(self, loss: Literal["softmax", "sigmoid"] = "softmax", by_label: bool = True) -> None:
        super().__init__()
        self.loss, self.by_label = loss, by_label

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        image, text = gather(student.require("part:image")), gather(student.require("part:text"))
        if image.shape != text.shape:
            raise UserError(
                f"contrastive: a batch needs one text an image, but has {len(image)} images and {len(text)} texts."
            )
        label = gather(batch["label"]) if self.by_label else None
        scale = student.require("part:scale")
        if self.loss == "softmax":
            return {"loss": contrastive_loss(image, text, scale, label)}
        if "bias" not in student.parts:
            raise UserError(
                "contrastive: the sigmoid loss needs a network with a logit_bias, such as hf:config:siglip."
            )
        return {"loss": sigmoid_loss(image, text, scale, student.parts["bias"], label)}
