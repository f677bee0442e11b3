"""`faster_rcnn` and `mask_rcnn`: two-stage detectors in the pieces of torchvision's, whose heads can be run by
themselves on any features; small by default, or a ResNet whose last stage looks at the regions (C4; Ren et al., arXiv
1506.01497, He et al., arXiv 1703.06870).

The functions below the network take any of torchvision's detectors that has regions. How many regions are left after
suppression is read by the host, in these as in torchvision's own.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.misc import FrozenBatchNorm2d

from stillhouse.errors import UserError
from stillhouse.models.registry import register

SMALL = "small"
PUBLISHED = "published"
Targets = Sequence[Mapping[str, Tensor]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's detectors normalise
ANCHORS = ((12.0,), (28.0,), (60.0,))  # pixels a side, by level of the small network
C4_ANCHORS = ((32.0, 64.0, 128.0, 256.0, 512.0),)
RATIOS = (0.5, 1.0, 2.0)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(math.gcd(8, outputs), outputs), nn.ReLU())


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, stride)
        self.second = nn.Sequential(*_conv(outputs, outputs)[:2])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class SmallPyramid(nn.Module):
    """Maps of one width at strides 4, 8 and 16. Group norm has no statistics that drift while it learns, so that a
    stored copy still fits the heads.

    Args:
        channels: of the image.
        width: of the first convolution.
        pyramid: of the maps.
    """

    def __init__(self, channels: int, width: int, pyramid: int) -> None:
        super().__init__()
        self.stem = _conv(channels, width, 2)
        widths = [2 * width, 4 * width, 6 * width]
        self.stages = nn.ModuleList(Residual(a, b, 2) for a, b in zip([width, *widths], widths))
        self.neck = FeaturePyramidNetwork(widths, pyramid)
        self.out_channels = pyramid

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(x), OrderedDict()
        for level, stage in enumerate(self.stages):
            x = stage(x)
            maps[str(level)] = x
        found: dict[str, Tensor] = self.neck(maps)
        return found


class ResNetC4(nn.Module):
    """A ResNet of torchvision to its third stage, at stride 16, with frozen batch norm."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        parts = {name: child for name, child in network.named_children()}
        self.stem = nn.Sequential(parts["conv1"], parts["bn1"], parts["relu"], parts["maxpool"])
        self.stages = nn.ModuleList(parts[f"layer{i}"] for i in (1, 2, 3))
        self.out_channels = _width(parts["layer3"])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return {"0": x}


def _width(stage: nn.Module) -> int:
    """Channels that a stage of a ResNet gives."""
    block = list(stage.children())[-1]
    return int([m for m in block.children() if isinstance(m, nn.Conv2d)][-1].out_channels)


@register({"faster_rcnn": {"masks": False}, "mask_rcnn": {"masks": True}})
class RegionDetector(GeneralizedRCNN):  # type: ignore[misc]  # torchvision has no types
    """A two-stage detector: `backbone`, `rpn` (where something is), `roi_heads` (what it is, its box and its mask).

    Args:
        num_classes: K; the heads have one output more, the first, for the background.
        input_shape: (channels, height, width).
        masks: whether it learns the objects' masks.
        backbone: small, or a ResNet of torchvision such as resnet50, as C4.
        backbone_weights: of a ResNet: `published` (of ImageNet, downloaded); None: random.
        width, pyramid, hidden: of the small network: channels of the first convolution and of the maps; of the regions'
            layers.
        anchors: pixels a side of the anchors, by level.
        proposals: regions that are looked at, in training and evaluation.
        sampled: regions of an image that are learned in a step.

    Raises:
        UserError: an unknown ResNet, or weights for the small network.
    """

    def __init__(
        self,
        num_classes: int = 3,
        input_shape: tuple[int, ...] = (3, 96, 128),
        masks: bool = False,
        backbone: str = SMALL,
        backbone_weights: str | None = None,
        width: int = 16,
        pyramid: int = 48,
        hidden: int = 128,
        anchors: Sequence[Sequence[float]] | None = None,
        proposals: tuple[int, int] = (200, 100),
        sampled: int = 64,
    ) -> None:
        outputs = num_classes + 1
        sides = tuple(tuple(float(side) for side in level) for level in anchors or ()) or (
            ANCHORS if backbone == SMALL else C4_ANCHORS
        )
        if backbone == SMALL:
            if backbone_weights is not None:
                raise UserError("options.backbone_weights: the small backbone has no published weights.")
            trunk: nn.Module = SmallPyramid(input_shape[0], width, pyramid)
            levels = ["0", "1", "2"]
            parts: dict[str, Any] = {
                "box_roi_pool": MultiScaleRoIAlign(levels, 7, 2),
                "box_head": TwoMLPHead(pyramid * 49, hidden),
                "box_predictor": FastRCNNPredictor(hidden, outputs),
            }
            if masks:
                parts["mask_roi_pool"] = MultiScaleRoIAlign(levels, 14, 2)
                parts["mask_head"] = MaskRCNNHeads(pyramid, (pyramid, pyramid), 1)
                parts["mask_predictor"] = MaskRCNNPredictor(pyramid, pyramid, outputs)
        else:
            network = _resnet(backbone, backbone_weights)
            trunk, last = ResNetC4(network), network.get_submodule("layer4")
            deep = _width(last)
            parts = {
                "box_roi_pool": MultiScaleRoIAlign(["0"], 14, 0),
                "box_head": nn.Sequential(last, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                "box_predictor": FastRCNNPredictor(deep, outputs),
            }
            if masks:  # which share the last stage with the boxes
                parts["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 14, 0)
                parts["mask_head"] = last
                parts["mask_predictor"] = MaskRCNNPredictor(deep, 256, outputs)
        if len(sides) != (3 if backbone == SMALL else 1) or len({len(level) for level in sides}) > 1:
            raise UserError(
                f"options.anchors: give as many sides in pixels for each of the {3 if backbone == SMALL else 1} levels "
                f"of the {backbone} backbone; given: {[list(level) for level in sides]}."
            )
        generator = AnchorGenerator(sides, (RATIOS,) * len(sides))
        head = RPNHead(trunk.out_channels, len(sides[0]) * len(RATIOS))
        after = {"training": proposals[0], "testing": proposals[1]}
        before = {mode: 4 * number for mode, number in after.items()}
        rpn = RegionProposalNetwork(generator, head, 0.7, 0.3, 2 * sampled, 0.5, before, after, 0.7)
        heads = RoIHeads(
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=sampled,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            **parts,
        )
        size = input_shape[1:] or (96, 128)
        super().__init__(trunk, rpn, heads, GeneralizedRCNNTransform(min(size), max(size), list(MEAN), list(STD)))
        self.stage_names = [f"backbone.stages.{i}" for i in range(3)]


def _resnet(name: str, weights: str | None) -> nn.Module:
    from torchvision.models import get_model

    if name not in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        raise UserError(f"options.backbone: 'small' or a ResNet of torchvision such as resnet50; given: '{name}'.")
    if weights not in (None, PUBLISHED):
        raise UserError(f"options.backbone_weights: '{PUBLISHED}' or nothing; given: '{weights}'.")
    model: resnet.ResNet = get_model(name, weights="IMAGENET1K_V1" if weights else None, norm_layer=FrozenBatchNorm2d)
    return model


# ---- the pieces of a detector ----------------------------------------------------------------------------------------


@dataclass
class Proposed:
    """What the first stage gives.

    Attributes:
        regions: of each image (n, 4), best first.
        objectness: by level (B, A, H, W).
        deltas: by level (B, 4 A, H, W), four values in a row for each anchor.
        losses: `objectness` and `rpn_box_reg`, where there were targets.
    """

    regions: list[Tensor]
    objectness: list[Tensor]
    deltas: list[Tensor]
    losses: dict[str, Tensor]


def propose(
    network: GeneralizedRCNN, images: ImageList, features: Mapping[str, Tensor], targets: Targets | None = None
) -> Proposed:
    """The first stage on any features: `network.rpn`, with what its head gives.

    Args:
        network: whose `rpn` is run; its mode says how many regions are left.
        images: for their sizes.
        features: level -> (B, C, H, W).
        targets: with `boxes`; None: no losses.
    """
    rpn: Any = network.rpn
    maps = list(features.values())
    objectness, deltas = rpn.head(maps)
    anchors = rpn.anchor_generator(images, maps)
    counts = [o[0].numel() for o in objectness]
    flat, moved = concat_box_prediction_layers(list(objectness), list(deltas))
    boxes = rpn.box_coder.decode(moved.detach(), anchors).view(len(anchors), -1, 4)
    regions, _ = rpn.filter_proposals(boxes, flat, images.image_sizes, counts)
    losses = {}
    if targets is not None:
        labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
        wanted = rpn.box_coder.encode(matched, anchors)
        first, second = rpn.compute_loss(flat, moved, labels, wanted)
        losses = {"objectness": first, "rpn_box_reg": second}
    return Proposed(regions, list(objectness), list(deltas), losses)


def box_outputs(
    network: GeneralizedRCNN, features: Mapping[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Scores (R, K + 1), background first, and box deltas (R, K + 1, 4) of regions."""
    heads: Any = network.roi_heads
    scores, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(dict(features), regions, sizes)))
    return scores, deltas.unflatten(1, (-1, 4))


def mask_outputs(
    network: GeneralizedRCNN, features: Mapping[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]
) -> Tensor:
    """Mask logits (R, K + 1, M, M) of regions."""
    heads: Any = network.roi_heads
    out: Tensor = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(dict(features), regions, sizes)))
    return out


def region_losses(
    network: GeneralizedRCNN,
    features: Mapping[str, Tensor],
    regions: list[Tensor],
    sizes: list[tuple[int, int]],
    targets: Targets,
    class_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, Tensor]:
    """`classifier`, `box_reg` and, of a network with masks, `mask`: the losses of the second stage.

    Args:
        network: whose `roi_heads` are run.
        features: level -> (B, C, H, W).
        regions: of each image, as proposed; those of the targets are added, and some are drawn.
        sizes: (height, width) of each image.
        targets: `boxes`, `labels` from 1, and `masks`.
        class_loss: of scores (R, K + 1) and labels (R,), of which 0 is the background.
    """
    heads: Any = network.roi_heads
    drawn, matched, labels, wanted = heads.select_training_samples(list(regions), list(targets))
    scores, deltas = box_outputs(network, features, drawn, sizes)
    _, box_loss = fastrcnn_loss(scores, deltas.flatten(1), labels, wanted)
    out = {"classifier": class_loss(scores, torch.cat(labels)), "box_reg": box_loss}
    if heads.has_mask():
        positive = [torch.where(y > 0)[0] for y in labels]
        inside = [r[p] for r, p in zip(drawn, positive)]
        logits = mask_outputs(network, features, inside, sizes)
        masks, true = [t["masks"] for t in targets], [t["labels"] for t in targets]
        out["mask"] = maskrcnn_loss(logits, inside, masks, true, [m[p] for m, p in zip(matched, positive)])
    return out
