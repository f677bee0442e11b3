"""Heads that grow by classes, heads averaged, and one head on the features of several extractors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from stillhouse.errors import UserError

State = Mapping[str, Tensor]


def with_classes(network: GeneralizedRCNN, classes: int) -> GeneralizedRCNN:
    """The network with the rows of the background and of its first classes alone, in place."""
    heads: Any = network.roi_heads
    layers = [(heads.box_predictor.cls_score, 1), (heads.box_predictor.bbox_pred, 4)]
    if heads.has_mask():
        layers.append((heads.mask_predictor.mask_fcn_logits, 1))
    for layer, rows in layers:
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(parameter.detach()[: rows * (classes + 1)].clone()))
        width = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
        setattr(layer, width, rows * (classes + 1))
    return network


@torch.no_grad()
def carry_over(new: nn.Module, old: State) -> None:
    """Load the weights of an earlier step: the rows of classes that it did not know stay as they are.

    Raises:
        UserError: a tensor that is missing, or of another network.
    """
    for name, tensor in new.state_dict().items():
        _leading(name, tensor, old).copy_(old[name])


def _leading(name: str, tensor: Tensor, old: State) -> Tensor:
    """The rows of a tensor that an earlier step has."""
    if name not in old:
        raise UserError(f"dynamic_ykd: the earlier step has no '{name}'; all steps must be of one network.")
    shape = old[name].shape
    if len(shape) != tensor.ndim or shape[1:] != tensor.shape[1:] or shape[:1] > tensor.shape[:1]:
        raise UserError(
            f"dynamic_ykd: '{name}' has shape {tuple(tensor.shape)}, but {tuple(shape)} in the earlier step; all steps "
            "must be of one network, and classes are only added."
        )
    return tensor[: shape[0]] if shape else tensor


@torch.no_grad()
def background_rows(network: GeneralizedRCNN, old: int) -> None:
    """Let the scores of new classes start as the background's, their bias lower by log of the number of old classes."""
    layer: Any = network.roi_heads.box_predictor.cls_score
    layer.weight[old + 1 :] = layer.weight[0]
    layer.bias[old + 1 :] = layer.bias[0] - math.log(max(old, 1))


def is_head(name: str) -> bool:
    """Whether a weight of this name belongs to the head, not to the extractor."""
    return not name.startswith("backbone.")


def averaged_heads(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weights of the newest step with the heads of several averaged; rows of classes that an older step did not
    know are averaged over those that did. Extractors are those of the newest.

    Args:
        states: the newest first.
        weights: of each, which sum to 1.

    Raises:
        UserError: other numbers of weights, weights that do not sum to 1, or states of several networks.
    """
    if len(states) != len(weights) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise UserError(
            f"averaging: give a weight of at least 0 for each of the last {len(states)} steps, which sum to 1; given: "
            f"{list(weights)}."
        )
    out = {}
    for name, newest in states[0].items():
        total = newest.clone()
        if is_head(name) and newest.is_floating_point():
            total, share = torch.zeros_like(newest), torch.zeros(newest.shape[:1] or ())
            for state, weight in zip(states, weights):
                rows = _leading(name, newest, state).shape[:1]
                part = slice(0, rows[0]) if rows else ...
                total[part] += weight * state[name]
                share[part] += weight
            known = share.view(-1, *[1] * (newest.ndim - 1)) if newest.ndim else share
            total = torch.where(known > 0, total / known.clamp_min(1e-12), newest)
        out[name] = total
    return out


class Branches(GeneralizedRCNN):  # type: ignore[misc]  # torchvision has no types
    """One head on the features of each extractor: branch i finds the classes of task i alone, and together they find
    all. In evaluation it is called as torchvision's detectors are.

    Args:
        network: whose head it is; its own extractor is the last branch's.
        extractors: of the branches, in the order of the tasks.
        classes: of each branch, the classes that it finds, by their places in the head from 1.
        order: of each place in the head, from 1, the class id in the data.
    """

    def __init__(
        self,
        network: GeneralizedRCNN,
        extractors: Sequence[nn.Module],
        classes: Sequence[Sequence[int]],
        order: Sequence[int],
    ) -> None:
        super().__init__(extractors[-1], network.rpn, network.roi_heads, network.transform)
        self.extractors = nn.ModuleList(extractors)
        heads: Any = self.roi_heads
        self.most = heads.detections_per_img
        heads.detections_per_img = self.most * len(extractors)
        finds = torch.zeros(len(extractors), len(order) + 1, dtype=torch.bool)
        for branch, found in enumerate(classes):
            finds[branch, list(found)] = True
        self.finds: Tensor
        self.order: Tensor
        self.register_buffer("finds", finds, persistent=False)
        self.register_buffer("order", torch.tensor([0, *(c + 1 for c in order)]), persistent=False)

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        """Of each image (C, H, W) in [0, 1]: `boxes`, `labels` from 1 in the data's order, `scores`, and `masks`.

        Raises:
            UserError: a call in training: its parts are trained one step after the other.
        """
        if targets is not None:
            raise UserError("A product of dynamic_ykd is not trained as a whole; run its recipe with one more task.")
        own = [(image.shape[-2], image.shape[-1]) for image in images]
        seen, _ = self.transform(images)
        found: list[list[dict[str, Tensor]]] = [[] for _ in images]
        for extractor, finds in zip(self.extractors, self.finds):
            features = extractor(seen.tensors)
            regions, _ = self.rpn(seen, features)
            for image, one in enumerate(self.roi_heads(features, regions, seen.image_sizes)[0]):
                chosen = finds[one["labels"]]
                found[image].append({name: value[chosen] for name, value in one.items()})
        joined = [self._best(parts) for parts in found]
        detections: list[dict[str, Tensor]] = self.transform.postprocess(joined, seen.image_sizes, own)
        return detections

    def _best(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The detections of all branches, best first. Branches share no class, so their boxes suppress no other's."""
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        best = whole["scores"].argsort(descending=True)[: self.most]
        return {name: self.order[value[best]] if name == "labels" else value[best] for name, value in whole.items()}


def branched(
    network: GeneralizedRCNN,
    extractors: Sequence[State],
    classes: Sequence[Sequence[int]],
    order: Sequence[int],
    shared: Sequence[str] = (),
) -> Branches:
    """`Branches` from the extractors' weights.

    Args:
        network: with the head's weights.
        extractors: weights of `backbone`, by branch; an empty mapping leaves them as the network has them.
        classes, order: of `Branches`.
        shared: parts of the extractor that all branches have in common, as they were frozen.
    """
    made: list[nn.Module] = []
    for state in extractors:
        extractor = copy.deepcopy(network.backbone)
        if state:
            extractor.load_state_dict(state)
        for name in shared if made else ():
            parent, _, last = name.rpartition(".")
            setattr(extractor.get_submodule(parent), last, made[0].get_submodule(name))
        made.append(extractor)
    return Branches(network, made, classes, order)
