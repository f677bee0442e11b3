"""The labels of stored regions: compressed and restored (FKD, `generate_soft_label.py` and `utils_FKD.py` of the
released code), adapted by the teacher's confidence (FerKD), and mixed with their images (CutMix as the released code
draws its box; SelfMix is CutMix between regions of one image).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown
from stillhouse.functional.precision import full_precision

LabelType = Literal["ori", "hard", "smoothing", "marginal_smoothing", "marginal_renorm"]
DISCARDED, HARDENED, KEPT, TOO_EASY = 0, 1, 2, 3


def kept_values(label_type: LabelType, top: int, classes: int) -> int:
    """How many probabilities a label keeps.

    Raises:
        UserError: an unknown type, or as many kept classes as there are, so that the others would share nothing.
    """
    widths = {"ori": classes, "hard": 1, "smoothing": 1, "marginal_smoothing": top, "marginal_renorm": top}
    if label_type not in widths:
        raise unknown("type of stored label", label_type, widths)
    if label_type != "ori" and not 1 <= widths[label_type] < classes:
        raise UserError(
            f"ferkd: regions.top keeps {top} of {classes} classes; keep fewer than there are, or choose "
            "regions.label_type=ori."
        )
    return widths[label_type]


def compress(probs: Tensor, label_type: LabelType, top: int = 5) -> tuple[Tensor, Tensor]:
    """The largest probabilities and their classes, falling: (..., C) -> (..., k) and (..., k); for `ori` all, in class
    order. The kept values are raw: what is done with the rest is `restore`'s business, and the largest stays known for
    every type.
    """
    classes = probs.shape[-1]
    k = kept_values(label_type, top, classes)
    if label_type == "ori":
        return probs, torch.arange(classes, device=probs.device).expand(probs.shape)
    values, indices = probs.topk(k, dim=-1)
    return values, indices


@full_precision
def restore(values: Tensor, indices: Tensor, label_type: LabelType, classes: int) -> Tensor:
    """(..., k) and (..., k) -> probabilities (..., C), float32, whose rows sum to one.

    `hard`: one-hot. `smoothing`, `marginal_smoothing`: the kept values, and what is left to one shared evenly by the
    other classes (never below 0, as half-precision values may exceed one by rounding). `marginal_renorm`: the kept
    values over their sum, 0 elsewhere.
    """
    if label_type == "ori":
        return values
    if label_type == "hard":
        return F.one_hot(indices[..., 0], classes).to(values.dtype)
    total = values.sum(-1, keepdim=True)
    if label_type == "marginal_renorm":
        return (
            torch.zeros(*values.shape[:-1], classes, dtype=values.dtype)
            .to(values.device)
            .scatter(-1, indices, values / total)
        )
    rest = ((1 - total) / (classes - values.shape[-1])).clamp_min(0)
    return rest.expand(*values.shape[:-1], classes).scatter(-1, indices, values / total.clamp_min(1))


def bands(confidence: Tensor, low: float, middle: float, high: float) -> Tensor:
    """What becomes of each region by the teacher's largest probability c, int8: `DISCARDED` (c < low), `HARDENED`
    (low <= c < middle), `KEPT` (middle <= c <= high), `TOO_EASY` (c > high). Shape as `confidence`.
    """
    band = torch.full_like(confidence, KEPT, dtype=torch.int8)
    band[confidence > high] = TOO_EASY
    band[confidence < middle] = HARDENED
    band[confidence < low] = DISCARDED
    return band


def adapt(soft: Tensor, labels: Tensor, band: Tensor, smoothing: float) -> Tensor:
    """The teacher's label where the band is `KEPT`, elsewhere the smoothed label of the image: 1 - eps + eps/C on its
    class, eps/C on others.

    Args:
        soft: (..., C).
        labels: (...) class ids.
        band: (...).
        smoothing: eps.
    """
    classes = soft.shape[-1]
    hard = F.one_hot(labels, classes).to(soft.dtype) * (1 - smoothing) + smoothing / classes
    return torch.where((band == KEPT)[..., None], soft, hard)


def cutmix(
    images: Tensor, labels: Tensor, share: float, centre: tuple[int, int], partner: Tensor
) -> tuple[Tensor, Tensor]:
    """Paste a box of each one's partner; labels mix by the pasted area.

    Args:
        images: (B, C, H, W).
        labels: (B, K) probabilities.
        share: what of an image should stay its own; the box has sqrt(1 - share) of each side, clipped at the edges.
        centre: (row, column) of the box.
        partner: (B,) positions in the batch.
    """
    height, width = images.shape[-2:]
    side = (1.0 - share) ** 0.5
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    rows = slice(max(centre[0] - half_h, 0), min(centre[0] + half_h, height))
    columns = slice(max(centre[1] - half_w, 0), min(centre[1] + half_w, width))
    mixed = images.clone()
    mixed[..., rows, columns] = images[partner][..., rows, columns]
    own = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return mixed, own * labels + (1 - own) * labels[partner]


def within_images(crops: int, images: int, order: Tensor) -> Tensor:
    """(images * crops,) partners: one permutation `order` (crops,) of the regions, applied inside every image of a
    batch sorted by image."""
    return (torch.arange(images)[:, None] * crops + order).flatten()
