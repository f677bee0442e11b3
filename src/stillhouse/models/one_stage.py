"""`one_stage`: a small detector of convolutions and batch norm, written as a layer graph: residual backbone, pyramid
pooling, neck with a route, heads at strides 8 and 16 (after YOLOv3, arXiv 1804.02767)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.models.grid_detector import GridDetector
from stillhouse.models.initialisation import he_fan_out
from stillhouse.models.layer_graph import IMAGE, Layer, LayerGraph, with_widths
from stillhouse.models.registry import register

GROUPS = ("backbone_high", "backbone_low", "neck", "head")
"""Parts of the network, by the size of their maps and what they are for."""


class _Plan:
    """Layers written one after the other."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.group = GROUPS[0]

    def add(self, layer: Layer) -> int:
        self.layers.append(replace(layer, group=self.group))
        return len(self.layers) - 1

    def conv(self, source: int, channels: int, kernel: int = 3, stride: int = 1) -> int:
        return self.add(Layer("conv", (source,), channels, kernel, stride))

    def residual(self, source: int, channels: int, number: int) -> int:
        """Blocks of a 1x1 and a 3x3 convolution with a shortcut."""
        for _ in range(number):
            inner = self.conv(source, channels // 2, 1)
            source = self.add(Layer("add", (source, self.conv(inner, channels))))
        return source


def one_stage_plan(width: int, depth: int, outputs: int) -> list[Layer]:
    """The layers of `one_stage`.

    Args:
        width: channels of the first convolution; the deepest maps have eight times as many.
        depth: residual blocks at each of strides 4, 8 and 16.
        outputs: channels of a head.
    """
    plan = _Plan()
    x = plan.conv(IMAGE, width, stride=2)
    x = plan.residual(plan.conv(x, 2 * width, stride=2), 2 * width, depth)
    fine = x = plan.residual(plan.conv(x, 4 * width, stride=2), 4 * width, depth)
    plan.group = GROUPS[1]
    x = plan.residual(plan.conv(x, 8 * width, stride=2), 8 * width, depth)
    plan.group = GROUPS[2]
    x = plan.conv(x, 4 * width, 1)
    pooled = [plan.add(Layer("pool", (x,), kernel=k)) for k in (3, 5)]
    coarse = plan.conv(plan.add(Layer("concat", (*pooled, x))), 4 * width, 1)
    up = plan.add(Layer("upsample", (plan.conv(coarse, 2 * width, 1),)))
    route = plan.add(Layer("concat", (up, plan.conv(fine, 2 * width, 1))))
    plan.group = GROUPS[3]
    for source, channels in ((route, 4 * width), (coarse, 8 * width)):
        plan.add(Layer("out", (plan.conv(source, channels),), outputs))
    return plan.layers


class GraphDetector(GridDetector):
    """A one-stage detector whose layers are written down (`graph.layers.N`), so that channels can be taken out.

    Args:
        plan: its layers, with a head for each stride; gets the channels of a head.
        num_classes, input_shape, strides: of `GridDetector`.
        widths: channels of every layer with batch norm, in order, in place of those of the plan.
        activation: where the plan names none.
        anchors, gains, overlap: of `GridDetector`.

    Raises:
        UserError: images whose sides the largest stride does not divide.
    """

    def __init__(
        self,
        plan: Callable[[int], list[Layer]],
        num_classes: int,
        input_shape: tuple[int, ...],
        strides: Sequence[int],
        widths: Sequence[int] | None,
        activation: str,
        anchors: Sequence[Sequence[Sequence[float]]] | None,
        gains: Sequence[float],
        overlap: float,
    ) -> None:
        super().__init__(num_classes, strides, anchors, gains, overlap)
        if any(side % max(strides) for side in input_shape[1:]):
            raise UserError(
                f"The detector's maps have strides up to {max(strides)}, which must divide the images; they are "
                f"{input_shape[1]} x {input_shape[2]}: set data.image_size."
            )
        layers = plan(self.outputs)
        if widths is not None:
            layers = with_widths(layers, widths, "the network")
        self.graph = LayerGraph(layers, input_shape[0], activation)
        he_fan_out(self)
        for i, layer in enumerate(self.graph.plan):
            if layer.kind == "out":
                self.graph.layers[i] = self.head(self.graph.width(layer.sources[0]))

    def grids(self, images: Tensor) -> list[Tensor]:
        """The heads' numbers, by stride."""
        return [self.as_grid(output) for output in self.graph(images)]


@register({"one_stage": {}})
class OneStage(GraphDetector):
    """A small detector with heads at strides 8 and 16. Stages are the residual parts and the neck.

    Args:
        num_classes: K.
        input_shape: (channels, height, width).
        width, depth: of the backbone.
        widths: channels of every layer with batch norm, in order, in place of those that `width` gives: a pruned
            network's.
        activation: leaky, mish, silu or relu.
        anchors, gains, overlap: as of every `GridDetector`.
    """

    def __init__(
        self,
        num_classes: int = 3,
        input_shape: tuple[int, ...] = (3, 96, 128),
        width: int = 16,
        depth: int = 1,
        widths: Sequence[int] | None = None,
        activation: str = "leaky",
        anchors: Sequence[Sequence[Sequence[float]]] | None = None,
        gains: Sequence[float] = (2.0, 20.0, 1.0),
        overlap: float = 0.5,
    ) -> None:
        super().__init__(
            partial(one_stage_plan, width, depth),
            num_classes,
            input_shape,
            (8, 16),
            widths,
            activation,
            anchors,
            gains,
            overlap,
        )
        residual = [i for i, layer in enumerate(self.graph.plan) if layer.kind == "add"][depth - 1 :: depth]
        route = [i for i, layer in enumerate(self.graph.plan) if layer.kind == "concat"]
        self.stage_names = [f"graph.layers.{i}" for i in (*residual, route[0] + 1)]
