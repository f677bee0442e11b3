"""Segmentation: one class a pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.judge import Meter
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.pictures import normalise, overlay, resized, unnormalise, with_channels
from stillhouse.models import build
from stillhouse.signals import Batch, Signals, read_logits
from stillhouse.tasks.base import Task

GROUPS = ("segmentation", "classes")


@dataclass(frozen=True)
class Segmentation(Task):
    """Logits (B, H, W, C), class axis last, and labels (B, H, W) class ids, where -100 counts for nothing.

    A network's maps (B, C, h, w) are resized to the label's grid; without labels, to the input's.

    Attributes:
        classes: names, in label order.
        size: (H, W) of a network's input.
        mean, std: the normalisation per channel.
    """

    name: ClassVar[str] = "segmentation"
    parts: ClassVar[Mapping[str, str]] = {"aux": "(B, H, W, C) logits of an auxiliary head, in training"}
    groups: ClassVar[tuple[str, ...]] = GROUPS
    reads: ClassVar[str] = "images"
    classes: tuple[str, ...]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def positions(self) -> bool:
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    def build(self, spec: ModelSpec) -> nn.Module:
        options = dict(spec.options)
        if spec.model.startswith("hf:"):
            options.setdefault("task", "segmentation")
        return build(spec.model_copy(update={"options": options}), len(self.classes), (len(self.mean), *self.size))

    def read(self, output: Any, batch: Batch) -> Signals:
        label = batch.get("label")
        grid = tuple(batch["input"].shape[-2:] if label is None else label.shape[-2:])
        aux = output.get("aux") if isinstance(output, Mapping) else None
        parts = {} if aux is None else {"aux": self._on_grid(aux, grid)}
        return Signals(logits=self._on_grid(read_logits(output), grid), parts=parts)

    def _on_grid(self, maps: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Maps (B, C, h, w) as (B, H, W, C): a view where the grid is the same."""
        if maps.ndim != 4 or maps.shape[1] != len(self.classes):
            raise UserError(
                f"Segmentation needs a network that gives maps (B, {len(self.classes)}, h, w), a class axis and two "
                "of space; "
                f"this one gives {tuple(maps.shape)}. Take one for segmentation, such as hf:config:segformer or "
                "torchvision:lraspp_mobilenet_v3_large."
            )
        if tuple(maps.shape[-2:]) != grid:
            maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
        return maps.movedim(1, -1)

    def meter(self, groups: Sequence[str]) -> Meter:
        return SegmentationMeter(self.classes, groups)

    def example(self) -> Batch:
        return {"input": torch.zeros(1, len(self.mean), *self.size)}

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each uint8 image (C, H, W): `shares` of the classes, `classes` (H, W) the map, `picture` the map drawn
        over the image.

        The map has the image's own size.
        """
        found, device = [], next(module.parameters()).device
        for image in inputs:
            plain = with_channels(image, len(self.mean))
            x = normalise(resized(plain, self.size)[None], self.mean, self.std).to(device)
            maps = self.read(self.call(module, {"input": x}), {"input": x}).require("logits")
            whole = F.interpolate(
                maps.movedim(-1, 1).float(), size=plain.shape[-2:], mode="bilinear", align_corners=False
            )
            ids = whole.argmax(1)[0].cpu()
            share = torch.bincount(ids.flatten(), minlength=len(self.classes)).double() / ids.numel()
            shares = {name: round(s, 4) for name, s in zip(self.classes, share.tolist()) if s > 0}
            picture = overlay(with_channels(plain, 3), ids, len(self.classes))
            found.append(
                {"shares": dict(sorted(shares.items(), key=lambda s: -s[1])), "classes": ids, "picture": picture}
            )
        return found

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        logits = outputs.require("logits")
        images = unnormalise(batch["input"].cpu(), self.mean, self.std)
        out = []
        for image, ids in zip(images, logits.argmax(-1).cpu()):
            out.append(overlay(resized(with_channels(image, 3), (ids.shape[0], ids.shape[1])), ids, len(self.classes)))
        return out

    def truth(self, batch: Batch) -> list[Tensor]:
        images = unnormalise(batch["input"].cpu(), self.mean, self.std)
        label = batch["label"].cpu()
        size = (label.shape[-2], label.shape[-1])
        return [overlay(resized(with_channels(x, 3), size), y, len(self.classes)) for x, y in zip(images, label)]

    def disagreement(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        mine, theirs = student.require("logits"), teacher.require("logits")
        counted = batch["label"] != IGNORED
        differ = (mine.argmax(-1) != theirs.argmax(-1)) & counted
        return differ.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)


class SegmentationMeter:
    """`miou` (mean over the classes that occur, of intersection over union) and `pixel_accuracy`; with `classes`,
    `iou_NAME` of each class.

    One (K, K) table of counts on the device, whatever the size of the test set.
    """

    def __init__(self, classes: Sequence[str], groups: Sequence[str]) -> None:
        for group in groups:
            if group not in GROUPS:
                raise unknown("evaluation group", group, GROUPS)
        self.classes, self.groups = classes, groups
        self._counts: Tensor | None = None

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the logits (B, H, W, K) of a batch and its `label` (B, H, W)."""
        label, logits, number = batch["label"], outputs.require("logits"), len(self.classes)
        if self._counts is None:
            self._counts = torch.zeros(number * number + 1, dtype=torch.int64, device=logits.device)
        where = torch.where(label == IGNORED, number * number, label * number + logits.argmax(-1)).flatten()
        self._counts.scatter_add_(0, where, torch.ones_like(where))

    def figures(self) -> dict[str, float]:
        if self._counts is None or not int(self._counts[:-1].sum()):
            raise UserError("There is no pixel to judge by: every label of this split is ignored, or it has no images.")
        table = self._counts[:-1].view(len(self.classes), len(self.classes)).double()
        right, union = table.diag(), table.sum(0) + table.sum(1) - table.diag()
        iou = torch.where(union > 0, right / union.clamp_min(1), torch.nan)
        out = (
            {"miou": float(iou.nanmean()), "pixel_accuracy": float(right.sum() / table.sum())}
            if "segmentation" in self.groups
            else {}
        )
        if "classes" in self.groups:
            out |= {f"iou_{name}": value for name, value in zip(self.classes, iou.tolist())}
        return out
