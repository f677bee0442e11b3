"""A classifier without its last layer, whatever library it comes from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.models import build
from stillhouse.models.anatomy import classifier, embedding_from


class Backbone(nn.Module):
    """The embedding of a classifier: what goes into its last layer, (B, D).

    Args:
        network: the classifier; its last layer is replaced by the identity.
        example: an input of one sample, (1, C, H, W).
        name: the last layer; None finds it.

    Attributes:
        width: D.

    Raises:
        UserError: a network whose last layer is not found.
    """

    def __init__(self, network: nn.Module, example: Tensor, name: str | None = None) -> None:
        super().__init__()
        batch = {"input": example}
        network.set_submodule(name or classifier(network, batch), nn.Identity())
        self.network = network
        mode = network.training
        with torch.no_grad():
            self.width = int(self.eval()(example).shape[-1])
        self.train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return embedding_from(self.network(x))


def backbone(spec: ModelSpec, shape: tuple[int, ...], classes: int | None = None) -> Backbone:
    """The network of a spec without its last layer; it has the library's number of classes unless `classes` is given,
    so that published weights fit."""
    return Backbone(build(spec.with_classifier("new"), classes, shape), torch.zeros(1, *shape), spec.embedding)
