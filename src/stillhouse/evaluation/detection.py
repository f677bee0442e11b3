"""Average precision of detectors, by COCO's own evaluation (pycocotools) on what was found, in memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.signals import Batch, Signals

GROUPS = ("detection", "sizes", "classes")
MASKS = "masks"  # the group of figures of data whose objects have masks
SIZES = ("small", "medium", "large")  # below 32², to 96², and above, in pixels of the image's own size
MOST = 100  # boxes of an image that count


class DetectionMeter:
    """`ap` (mean over IoU 0.5 to 0.95 and over the classes that occur), `ap50`, `ap75`; with `sizes`, `ap_small`,
    `ap_medium` and `ap_large`; with `classes`, `ap_class_NAME`; with `masks`, `mask_ap`, `mask_ap50` and `mask_ap75` of
    the objects' masks. A size or class that does not occur has no figure. Where some
    classes are new, `ap_base`, `ap50_base`, `ap_new` and `ap50_new` are those of the others and of them.

    Of an image only its boxes stay in memory, on the device until `figures`. Boxes are measured in the image's own
    pixels, so that sizes mean what COCO means, whatever size the network sees. True boxes with `crowd` are found or
    not, and count for nothing. Masks are compared at the size of the network's input, and stay in memory as run
    lengths, on the host.
    """

    def __init__(
        self, classes: Sequence[str], groups: Sequence[str], size: tuple[int, int], new: Sequence[int] = ()
    ) -> None:
        for group in groups:
            if group not in (*GROUPS, MASKS):
                raise unknown("evaluation group", group, (*GROUPS, MASKS))
        self.classes, self.groups, self.size, self.new = classes, groups, size, tuple(new)
        self._found: list[Tensor] = []
        self._true: list[Tensor] = []
        self._masks: dict[str, list[Any]] = {"found": [], "true": []}
        self._images = 0

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the parts `boxes` (B, N, 4), `scores` (B, N) and `labels` (B, N) of a batch, and its `target`; with the
        group `masks` also the part `masks` (B, N, H, W) and the targets'."""
        boxes, scores, labels = (outputs.require(f"part:{name}") for name in ("boxes", "scores", "labels"))
        masks = outputs.require("part:masks") if MASKS in self.groups else None
        if scores.shape[1] > MOST:
            scores, best = scores.topk(MOST, dim=1)
            boxes, labels = boxes.gather(1, best[..., None].expand(-1, -1, 4)), labels.gather(1, best)
            masks = None if masks is None else masks[torch.arange(len(masks), device=masks.device)[:, None], best]
        if masks is not None:
            self._masks["found"] += [m for image in masks for m in run_lengths(image)]
            self._masks["true"] += [m for target in batch["target"] for m in run_lengths(target["masks"])]
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
        evaluated = self.evaluated()
        stats = evaluated.stats
        out = {"ap": stats[0], "ap50": stats[1], "ap75": stats[2]} if "detection" in self.groups else {}
        if self.new and "detection" in self.groups:
            out |= _by_novelty(class_precision(evaluated), self.new)
        if "sizes" in self.groups:
            out |= {f"ap_{name}": stats[3 + i] for i, name in enumerate(SIZES)}
        if "classes" in self.groups:
            means = class_precision(evaluated).mean(0)
            out |= {f"ap_class_{name}": v for name, v in zip(self.classes, np.nan_to_num(means, nan=-1.0))}
        if MASKS in self.groups:
            stats = self.evaluated(masks=True).stats
            out |= {"mask_ap": stats[0], "mask_ap50": stats[1], "mask_ap75": stats[2]}
        return {name: float(value) for name, value in out.items() if value >= 0}

    def evaluated(self, masks: bool = False) -> Any:
        """COCOeval of all boxes, or of all masks. Raises as `figures`."""
        true = torch.cat(self._true).double().cpu().numpy() if self._true else np.zeros((0, 7))
        if not (true[:, 2] == 0).any():
            raise UserError("There is no box to judge by: no image of this split has one, or there are no images.")
        found = torch.cat(self._found).double().cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError("The network gives boxes or scores that are not finite (NaN); did its training diverge?")
        counted = found[:, 2] > 0
        outlines = None
        if masks:
            chosen = [m for m, used in zip(self._masks["found"], counted) if used]
            outlines = Outlines(self._masks["true"], chosen, self.size)
        return coco_evaluation(true, found[counted], self._images, len(self.classes), outlines)


@dataclass
class Outlines:
    """Masks as run lengths of pycocotools, of true and found objects in the order of their rows; (H, W) of a mask."""

    true: list[Any]
    found: list[Any]
    size: tuple[int, int]


def run_lengths(masks: Tensor) -> list[Any]:
    """Masks (n, H, W) bool as run lengths. Raises `MissingExtra` without pycocotools."""
    try:
        from pycocotools import mask
    except ImportError:
        raise MissingExtra("Judging masks", "detection") from None
    if not len(masks):
        return []
    found: list[Any] = mask.encode(np.asfortranarray(masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0)))
    return found


def class_precision(evaluated: Any) -> np.ndarray:
    """(10, K) average precision at IoU 0.5 to 0.95 of each class, of all sizes; NaN for a class that does not occur."""
    values = evaluated.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class)
    return np.where((values > -1).all(1), values.mean(1), np.nan)


def _by_novelty(precision: np.ndarray, new: Sequence[int]) -> dict[str, float]:
    """AP and AP50 of the new classes and of the others, from precision (10, K) of classes; -1 where none occurs."""
    is_new = np.isin(np.arange(precision.shape[1]), list(new))
    out = {}
    for name, chosen in (("base", ~is_new), ("new", is_new)):
        for figure, rows in (("ap", precision[:, chosen]), ("ap50", precision[:1, chosen])):
            out[f"{figure}_{name}"] = float(np.nanmean(rows)) if not np.isnan(rows).all() else -1.0
    return out


def region_shares(is_new: Tensor, found: Tensor, named: Tensor) -> dict[str, float]:
    """`recall_base` and `accuracy_regions_base`: of true boxes of classes that are not new, the share that proposals
    find, and the share that a teacher names rightly; `…_new` of the others. All (n,) bool."""
    out = {}
    for name, chosen in (("base", ~is_new), ("new", is_new)):
        if chosen.any():
            out[f"recall_{name}"] = float(found[chosen].double().mean())
            out[f"accuracy_regions_{name}"] = float(named[chosen].double().mean())
    return out


def _scale(target: Any, size: tuple[int, int]) -> Tensor:
    """(4,) own pixels of an image in one of the network's input."""
    own = target.get("size")
    if own is None:
        return torch.ones(4)
    height, width = own.float().unbind()
    return torch.stack([width / size[1], height / size[0]] * 2)


def coco_evaluation(
    true: np.ndarray, found: np.ndarray, images: int, classes: int, outlines: Outlines | None = None
) -> Any:
    """COCOeval of boxes or masks in memory, evaluated and summed up, without a word on the console.

    Args:
        true: (T, 7) image, class, crowd, x1, y1, x2, y2.
        found: (F, 7) image, class, score, x1, y1, x2, y2.
        images, classes: how many there are.
        outlines: the objects' masks, which are judged in place of their boxes.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise MissingExtra("Judging detectors", "detection") from None

    def entries(rows: np.ndarray, third: str, masks: Sequence[Any] | None) -> list[dict[str, Any]]:
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
                **({} if masks is None else {"segmentation": masks[i]}),
            }
            for i, (row, (w, h)) in enumerate(zip(rows, sides))
        ]

    height, width = (0, 0) if outlines is None else outlines.size
    frames = [{"id": i, "height": height, "width": width} for i in range(images)]
    facts = {"images": frames, "categories": [{"id": i} for i in range(classes)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth, results = COCO(), COCO()
        masks = (None, None) if outlines is None else (outlines.true, outlines.found)
        truth.dataset = {**facts, "annotations": entries(true, "iscrowd", masks[0])}
        results.dataset = {**facts, "annotations": entries(found, "score", masks[1])}
        truth.createIndex()
        results.createIndex()
        evaluation = COCOeval(truth, results, "bbox" if outlines is None else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
