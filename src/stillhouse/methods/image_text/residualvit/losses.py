"""What a partly read frame learns: to be to the captions of a batch as the whole frame is."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision

Directions = Literal["v", "both"]


@full_precision
def caption_loss(student: Tensor, teacher: Tensor, text: Tensor, scale: Tensor, directions: Directions = "v") -> Tensor:
    """Cross-entropy of the softmax over captions with that of the whole frame, mean over images; with `both`, averaged
    with that over images, mean over captions; frame by frame, then the mean over frames.

    Args:
        student: embeddings of partly read frames (B, F, D), of any length.
        teacher: unit embeddings of the whole frames (B, F, D).
        text: unit embeddings of the captions (B, D), one a clip.
        scale: what cosines are multiplied by, ().
        directions: v: images over captions; both: captions over images too.

    Raises:
        UserError: a batch of one clip, whose loss is 0 whatever the network is.
    """
    if len(text) < 2:
        raise UserError("residualvit: a batch needs two clips at least, as frames are compared by its captions.")
    ours = scale * torch.einsum("bfd,cd->fbc", F.normalize(student, dim=-1), text)
    theirs = (scale * torch.einsum("bfd,cd->fbc", teacher, text)).detach()
    loss = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1).mean()
    if directions == "v":
        return loss
    return (loss - (theirs.softmax(1) * ours.log_softmax(1)).sum(1).mean()) / 2


@full_precision
def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """100 * the squared distance of unit embeddings (…, D) over the root of D, mean over frames."""
    gap = (F.normalize(student, dim=-1) - teacher.detach()).square().sum(-1)
    distance: Tensor = 100 * (gap / teacher.shape[-1] ** 0.5).mean()
    return distance
