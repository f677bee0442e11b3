"""YOLOv4 (Bochkovskiy et al., arXiv 2004.10934) as a layer graph: CSPDarknet53, pyramid pooling, two-way neck, three
heads.

Layers have the numbers of the published configuration, without its three `yolo` layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.models.layer_graph import IMAGE, Layer
from stillhouse.models.one_stage import GraphDetector
from stillhouse.models.registry import register

GROUPS = {"backbone_high": 56, "backbone_middle": 86, "backbone_low": 117, "neck": 137, "head": 162}
"""Parts of the network, each up to a layer of the published configuration."""
ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)


class _Layers:
    """Layers written one after the other."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.activation = "mish"

    @property
    def last(self) -> int:
        return len(self.layers) - 1

    def conv(self, channels: int, kernel: int = 1, stride: int = 1) -> int:
        source = self.last if self.layers else IMAGE
        return self._add(Layer("conv", (source,), channels, kernel, stride, activation=self.activation))

    def route(self, *sources: int) -> int:
        return self._add(Layer("concat", sources))

    def _add(self, layer: Layer) -> int:
        self.layers.append(layer)
        return self.last

    def stage(self, channels: int, inner: int, block: int, blocks: int) -> int:
        """A cross-stage part: half of the channels pass by the residual blocks."""
        down = self.conv(channels, 3, 2)
        passing = self.conv(inner)
        self.route(down)
        through = self.conv(inner)
        for _ in range(blocks):
            self.conv(block)
            through = self._add(Layer("add", (self.conv(inner, 3), through)))
        self.route(self.conv(inner), passing)
        return self.conv(channels)

    def five(self, channels: int) -> int:
        for i in range(5):
            self.conv(channels * (1 + i % 2), 1 + 2 * (i % 2))
        return self.last

    def pooled(self) -> None:
        source = self.last
        small = self._add(Layer("pool", (source,), kernel=5))
        self.route(source)
        middle = self._add(Layer("pool", (self.last,), kernel=9))
        self.route(source)
        large = self._add(Layer("pool", (self.last,), kernel=13))
        self.route(large, middle, small, source)

    def up(self, lateral: int, channels: int) -> int:
        """Upsampled, next to a map of the backbone."""
        self.conv(channels)
        larger = self._add(Layer("upsample", (self.last,)))
        self.route(lateral)
        self.route(self.conv(channels), larger)
        return self.five(channels)

    def out(self, channels: int, outputs: int) -> None:
        self._add(Layer("out", (self.conv(channels, 3),), outputs))


def yolov4_plan(outputs: int) -> list[Layer]:
    """The layers of YOLOv4, with heads of `outputs` channels at strides 8, 16 and 32."""
    net = _Layers()
    net.conv(32, 3)
    net.stage(64, 64, 32, 1)
    net.stage(128, 64, 64, 2)
    eighth, sixteenth = net.stage(256, 128, 128, 8), net.stage(512, 256, 256, 8)
    net.stage(1024, 512, 512, 4)
    net.activation = "leaky"
    for channels, kernel in ((512, 1), (1024, 3), (512, 1)):
        net.conv(channels, kernel)
    net.pooled()
    for channels, kernel in ((512, 1), (1024, 3)):
        net.conv(channels, kernel)
    coarse = net.conv(512)
    middle = net.up(sixteenth, 256)
    fine = net.up(eighth, 128)
    net.out(256, outputs)
    for source, channels, other in ((fine, 256, middle), (None, 512, coarse)):
        net.route(net.last - 2 if source is None else source)
        net.route(net.conv(channels, 3, 2), other)
        net.five(channels)
        net.out(2 * channels, outputs)
    return _grouped(net.layers)


def _grouped(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with their groups, by the published numbers: after each head one number is left out."""
    out, number = [], 0
    for layer in layers:
        group = next(name for name, end in GROUPS.items() if number < end)
        out.append(Layer(**{**vars(layer), "group": group}))
        number += 2 if layer.kind == "out" else 1
    return out


@register({"yolov4": {}})
class YOLOv4(GraphDetector):
    """YOLOv4 with the losses of our one-stage detectors. Stages are the cross-stage parts from stride 4.

    Args:
        num_classes: K.
        input_shape: (channels, height, width), of sides that 32 divides.
        widths: channels of every layer with batch norm, in order: a pruned network's.
        anchors, gains, overlap: as of every `GridDetector`.
    """

    def __init__(
        self,
        num_classes: int = 20,
        input_shape: tuple[int, ...] = (3, 416, 416),
        widths: Sequence[int] | None = None,
        anchors: Sequence[Sequence[Sequence[float]]] | None = None,
        gains: Sequence[float] = (2.0, 20.0, 1.0),
        overlap: float = 0.5,
    ) -> None:
        super().__init__(
            yolov4_plan,
            num_classes,
            input_shape,
            (8, 16, 32),
            widths,
            "leaky",
            anchors or ANCHORS,
            gains,
            overlap,
        )
        self.stage_names = [f"graph.layers.{i}" for i in (23, 54, 85, 104)]
