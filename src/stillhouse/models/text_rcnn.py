"""`text_rcnn`: a two-stage detector whose classes are vectors, such as embeddings of their names: a backbone of timm, a
feature pyramid, region proposals, and heads that embed regions into the vectors' space.

Faster R-CNN (Ren et al., NeurIPS 2015, arXiv 1506.01497) with a feature pyramid (Lin et al., CVPR 2017, arXiv
1612.03144). Classes are replaced after training by other vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from stillhouse.errors import UserError
from stillhouse.functional.boxes import best_detections, unsuppressed
from stillhouse.functional.precision import full_precision
from stillhouse.functional.regions import (
    anchors,
    blended,
    chosen,
    clipped,
    decoded,
    encoded,
    matched,
    padded_truth,
    taken,
    weighted_mean,
)
from stillhouse.models.pyramid_detector import PUBLISHED, load_backbone
from stillhouse.models.registry import register
from stillhouse.models.sources import check_timm

CODE = (10.0, 10.0, 5.0, 5.0)  # scale of the second stage's numbers
USUAL_SIDE = 224  # pixels of a region that belongs to the level of stride 16


class FrozenNorm(nn.Module):
    """Batch normalisation with fixed statistics, scale and shift."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        self.eps = float(getattr(norm, "eps", 1e-5))
        self.drop, self.act = (getattr(norm, n, None) or nn.Identity() for n in ("drop", "act"))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        found: Tensor = self.act(self.drop(x * scale[:, None, None] + shift[:, None, None]))
        return found


def freeze_norms(module: nn.Module) -> None:
    """Replace every batch normalisation inside by one that stays as it is."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, FrozenNorm(child))
        else:
            freeze_norms(child)


def _block(inputs: int, outputs: int, kernel: int = 3, norm: bool = True) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(convolution, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU())


class Trunk(nn.Module):
    """Convolutions and linear layers on pooled regions (n, C, p, p), to (n, units).

    Args:
        width, pool: C and p.
        convs, fcs, units: how many 3x3 convolutions, how many linear layers, and how wide these are.
        norm: batch normalisation after the convolutions.
    """

    def __init__(self, width: int, pool: int, convs: int, fcs: int, units: int, norm: bool = True) -> None:
        super().__init__()
        if fcs < 1:
            raise UserError("options.fcs: a head needs one linear layer at least.")
        self.convs = nn.Sequential(*(_block(width, width, norm=norm) for _ in range(convs)))
        inputs = [width * pool * pool, *[units] * (fcs - 1)]
        self.fcs = nn.ModuleList(nn.Linear(i, units) for i in inputs)

    def forward(self, pooled: Tensor) -> Tensor:
        x = self.convs(pooled).flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x))
        return x


class BoxHead(nn.Module):
    """Embeds pooled regions, classifies them by the cosine with class vectors, and corrects their boxes.

    Args:
        trunk: shared by both branches; its output has `units` numbers.
        units: of the trunk.
        branch: of further linear layers of each branch.
        dim: of the embedding.
        conditioned: whether the box is corrected knowing the class vector.
        scale: what cosines are multiplied by in training; None: learned, from 100.
        test_scale: the same in evaluation; None: as in training.
        unit_background: whether the background's vector has unit length.
    """

    def __init__(
        self,
        trunk: nn.Module,
        units: int,
        branch: int,
        dim: int,
        conditioned: bool,
        scale: float | None,
        test_scale: float | None,
        unit_background: bool,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        branches = [[layer for _ in range(branch) for layer in (nn.Linear(units, units), nn.ReLU())] for _ in range(2)]
        self.to_class, self.to_box = (nn.Sequential(*layers) for layers in branches)
        self.embed = nn.Linear(units, dim)
        self.background = nn.Parameter(torch.empty(1, dim))
        nn.init.normal_(self.background, std=dim**-0.5)
        self.regress = nn.Linear(units + (dim if conditioned else 0), 4)
        nn.init.normal_(self.regress.weight, std=0.001)
        nn.init.zeros_(self.regress.bias)
        self.conditioned, self.unit_background = conditioned, unit_background
        self.scale, self.test_scale = scale, test_scale if test_scale is not None else scale
        self.log_scale = nn.Parameter(torch.tensor(100.0).log()) if scale is None else None

    def embedded(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(n, dim) raw embeddings of pooled regions, and (n, units) what boxes are corrected from."""
        x = self.trunk(pooled)
        return self.embed(self.to_class(x)), self.to_box(x)

    @full_precision
    def logits(self, raw: Tensor, text: Tensor) -> Tensor:
        """(n, K + 1), the background last, of raw embeddings (n, dim) by unit vectors (K, dim)."""
        background = F.normalize(self.background, dim=-1) if self.unit_background else self.background
        vectors = torch.cat([text, background.to(text.dtype)])
        cosines = F.normalize(raw, dim=-1) @ vectors.T
        if self.log_scale is not None:
            return self.log_scale.exp() * cosines
        scale = self.scale if self.training else self.test_scale
        assert scale is not None
        return scale * cosines

    def corrections(self, x: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        """(n, 4) of what boxes are corrected from (n, units); a label K, the background, has a vector of zeros."""
        if self.conditioned:
            vectors = torch.cat([text, text.new_zeros(1, text.shape[1])])
            x = torch.cat([x, vectors[labels].to(x.dtype)], -1)
        found: Tensor = self.regress(x)
        return found


class Proposer(nn.Module):
    """The region proposal network on all levels of a pyramid.

    Args:
        width: channels of the pyramid.
        per_cell: anchors of a cell.
        quality: whether it learns how well an anchor lies on a thing, from anchors on things alone, in place of
            telling things from background (OLN, Kim et al., RA-L 2022, arXiv 2108.06753): then what is not labelled is
            not background.
    """

    def __init__(self, width: int, per_cell: int, quality: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.score = nn.Conv2d(width, per_cell, 1)
        self.box = nn.Conv2d(width, 4 * per_cell, 1)
        self.quality = quality
        for layer in (self.conv, self.score, self.box):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each level, scores (B, N) and corrections (B, N, 4) of its anchors."""
        out = []
        for x in maps:
            x = F.relu(self.conv(x))
            scores = self.score(x).permute(0, 2, 3, 1).flatten(1)
            out.append((scores.float(), self.box(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float()))
        return out


@torch.no_grad()
def best_proposals(
    detector: TextRCNN,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    keep: int,
    overlap: float,
    smallest: float = 4.0,
) -> list[Tensor]:
    """The best proposals (n, 4) of each image, on the host, in pixels of its own size.

    Args:
        detector: in evaluation mode.
        images: (B, C, H, W), as it has them.
        sizes: (height, width) of each image itself.
        keep: how many at most.
        overlap: they overlap by an intersection over union of at most this.
        smallest: pixels a side.
    """
    height, width = images.shape[-2:]
    boxes, scores, _ = detector.propose(detector.pyramid(images), (height, width))
    best, values, _ = best_detections(boxes, scores[..., None], overlap, keep)
    out = []
    for found, value, (own_height, own_width) in zip(best.cpu(), values.cpu(), sizes):
        own = found[value > 0] * torch.tensor([own_width / width, own_height / height] * 2)
        out.append(own[((own[:, 2:] - own[:, :2]) >= smallest).all(1)])
    return out


@register({"text_rcnn": {}})
class TextRCNN(nn.Module):
    """Finds things whose classes are given as vectors. In training, with targets, it returns its losses
    (`rpn_score`, `rpn_box`, `class`, `box`); else the boxes it finds: `boxes` (B, N, 4) corners in pixels, `scores`
    (B, N) and `labels` (B, N), padded with score 0. Losses of boxes are means over positives, times their usual share,
    so that images without boxes do not thin them out.

    Args:
        num_classes: K.
        input_shape: (channels, height, width).
        dim: of the vectors.
        known: ids of the classes that training knows; None: all.
        backbone: a timm model that gives maps.
        backbone_weights: `published` (timm's, downloaded), or a file with the state dict of the timm classifier, as
            given or under STILLHOUSE_DATA; None: random. A product is loaded without them.
        frozen: names in the backbone whose weights stay as they are, such as `conv_stem`.
        frozen_norms: the backbone's batch normalisation keeps its statistics, scale and shift.
        strides: of the levels that the backbone gives, finest first.
        coarser: further levels, each of half the size, for proposals alone.
        width: channels of the pyramid.
        usual: pixels a side of a region that belongs to the level of stride 16.
        sides: of an anchor, in cells.
        ratios: of an anchor, height over width.
        proposals: how many a level gives, and how many of all a step looks at, in training and in evaluation.
        quality: what proposals are scored by, see `Proposer`.
        anchor_overlap: below and from which an anchor is background and a thing.
        sampled: anchors of an image, and regions, that a step learns from.
        positive_share: of the regions, at most.
        pool: cells a side of a pooled region.
        convs, fcs, units: of a head; `branch` further linear layers for class and box each.
        head_norm: batch normalisation in the heads.
        second: a second head of embeddings alone, whose scores are blended with the first's.
        second_scale: what its cosines are multiplied by.
        share: of the first head in the score of a known class, of the second in that of another.
        conditioned, scale, test_scale, unit_background: of the first head, see `BoxHead`.
        overlap: the intersection over union from which two boxes of a class are duplicates.

    Raises:
        UserError: a backbone without such maps, weights of another network, or a class that is none.
    """

    text: Tensor
    _ids: Tensor
    _position: Tensor
    is_known: Tensor

    def __init__(
        self,
        num_classes: int = 3,
        input_shape: tuple[int, ...] = (3, 128, 128),
        dim: int = 128,
        known: Sequence[int] | None = None,
        backbone: str = "tf_efficientnet_lite0",
        backbone_weights: str | None = None,
        frozen: Sequence[str] = (),
        frozen_norms: bool = True,
        strides: Sequence[int] = (8, 16, 32),
        coarser: int = 0,
        width: int = 64,
        usual: float = USUAL_SIDE,
        sides: Sequence[float] = (4.0,),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        proposals: Sequence[Sequence[int]] = ((200, 100), (200, 50)),
        quality: bool = False,
        anchor_overlap: tuple[float, float] = (0.3, 0.7),
        sampled: tuple[int, int] = (64, 32),
        positive_share: float = 0.25,
        pool: int = 7,
        convs: int = 1,
        fcs: int = 1,
        units: int = 128,
        branch: int = 0,
        head_norm: bool = True,
        second: bool = False,
        second_scale: float = 100.0,
        share: float = 2 / 3,
        conditioned: bool = False,
        scale: float | None = None,
        test_scale: float | None = None,
        unit_background: bool = True,
        overlap: float = 0.5,
    ) -> None:
        super().__init__()
        ids = list(range(num_classes)) if known is None else list(known)
        wrong = [i for i in ids if not 0 <= i < num_classes]
        if wrong or not ids or len(set(ids)) < len(ids):
            raise UserError(f"options.known: name some of the classes 0 to {num_classes - 1}, each once; given: {ids}.")
        name = backbone.removeprefix("timm:")
        check_timm(name)
        published = backbone_weights == PUBLISHED
        self.backbone = timm.create_model(name, features_only=True, in_chans=input_shape[0], pretrained=published)
        info: Any = self.backbone.feature_info
        places = {r: i for i, r in enumerate(info.reduction())}
        if not set(strides) <= set(places):
            raise UserError(
                f"options.strides: '{backbone}' gives maps at strides {info.reduction()}, not at {list(strides)}."
            )
        if backbone_weights is not None and not published:
            load_backbone(self.backbone, backbone_weights, name)
        if frozen_norms:
            freeze_norms(self.backbone)
        self._freeze(frozen)
        self._places, self.strides, self.coarser = [places[s] for s in strides], tuple(strides), coarser
        channels = info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(channels[i], width, 1) for i in self._places)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in strides)
        self.proposer = Proposer(width, len(sides) * len(ratios), quality)

        def trunk() -> Trunk:
            return Trunk(width, pool, convs, fcs, units, head_norm)

        self.first = BoxHead(trunk(), units, branch, dim, conditioned, scale, test_scale, unit_background)
        self.second: nn.Sequential | None = nn.Sequential(trunk(), nn.Linear(units, dim)) if second else None
        self.register_buffer("text", F.normalize(torch.ones(num_classes, dim), dim=-1))
        is_known = torch.zeros(num_classes, dtype=torch.bool)
        is_known[ids] = True
        self.register_buffer("is_known", is_known)
        position = torch.zeros(num_classes, dtype=torch.int64)
        position[ids] = torch.arange(len(ids))
        self.register_buffer("_position", position, persistent=False)
        self.register_buffer("_ids", torch.tensor(ids), persistent=False)
        self.width, self.dim, self.pool, self.usual = width, dim, pool, usual
        self._sides, self._ratios, self._counts = tuple(sides), tuple(ratios), [tuple(p) for p in proposals]
        self._anchor_overlap, self._sampled, self._positive_share = anchor_overlap, sampled, positive_share
        self._second_scale, self._share, self.overlap = second_scale, share, overlap

    def _freeze(self, names: Sequence[str]) -> None:
        there = [n for n, _ in self.backbone.named_modules()]
        for name in names:
            if name not in there:
                raise UserError(
                    f"options.frozen: '{name}' is no part of the backbone; it has {', '.join(there[1:9])}, …"
                )
            self.backbone.get_submodule(name).requires_grad_(False)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Maps (B, width, h, w) at the strides, finest first."""
        features = self.backbone(images)
        maps = [lateral(features[i]) for lateral, i in zip(self.lateral, self._places)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
        return [smooth(x) for smooth, x in zip(self.smooth, maps)]

    def pooled(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """(B * M, width, pool, pool) of regions (B, M, 4), each from the level that suits its size."""
        flat = boxes.reshape(-1, 4)
        number = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        rows = torch.cat([number[:, None].to(flat.dtype), flat], 1)
        side = (flat[:, 2:] - flat[:, :2]).clamp_min(1).prod(1).sqrt()
        level = (4 + (side / self.usual).log2()).floor()  # log2 of a stride
        strides = torch.tensor([float(s) for s in self.strides], device=boxes.device).log2()
        choice = (level[:, None] - strides).abs().argmin(1)
        out = None
        for i, (x, stride) in enumerate(zip(maps, self.strides)):
            found = roi_align(x.float(), rows.float(), self.pool, 1 / stride, 2, aligned=True)
            out = found if out is None else torch.where((choice == i)[:, None, None, None], found, out)
        assert out is not None
        return out

    def propose(self, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Proposals (B, P, 4), best first, their scores (B, P), and what the proposer's loss reads."""
        levels = [*maps]
        for _ in range(self.coarser):
            levels.append(F.max_pool2d(levels[-1], 1, 2))
        strides = [*self.strides, *(self.strides[-1] * 2 ** (i + 1) for i in range(self.coarser))]
        given = [
            anchors((x.shape[-2], x.shape[-1]), s, [side * s for side in self._sides], self._ratios, x.device)
            for x, s in zip(levels, strides)
        ]
        found = self.proposer(levels)
        each, total = self._counts[0 if self.training else 1]
        boxes, scores = [], []
        with torch.no_grad():
            for (score, numbers), own in zip(found, given):
                best, places = score.sigmoid().topk(min(each, score.shape[1]), dim=1)
                at = clipped(decoded(taken(numbers, places), own[places]), size)
                real = ((at[..., 2:] - at[..., :2]) > 1).all(-1)
                left = unsuppressed(at, torch.zeros_like(places), 0.7)
                boxes.append(at)
                scores.append(torch.where(real & left, best, -1.0))
            joined, values = torch.cat(boxes, 1), torch.cat(scores, 1)
            values, places = values.topk(min(total, values.shape[1]), dim=1)
            kept = taken(joined, places)
        scored = torch.cat([s for s, _ in found], 1), torch.cat([n for _, n in found], 1)
        return kept, values, {"anchors": torch.cat(given), "scores": scored[0], "numbers": scored[1]}

    def proposer_losses(self, made: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`rpn_score` and `rpn_box`."""
        own, device = made["anchors"], made["scores"].device
        truth = padded_truth(targets, device)
        low, high = self._anchor_overlap
        if self.proposer.quality:  # what lies on a thing at all, however well
            high = low
        match = matched(own, truth, low, high, best_too=True)
        choice = chosen(match, self._sampled[0], 1.0 if self.proposer.quality else 0.5)
        scores = taken(made["scores"], choice.places)
        if self.proposer.quality:
            counted = choice.positive
            wanted = taken(match.overlap, choice.places)
            score = weighted_mean((scores.sigmoid() - wanted).abs(), counted)
        else:
            wanted = choice.positive.to(scores.dtype)
            score = weighted_mean(F.binary_cross_entropy_with_logits(scores, wanted, reduction="none"), choice.counted)
        goal = encoded(taken(truth.boxes, taken(match.which, choice.places)), own[choice.places])
        numbers = taken(made["numbers"], choice.places)
        error = F.smooth_l1_loss(numbers, goal, reduction="none", beta=1 / 9).sum(-1)
        return {"rpn_score": score, "rpn_box": 0.5 * weighted_mean(error, choice.positive)}

    def embed(self, maps: Sequence[Tensor], boxes: Tensor, second: bool = False) -> Tensor:
        """(B, M, dim) raw embeddings of regions (B, M, 4), by the first head or the second."""
        pooled = self.pooled(maps, boxes)
        if second:
            assert self.second is not None, "the detector has no second head"
            raw: Tensor = self.second(pooled)
        else:
            raw = self.first.embedded(pooled)[0]
        return raw.reshape(*boxes.shape[:2], -1)

    def losses(
        self, maps: Sequence[Tensor], size: tuple[int, int], targets: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """All losses of maps of images (height, width); of labels that are not known nothing is learned."""
        proposals, scores, made = self.propose(maps, size)
        terms = self.proposer_losses(made, targets)
        truth = padded_truth(targets, proposals.device)
        regions = torch.cat([truth.boxes, proposals], 1)
        there = torch.cat([truth.real, scores >= 0], 1)
        match = matched(regions, truth, 0.5, 0.5)
        match.positive, match.negative = match.positive & there, match.negative & there
        choice = chosen(match, self._sampled[1], self._positive_share)
        boxes = taken(regions, choice.places)
        which = taken(match.which, choice.places)
        text, background = self.text[self._ids], len(self._ids)
        labels = self._position[taken(truth.labels, which)]
        labels = torch.where(choice.positive, labels, background)
        raw, x = self.first.embedded(self.pooled(maps, boxes))
        logits = self.first.logits(raw, text)
        flat = labels.flatten()
        terms["class"] = weighted_mean(F.cross_entropy(logits, flat, reduction="none"), choice.counted.flatten())
        numbers = self.first.corrections(x, flat, text).float()
        goal = encoded(taken(truth.boxes, which), boxes, CODE).flatten(0, 1)
        error = (numbers - goal).abs().sum(-1)
        terms["box"] = self._positive_share * weighted_mean(error, choice.positive.flatten())
        return terms

    def found(self, maps: Sequence[Tensor], size: tuple[int, int], number: int = 100) -> dict[str, Tensor]:
        """`boxes`, `scores` and `labels` of maps of images (height, width)."""
        proposals, scores, _ = self.propose(maps, size)
        pooled = self.pooled(maps, proposals)
        raw, x = self.first.embedded(pooled)
        logits = self.first.logits(raw, self.text)
        if self.second is None:
            probs = logits.softmax(-1)
        else:
            other = self._second_scale * F.normalize(self.second(pooled).float(), dim=-1) @ self.text.T
            probs = blended(logits, other, self.is_known, self._share)
        numbers = self.first.corrections(x, logits.argmax(-1), self.text)
        boxes = clipped(decoded(numbers.reshape(*proposals.shape), proposals, CODE), size)
        probs = probs[:, :-1].reshape(*proposals.shape[:2], -1) * (scores >= 0)[..., None]
        boxes, best, labels = best_detections(boxes, probs, self.overlap, number)
        return {"boxes": boxes, "scores": best, "labels": labels}

    @torch.no_grad()
    def set_text(self, vectors: Tensor) -> None:
        """Let these vectors (K, dim) be the classes, in label order.

        Raises:
            UserError: vectors of another shape, or not of unit length.
        """
        if vectors.shape != self.text.shape:
            raise UserError(
                f"The detector has {self.text.shape[0]} classes of {self.text.shape[1]} dimensions, but the vectors "
                f"have the shape {tuple(vectors.shape)}; set options.dim to the embedding's."
            )
        lengths = vectors.float().norm(dim=-1)
        if vectors.device.type == "cpu" and not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
            raise UserError("Class vectors must have unit length.")
        self.text.copy_(vectors)

    def forward(self, images: Tensor, targets: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Tensor]:
        """Losses where targets (`boxes` corners in pixels, `labels`) are given; else boxes."""
        size = (images.shape[-2], images.shape[-1])
        maps = self.pyramid(images)
        return self.found(maps, size) if targets is None else self.losses(maps, size, targets)
