"""Average precision of detectors, by COCO's own evaluation (pycocotools) on what was found, in memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.signals import Batch, Signals

GROUPS = ("detection", "sizes", "classes")
SIZES = ("small", "medium", "large")  # below 32², to 96², and above, in pixels of the image's own size
MOST = 100  # boxes of an image that count


class DetectionMeter:
    """`ap` (mean over IoU 0.5 to 0.95 and over the classes that occur), `ap50`, `ap75`; with `sizes`, `ap_small`,
    `ap_medium` and `ap_large`; with `classes`, `ap_class_NAME`. A size or class that does not occur has no figure.

    Of an image only its boxes stay in memory, on the device until `figures`. Boxes are measured in the image's own
    pixels, so that sizes mean what COCO means, whatever size the network sees. True boxes with `crowd` are found or
    not, and count for nothing.
    """

    def __init__(self, classes: Sequence[str], groups: Sequence[str], size: tuple[int, int]) -> None:
        for group in groups:
            if group not in GROUPS:
                raise unknown("evaluation group", group, GROUPS)
        self.classes, self.groups, self.size = classes, groups, size
        self._found: list[Tensor] = []
        self._true: list[Tensor] = []
        self._images = 0

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the parts `boxes` (B, N, 4), `scores` (B, N) and `labels` (B, N) of a batch, and its `target`."""
        boxes, scores, labels = (outputs.require(f"part:{name}") for name in ("boxes", "scores", "labels"))
        if scores.shape[1] > MOST:
            scores, best = scores.topk(MOST, dim=1)
            boxes, labels = boxes.gather(1, best[..., None].expand(-1, -1, 4)), labels.gather(1, best)
        images = torch.arange(self._images, self._images + len(boxes), device=boxes.device)
        scale = torch.stack([_scale(t, self.size).to(boxes.device) for t in batch["target"]])
        rows = [images[:, None].expand_as(scores), labels, scores]
        self._found.append(
            torch.cat([torch.stack([r.float() for r in rows], -1), boxes.float() * scale[:, None]], -1).flatten(0, 1)
        )
        for image, one, target in zip(images, scale, batch["target"]):
            number = len(target["labels"])
            crowd = target.get("crowd", torch.zeros(number, dtype=torch.bool, device=boxes.device))
            facts = [image.expand(number), target["labels"], crowd]
            self._true.append(torch.cat([torch.stack([f.float() for f in facts], -1), target["boxes"] * one], -1))
        self._images += len(boxes)

    def figures(self) -> dict[str, float]:
        """All figures. Raises `UserError` without a true box; `MissingExtra` without pycocotools."""
        true = torch.cat(self._true).double().cpu().numpy() if self._true else np.zeros((0, 7))
        if not (true[:, 2] == 0).any():
            raise UserError("There is no box to judge by: no image of this split has one, or there are no images.")
        found = torch.cat(self._found).double().cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError("The network gives boxes or scores that are not finite (NaN); did its training diverge?")
        evaluated = coco_evaluation(true, found[found[:, 2] > 0], self._images, len(self.classes))
        stats = evaluated.stats
        out = {"ap": stats[0], "ap50": stats[1], "ap75": stats[2]} if "detection" in self.groups else {}
        if "sizes" in self.groups:
            out |= {f"ap_{name}": stats[3 + i] for i, name in enumerate(SIZES)}
        if "classes" in self.groups:
            precision = evaluated.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class), of all sizes
            for i, name in enumerate(self.classes):
                values = precision[:, :, i][precision[:, :, i] > -1]
                out[f"ap_class_{name}"] = float(values.mean()) if values.size else -1.0
        return {name: float(value) for name, value in out.items() if value >= 0}


def _scale(target: Any, size: tuple[int, int]) -> Tensor:
    """(4,) own pixels of an image in one of the network's input."""
    own = target.get("size")
    if own is None:
        return torch.ones(4)
    height, width = own.float().unbind()
    return torch.stack([width / size[1], height / size[0]] * 2)


def coco_evaluation(true: np.ndarray, found: np.ndarray, images: int, classes: int) -> Any:
    """COCOeval of boxes in memory, evaluated and summed up, without a word on the console.

    Args:
        true: (T, 7) image, class, crowd, x1, y1, x2, y2.
        found: (F, 7) image, class, score, x1, y1, x2, y2.
        images, classes: how many there are.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise MissingExtra("Judging detectors", "detection") from None

    def entries(rows: np.ndarray, third: str) -> list[dict[str, Any]]:
        sides = np.maximum(rows[:, 5:7] - rows[:, 3:5], 0)
        return [
            {
                "id": i + 1,
                "image_id": int(row[0]),
                "category_id": int(row[1]),
                third: int(row[2]) if third == "iscrowd" else float(row[2]),
                "bbox": [float(row[3]), float(row[4]), float(w), float(h)],
                "area": float(w * h),
                **({} if third == "iscrowd" else {"iscrowd": 0}),
            }
            for i, (row, (w, h)) in enumerate(zip(rows, sides))
        ]

    facts = {"images": [{"id": i} for i in range(images)], "categories": [{"id": i} for i in range(classes)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth, results = COCO(), COCO()
        truth.dataset = {**facts, "annotations": entries(true, "iscrowd")}
        results.dataset = {**facts, "annotations": entries(found, "score")}
        truth.createIndex()
        results.createIndex()
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
