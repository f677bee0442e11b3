"""Detection: boxes with a class and a score, and where the data has them, masks of the objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.detection import GROUPS, MASKS, DetectionMeter
from stillhouse.evaluation.judge import Meter
from stillhouse.functional.boxes import best_detections, centred, cornered, pairwise_iou
from stillhouse.functional.pictures import normalise, palette, resized, unnormalise, with_channels
from stillhouse.models import build
from stillhouse.models.grid_detector import GridDetector
from stillhouse.signals import Batch, Signals, own_precision
from stillhouse.tasks.base import Task

SHOWN_SCORE = 0.3  # boxes with less are not drawn
PICTURE_HEIGHT = 288  # of a report's pictures, so that names can be read
TARGET = "target"


@dataclass(frozen=True)
class Detection(Task):
    """Images (B, 3, H, W) of one size, and under `target` a mapping for each: `boxes` (n, 4) corners x1, y1, x2, y2 in
    pixels of the input, `labels` (n,) class ids from 0, with masks also `masks` (n, H, W) bool, and for judging
    `crowd` (n,) and `size` (2,), the height and width of the image as it was.

    A network gives its own losses in training (`Signals.losses`), and the parts below in evaluation. It is one of
    torchvision's detectors, of transformers' (the DETR family), of ours, or any module that is called as those of ours
    are: `model(images, targets)` returns its losses by name, and in evaluation `model(images)` a mapping with `boxes`
    (B, N, 4), `scores` (B, N) and `labels` (B, N), or a list of such mappings, one an image. Masks that it gives as
    well, (N, 1, H, W) in [0, 1] for an image, are read where the task has masks.

    Attributes:
        classes: names, in label order.
        size: (H, W) of a network's input.
        mean, std: the normalisation per channel.
        masks: whether objects have masks (instance segmentation).
        new: ids of classes whose boxes training does not see.
    """

    name: ClassVar[str] = "detection"
    parts: ClassVar[Mapping[str, str]] = {
        "boxes": "(B, N, 4) corners x1, y1, x2, y2 in pixels of the input, in evaluation",
        "scores": "(B, N) in [0, 1], best first; 0 where there is no box",
        "labels": "(B, N) class ids",
        "masks": "(B, N, H, W) bool, the pixels of each object, where the network and the task have masks",
    }
    supervised: ClassVar[tuple[str, ...]] = ("own",)
    reads: ClassVar[str] = "images"
    classes: tuple[str, ...]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    masks: bool = False
    new: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        return (*GROUPS, MASKS) if self.masks else GROUPS

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    # ---- a network ---------------------------------------------------------------------------------------------------

    def build(self, spec: ModelSpec) -> nn.Module:
        """A detector for these classes; or, of timm or torchvision's classifiers, a network as it was published, which
        can teach by its features. Raises `UserError` for one whose queries are more than the places of its maps."""
        options, number = dict(spec.options), len(self.classes)
        if spec.model.startswith("hf:"):
            options.setdefault("task", "detection")
            if spec.model.startswith("hf:config:"):
                options.setdefault("use_pretrained_backbone", False)
        if spec.model.startswith("torchvision:"):
            number += _first_label(spec.model)
        spec = _without_unknown_default(spec.model_copy(update={"options": options}))
        sized = (len(self.mean), *self.size)
        model = build(spec, number, sized) if _detects(spec.model) else build(spec, None, sized)
        if _of_torchvision(model):
            _fit_transform(model, self.size, spec.options)
        elif _of_transformers(model):
            _check_queries(model, self.size, spec.model)
        return model

    def reads_as(self, model: nn.Module) -> Task:
        return Task() if _library(model) is Features else self

    def load_module(self, spec: ModelSpec, folder: Any) -> nn.Module:
        options = {k: v for k, v in spec.options.items() if k != "backbone_weights"}  # the product has its own
        return super().load_module(spec.model_copy(update={"options": options}), folder)

    def call(self, model: nn.Module, batch: Batch, *, losses: bool = False) -> Any:
        targets = _trained_on(batch) if losses else None
        with own_precision(model):
            return _library(model).call(model, batch["input"], targets, self)

    def run_inside(self, model: nn.Module, batch: Batch) -> bool:
        if not isinstance(model, GridDetector) or model.training:
            return False
        model(batch["input"].to(_dtype(model)), search=False)  # boxes are as much work as a small backbone
        return True

    def read(self, output: Any, batch: Batch) -> Signals:
        """Losses, or boxes, scores and labels. Raises `UserError` for the output of another kind of network."""
        if not isinstance(output, Found):
            raise UserError("Detection reads what `Detection.call` returns.")
        parts = dict(output.parts()) if not output.losses else {}
        if not self.masks:
            parts.pop("masks", None)
        elif parts and "masks" not in parts:
            raise UserError(
                "The data's objects have masks, but the network gives none; take one that does, such as "
                "stillhouse:mask_rcnn or torchvision:maskrcnn_resnet50_fpn."
            )
        return Signals(parts=parts, losses=output.losses)

    # ---- figures -----------------------------------------------------------------------------------------------------

    def meter(self, groups: Sequence[str]) -> Meter:
        return DetectionMeter(self.classes, groups, self.size, self.new)

    def example(self) -> Batch:
        return {"input": torch.zeros(1, len(self.mean), *self.size)}

    def for_export(self, module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return _Boxes(module, self), ("boxes", "scores", "labels")

    # ---- for people --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each uint8 image (C, H, W): `counts` by class, `objects` (label, score, box in the image's pixels), and
        `picture`, the image with its boxes. Boxes with a score below 0.3 are left out."""
        found, device = [], next(module.parameters()).device
        for image in inputs:
            plain = with_channels(image, len(self.mean))
            x = normalise(resized(plain, self.size)[None], self.mean, self.std).to(device)
            outputs = self.read(self.call(module, {"input": x}), {"input": x})
            boxes, scores, labels = self._shown(outputs)[0]
            masks = self._shown_masks(outputs)[0]
            height, width = plain.shape[-2:]
            boxes = boxes * torch.tensor([width / self.size[1], height / self.size[0]] * 2)
            names = [self.classes[i] for i in labels.tolist()]
            objects = [
                {"label": name, "score": round(score, 4), "box": [round(v, 1) for v in box]}
                for name, score, box in zip(names, scores.tolist(), boxes.tolist())
            ]
            picture = _drawn(with_channels(plain, 3), boxes, labels, scores, self.classes, masks)
            found.append({"counts": _counts(names) or {"nothing": 0}, "objects": objects, "picture": picture})
        return found

    def _shown(self, outputs: Signals) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each image, the boxes (n, 4) that are shown, their scores (n,) and labels (n,)."""
        parts = [outputs.require(f"part:{name}").cpu() for name in ("boxes", "scores", "labels")]
        return [(b[s >= SHOWN_SCORE], s[s >= SHOWN_SCORE], y[s >= SHOWN_SCORE]) for b, s, y in zip(*parts)]

    def _shown_masks(self, outputs: Signals) -> list[Tensor | None]:
        """Of each image, the masks (n, H, W) of the boxes that are shown, or None."""
        scores = outputs.require("part:scores").cpu()
        if "masks" not in outputs.parts:
            return [None] * len(scores)
        return [m[s >= SHOWN_SCORE] for m, s in zip(outputs.require("part:masks").cpu(), scores)]

    def _pictures(
        self,
        batch: Batch,
        boxes: Sequence[tuple[Tensor, Tensor | None, Tensor]],
        masks: Sequence[Tensor | None],
    ) -> list[Tensor]:
        images = unnormalise(batch["input"].cpu(), self.mean, self.std)
        larger = max(PICTURE_HEIGHT / self.size[0], 1)
        size = (round(self.size[0] * larger), round(self.size[1] * larger))
        return [
            _drawn(resized(with_channels(image, 3), size), b * larger, y, s, self.classes, m)
            for image, (b, s, y), m in zip(images, boxes, masks)
        ]

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        return self._pictures(batch, self._shown(outputs), self._shown_masks(outputs))

    def truth(self, batch: Batch) -> list[Tensor]:
        targets = batch[TARGET]
        masks = [t["masks"].cpu() if "masks" in t else None for t in targets]
        return self._pictures(batch, [(t["boxes"].cpu(), None, t["labels"].cpu()) for t in targets], masks)

    def captions(self, batch: Batch, outputs: Signals | None) -> list[str]:
        labels = [t["labels"] for t in batch[TARGET]] if outputs is None else [y for _, _, y in self._shown(outputs)]
        counts = [_counts([self.classes[i] for i in y.tolist()]) for y in labels]
        return [", ".join(f"{n} {name}" for name, n in c.items()) or "nothing" for c in counts]

    def disagreement(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """(B,) the share of the boxes of both that the other does not have (of the class, with an IoU of a half)."""
        out = []
        for (mine, _, mine_y), (theirs, _, theirs_y) in zip(self._shown(student), self._shown(teacher)):
            alike = (pairwise_iou(mine, theirs) >= 0.5) & (mine_y[:, None] == theirs_y)
            both = len(mine) + len(theirs)
            out.append(1 - (alike.any(0).sum() + alike.any(1).sum()) / max(both, 1) if both else torch.tensor(0.0))
        return torch.stack([torch.as_tensor(x) for x in out])


class _Boxes(nn.Module):
    """A detector that gives boxes, scores and labels, whatever its library returns."""

    def __init__(self, network: nn.Module, task: Detection) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.task.call(self.network, {"input": x}).parts()
        return parts["boxes"], parts["scores"], parts["labels"]


def _trained_on(batch: Batch) -> list[dict[str, Tensor]]:
    """Boxes and labels that are learned: not those of crowds. Raises `UserError` for a batch without targets."""
    if TARGET not in batch:
        raise UserError(
            f"A detector's own losses need boxes under `{TARGET}` in every batch, but the data gives only: "
            f"{', '.join(batch)}."
        )
    return [{k: t[k] for k in ("boxes", "labels", "masks") if k in t} for t in batch[TARGET]]


def _counts(names: Sequence[str]) -> dict[str, int]:
    """How often each name occurs, the most frequent first."""
    counts = {name: names.count(name) for name in names}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _drawn(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    classes: Sequence[str],
    masks: Tensor | None = None,
) -> Tensor:
    """A uint8 image (3, H, W) with boxes, names and scores, and the masks (n, h, w) of the boxes where given."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    low, high = boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2])
    colours = [tuple(c) for c in palette(len(classes))[labels].tolist()]
    names = [classes[i] if scores is None else f"{classes[i]} {scores[n]:.0%}" for n, i in enumerate(labels.tolist())]
    if not len(boxes):
        return image
    if masks is not None:
        size = (image.shape[-2], image.shape[-1])
        enlarged = nn.functional.interpolate(masks[:, None].float(), size, mode="nearest")[:, 0].bool()
        image = draw_segmentation_masks(image, enlarged, alpha=0.5, colors=colours)
    return draw_bounding_boxes(image, torch.cat([low, high], 1), labels=names, colors=colours, width=2)


# ---- the libraries ---------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a network returned: its losses, or what its boxes are made of."""

    losses: dict[str, Tensor]
    boxes: Any = None

    def parts(self) -> dict[str, Tensor]:
        """`boxes`, `scores` and `labels`, padded."""
        return self.boxes() if callable(self.boxes) else {}


class Library(Protocol):
    """How the detectors of one library are called."""

    @staticmethod
    def call(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]] | None, task: Detection) -> Found: ...


def _library(model: nn.Module) -> type[Library]:
    if _of_torchvision(model):
        return Torchvision
    if type(model).__module__.startswith(("timm.", "torchvision.")):
        return Features
    return Transformers if _of_transformers(model) else Plain


def _detects(name: str) -> bool:
    """Whether a network of this name may be a detector."""
    kind, _, name = name.partition(":")
    if kind != "torchvision":
        return kind != "timm"
    from torchvision import models

    return name not in models.list_models() or name in models.list_models(module=models.detection)


def _of_torchvision(model: nn.Module) -> bool:
    return any(c.__module__.startswith("torchvision.models.detection") for c in type(model).__mro__)


def _of_transformers(model: nn.Module) -> bool:
    return any(c.__module__.startswith("transformers.") for c in type(model).__mro__)


class Plain:
    """Our detectors, and those of a user's file: losses with targets, boxes without."""

    @staticmethod
    def call(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]] | None, task: Detection) -> Found:
        images = images.to(_dtype(model))
        if targets is not None:
            return Found(_named_losses(model(images, targets), model))
        output = model(images)
        return Found({}, lambda: _padded(output, 0))


class Features:
    """Networks that find no boxes: they teach by what is tapped."""

    @staticmethod
    def call(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]] | None, task: Detection) -> Found:
        if targets is not None:
            raise UserError(
                f"A {type(model).__name__} is no detector. Take one of torchvision (fcos_resnet50_fpn), of "
                "transformers (hf:config:rt_detr), stillhouse:one_stage, or stillhouse:pyramid_detector on a backbone "
                "of timm."
            )
        model(images.to(_dtype(model)))
        return Found({})


class Torchvision:
    """torchvision's detectors: lists of images in [0, 1], which they normalise themselves; the background is class 0 of
    those with regions or default boxes."""

    @staticmethod
    def call(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]] | None, task: Detection) -> Found:
        listed = torchvision_images(images.to(_dtype(model)), task)
        if targets is not None:
            return Found(_named_losses(model(listed, torchvision_targets(model, targets)), model))
        output = model(listed)
        if not isinstance(output, list):  # in training mode, without targets
            return Found({})
        return Found({}, lambda: _padded(output, _first_label(type(model).__name__)))


def torchvision_images(images: Tensor, task: Detection) -> list[Tensor]:
    """Normalised images (B, C, H, W) as torchvision's detectors take them: each (C, H, W) in [0, 1]."""
    mean, std = (
        torch.tensor(v, dtype=images.dtype, device=images.device)[:, None, None] for v in (task.mean, task.std)
    )
    return list((images * std + mean).clamp(0, 1))


def torchvision_targets(model: nn.Module, targets: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Targets whose labels leave room for the background, where the detector has one.

    Raises:
        UserError: boxes without masks for a detector that learns masks.
    """
    heads: Any = getattr(model, "roi_heads", None)
    if heads is not None and heads.has_mask() and not all("masks" in t for t in targets):
        raise UserError(
            f"A {type(model).__name__} learns masks, but the data gives only boxes; take a detector without masks, "
            "such as stillhouse:faster_rcnn, or data with masks, such as instances:PATH."
        )
    first = _first_label(type(model).__name__)
    return [{**t, "boxes": t["boxes"].reshape(-1, 4), "labels": t["labels"] + first} for t in targets]


class Transformers:
    """transformers' detectors: boxes as centre and size in shares of the image; one more class, the last, for nothing
    where scores are a softmax."""

    @staticmethod
    def call(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]] | None, task: Detection) -> Found:
        height, width = images.shape[-2:]
        edge = torch.tensor([width, height] * 2, dtype=torch.float32).to(images.device)
        labels = None
        if targets is not None:
            labels = [
                {"class_labels": t["labels"], "boxes": centred(t["boxes"].reshape(-1, 4) / edge)} for t in targets
            ]
        output = model(pixel_values=images.to(_dtype(model)), **({} if labels is None else {"labels": labels}))
        if labels is not None:
            shown = {k: v for k, v in (output.loss_dict or {}).items() if not any(c.isdigit() for c in k)}
            return Found({"loss": output.loss, **{f"log:{k.removeprefix('loss_')}": v for k, v in shown.items()}})
        return Found({}, lambda: _of_queries(output, edge, len(task.classes)))


def _of_queries(output: Any, edge: Tensor, classes: int) -> dict[str, Tensor]:
    """The best pairs of query and class."""
    logits, boxes = output.logits.float(), cornered(output.pred_boxes.float()) * edge
    scores = logits.softmax(-1)[..., :-1] if logits.shape[-1] == classes + 1 else logits.sigmoid()
    if scores.shape[-1] != classes:
        raise UserError(
            f"The detector has scores of {scores.shape[-1]} classes, but the data has {classes}; build it for these "
            "classes (num_labels)."
        )
    boxes = torch.minimum(boxes.clamp_min(0), edge)
    found, best, labels = best_detections(boxes, scores, None)
    return {"boxes": found, "scores": best, "labels": labels}


def _named_losses(output: Any, model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(output, Mapping) or not output or not all(isinstance(v, Tensor) for v in output.values()):
        raise UserError(
            f"In training, a detector returns its losses by name, but {type(model).__name__} returned a "
            f"{type(output).__name__}; a detector of your own is called as model(images, targets)."
        )
    return {k.removeprefix("loss_"): v for k, v in output.items()}


def _padded(output: Any, first: int) -> dict[str, Tensor]:
    """Boxes, scores and labels, as many for each image, from a mapping of these or a list of mappings."""
    wanted = ("boxes", "scores", "labels")
    if isinstance(output, Mapping) and all(k in output for k in wanted):
        return {k: output[k] - first if k == "labels" else output[k] for k in wanted}
    if not isinstance(output, list | tuple) or not all(isinstance(o, Mapping) and {*wanted} <= {*o} for o in output):
        raise UserError(
            "In evaluation, a detector returns a mapping with boxes (B, N, 4), scores (B, N) and labels (B, N), or a "
            f"list of such mappings, one an image; this network returned a {type(output).__name__}: it may be one of "
            "another task."
        )
    pad = nn.utils.rnn.pad_sequence
    joined = {k: pad([o[k] for o in output], batch_first=True) for k in wanted}
    if all("masks" in o for o in output):
        joined["masks"] = pad([(o["masks"] >= 0.5).flatten(0, -3) for o in output], batch_first=True)
    joined["labels"] = (joined["labels"] - first).clamp_min(0)
    return joined


def _first_label(name: str) -> int:
    """1 where torchvision's detector of this name has the background as class 0."""
    return 0 if any(kind in name.lower() for kind in ("retinanet", "fcos")) else 1


def _fit_transform(model: nn.Module, size: tuple[int, int], options: Mapping[str, Any]) -> None:
    """Let torchvision's own resizing leave images as they are, where the recipe gives no sizes."""
    transform: Any = model.transform
    if "min_size" not in options and getattr(transform, "fixed_size", None) is None:
        transform.min_size = (min(size),)
    if "max_size" not in options:
        transform.max_size = max(size)


def _check_queries(model: nn.Module, size: tuple[int, int], name: str) -> None:
    config: Any = model.config
    strides, queries = getattr(config, "feat_strides", None), getattr(config, "num_queries", 0)
    if not strides or not hasattr(config, "encoder_in_channels"):
        return
    places = sum(-(-size[0] // s) * -(-size[1] // s) for s in strides)
    if queries > places:
        raise UserError(
            f"'{name}' chooses {queries} queries among {places} places of images of {size[0]} x {size[1]}; set "
            f"options.num_queries to at most {places}, or a larger data.image_size."
        )


def _without_unknown_default(spec: ModelSpec) -> ModelSpec:
    """Leave out `use_pretrained_backbone` where the config of transformers has no such key."""
    if not spec.model.startswith("hf:config:") or "use_pretrained_backbone" not in spec.options:
        return spec
    try:
        import transformers
    except ImportError:
        return spec  # building says what is missing
    kind = spec.model.removeprefix("hf:config:")
    if kind in transformers.CONFIG_MAPPING and hasattr(
        transformers.AutoConfig.for_model(kind), "use_pretrained_backbone"
    ):
        return spec
    options = {k: v for k, v in spec.options.items() if k != "use_pretrained_backbone"}
    return spec.model_copy(update={"options": options})


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
