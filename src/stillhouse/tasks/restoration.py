"""Restoration: an image without its damage; of super-resolution, one that is larger than the input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.judge import Meter
from stillhouse.functional.images import PEAK, enlarged, luma, psnr, shaved, ssim, whole_levels
from stillhouse.functional.pictures import with_channels
from stillhouse.functional.tiling import four_crops, padded_to
from stillhouse.models import accepts, build
from stillhouse.signals import Batch, Signals
from stillhouse.tasks.base import Task

GROUPS = ("restoration", "protocols", "baseline")
SHOWN = 96  # pixels a side of the crops in a report
COSTED = 64  # pixels a side of the input by which cost is measured, at most
AT_ONCE = 1024 * 1024  # pixels of an input that goes through a network as a whole
SIDE = 48  # pixels a side of the input by which a network is exported


@dataclass(frozen=True)
class Restoration(Task):
    """Images (B, 3, H, W) in [0, 1], as the part `image`, for inputs (B, 3, h, w) in [0, 1]; the label is the true one.

    Attributes:
        scale: by how much the true image is larger than the damaged one, per side; 1 where only quality differs.
        enlarged: whether the network sees the damaged image enlarged (bicubic) to the true one's size; then any scale
            above 1 will do, `dataclasses.replace(task, scale=3.5)` for another.
    """

    name: ClassVar[str] = "restoration"
    parts: ClassVar[Mapping[str, str]] = {"image": "(B, 3, H, W) the restored images, in [0, 1], not clamped"}
    supervised: ClassVar[tuple[str | dict[str, Any], ...]] = ("l1",)
    groups: ClassVar[tuple[str, ...]] = GROUPS
    reads: ClassVar[str] = "images"
    scale: float
    enlarged: bool = False

    @property
    def factor(self) -> int:
        """By how much a network's output is larger than its input, per side."""
        return 1 if self.enlarged else int(self.scale)

    @property
    def border(self) -> int:
        """Pixels on each side that figures leave out, as is usual: as many as the scale; none at scale 1."""
        return math.ceil(self.scale) if self.scale > 1 else 0

    def build(self, spec: ModelSpec) -> nn.Module:
        options = dict(spec.options)
        if accepts(spec.model, "scale"):
            options.setdefault("scale", self.factor)
        if spec.model.startswith("hf:"):
            options.setdefault("task", "restoration")
        return build(spec.model_copy(update={"options": options}))

    def call(self, model: nn.Module, batch: Batch, *, losses: bool = False) -> Any:
        """The network's output; images go mirrored up to whole windows into a transformer that has windows."""
        window = getattr(getattr(model, "config", None), "window_size", 1)
        if all(side % window == 0 for side in batch["input"].shape[-2:]):
            return super().call(model, batch)

        def network(images: Tensor) -> Tensor:
            output = super(Restoration, self).call(model, {**batch, "input": images})
            image = _image(output)
            return output if image is None else image

        return padded_to(network, batch["input"], multiple=window, scale=self.factor)

    def read(self, output: Any, batch: Batch) -> Signals:
        image, given, label = _image(output), batch["input"], batch.get("label")
        size = tuple(side * self.factor for side in given.shape[-2:]) if label is None else tuple(label.shape[-2:])
        if image is None or image.ndim != 4 or tuple(image.shape[1:]) != (3, *size):
            found = type(output).__name__ if image is None else tuple(image.shape)
            wanted = f"(B, 3, {size[0]}, {size[1]})"
            other = " or, for inputs enlarged before, stillhouse:imdn_as" if self.enlarged else ""
            raise UserError(
                f"Restoration at scale {self.scale:g} needs a network that gives images {wanted} for inputs "
                f"{tuple(given.shape)}; this one gives {found}. Take one of that scale, such as stillhouse:imdn{other}."
            )
        return Signals(parts={"image": image})

    def meter(self, groups: Sequence[str]) -> Meter:
        return RestorationMeter(self, groups)

    def one(self, batch: Batch) -> Batch:
        """A corner of the first image of at most 64 pixels a side."""
        return {"input": batch["input"][:1, :, :COSTED, :COSTED]}

    def example(self) -> Batch:
        return {"input": torch.zeros(1, 3, SIDE, SIDE)}

    def levels(self, signals: Signals) -> Tensor:
        """(B, 3, H, W) whole grey levels of the restored images."""
        return whole_levels(signals.require("part:image"))

    def baselines(self, batch: Batch) -> dict[str, Signals]:
        size = _size(batch["label"])
        return {"bicubic" if self.scale > 1 else "input": Signals(parts={"image": enlarged(batch["input"], size)})}

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each uint8 image (C, H, W): its new `size`, and `picture`, the restored image (3, H', W').

        Large images go through the network in overlapping crops.
        """
        device = next(module.parameters()).device
        found = []
        for image in inputs:
            x = with_channels(image, 3)[None].to(device).float() / PEAK
            if self.enlarged:
                x = enlarged(x, (round(x.shape[-2] * self.scale), round(x.shape[-1] * self.scale)))
            picture = whole_levels(self._in_parts(module, x))[0].to(torch.uint8).cpu()
            found.append({"size": f"{picture.shape[-1]} x {picture.shape[-2]}", "picture": picture})
        return found

    def _in_parts(self, module: nn.Module, x: Tensor) -> Tensor:
        if x.shape[-2] * x.shape[-1] > AT_ONCE:
            return four_crops(lambda crops: self._in_parts(module, crops), x, scale=self.factor, chunk=1)
        return self.read(self.call(module, {"input": x}), {"input": x}).require("part:image")

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        return self._crops(batch, self.levels(outputs))

    def truth(self, batch: Batch) -> list[Tensor]:
        return self._crops(batch, whole_levels(batch["label"]))

    def captions(self, batch: Batch, outputs: Signals | None) -> list[str]:
        if outputs is None:
            return []
        mine, true = (shaved(luma(levels), self.border) for levels in _both(self, batch, outputs))
        return [f"{value:.2f} dB" for value in psnr(mine, true).tolist()]

    def disagreement(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        return (self.levels(student) - self.levels(teacher)).abs().flatten(1).mean(1)

    def _crops(self, batch: Batch, levels: Tensor) -> list[Tensor]:
        """Of each image the square on which the truth is farthest from the baseline, where there is most to restore."""
        baseline = next(iter(self.baselines(batch).values())).require("part:image")
        far = (batch["label"] - baseline).abs().mean(1, keepdim=True)
        height, width = far.shape[-2:]
        side = (min(SHOWN, height), min(SHOWN, width))
        windows = F.avg_pool2d(far, side, stride=8)
        places = windows.flatten(1).argmax(1).tolist()
        out = []
        for image, place in zip(levels.to(torch.uint8).cpu(), places):
            top, left = 8 * (place // windows.shape[-1]), 8 * (place % windows.shape[-1])
            out.append(image[:, top : top + side[0], left : left + side[1]])
        return out


def _image(output: Any) -> Tensor | None:
    """The image in whatever a network returns: a tensor, or an object or mapping with `image` or `reconstruction`."""
    if isinstance(output, Tensor):
        return output
    for name in ("image", "reconstruction"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return None


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _both(task: Restoration, batch: Batch, outputs: Signals) -> tuple[Tensor, Tensor]:
    """Whole levels (B, 3, H, W) of the outputs and of the truth."""
    return task.levels(outputs), whole_levels(batch["label"])


class RestorationMeter:
    """Means over images, in dB and as shares, with as many pixels left out at each side as the scale.

    `restoration`: `psnr` and `ssim` of luma that is not rounded, which is how published figures are computed.
    `protocols`: `psnr_uint8`, `ssim_uint8` of luma rounded to whole levels, and `psnr_rgb`. `baseline`:
    `psnr_baseline`, `ssim_baseline` of the input enlarged by bicubic interpolation, and `psnr_gain` over it.
    """

    def __init__(self, task: Restoration, groups: Sequence[str]) -> None:
        for group in groups:
            if group not in GROUPS:
                raise unknown("evaluation group", group, GROUPS)
        self.task, self.groups = task, groups
        self._values: dict[str, list[Tensor]] = {}

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the images (B, 3, H, W) of a batch and its `label` (B, 3, H, W)."""
        task = self.task
        mine, true = (shaved(levels, task.border) for levels in _both(task, batch, outputs))
        y, true_y = luma(mine), luma(true)
        found: dict[str, Tensor] = {}
        if "restoration" in self.groups:
            found |= {"psnr": psnr(y, true_y), "ssim": ssim(y, true_y)}
        if "protocols" in self.groups:
            rounded = y.round(), true_y.round()
            found |= {"psnr_uint8": psnr(*rounded), "ssim_uint8": ssim(*rounded), "psnr_rgb": psnr(mine, true)}
        if "baseline" in self.groups:
            plain = next(iter(task.baselines(batch).values()))
            baseline = luma(shaved(task.levels(plain), task.border))
            found |= {"psnr_baseline": psnr(baseline, true_y), "ssim_baseline": ssim(baseline, true_y)}
            found |= {"psnr_gain": psnr(y, true_y) - found["psnr_baseline"]}
        for name, value in found.items():
            self._values.setdefault(name, []).append(value)

    def figures(self) -> dict[str, float]:
        if not self._values:
            raise UserError("There is no image to judge by: this split has none.")
        figures = {name: float(torch.cat(values).mean()) for name, values in self._values.items()}
        broken = [name for name, value in figures.items() if math.isnan(value)]
        if broken:
            raise UserError(
                f"The network's images hold NaN, so '{broken[0]}' cannot be computed; did training diverge?"
            )
        return figures
