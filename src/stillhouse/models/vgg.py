"""VGG for 32 px images with batch norm and one linear layer (Simonyan and Zisserman, arXiv 1409.1556), as in CRD's
CIFAR experiments (arXiv 1910.10699).

Stages are `layer1` … `layer5`, each output after its ReLU (`layer3.relu:in` is before it); the classifier is `fc`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.initialisation import he_fan_out
from stillhouse.models.registry import register


@register({"vgg8": {"convolutions": (1, 1, 1, 1, 1)}, "vgg13": {"convolutions": (2, 2, 2, 2, 2)}})
class VGG(nn.Module):
    """Five stages of 3x3 convolutions, 2x2 max-pooling after the first three (at 64 px and more: four), mean over
    space, `fc`.

    Args:
        convolutions: convolutions of each stage.
        num_classes: C.
        input_shape: (channels, height, width); at least 8 px.
    """

    published_names: ClassVar[dict[str, str]] = {rf"^block{i}\.": f"layer{i + 1}." for i in range(5)} | {
        r"^classifier\.": "fc."
    }

    def __init__(
        self, convolutions: tuple[int, ...], num_classes: int = 10, input_shape: tuple[int, ...] = (3, 32, 32)
    ) -> None:
        super().__init__()
        if min(input_shape[1:]) < 8:
            raise UserError(
                f"A VGG halves its input three times and needs images of at least 8 px; given: {input_shape[1]} x "
                f"{input_shape[2]}."
            )
        self.stage_names = [f"layer{i + 1}" for i in range(5)]
        inputs = input_shape[0]
        for name, width, count in zip(self.stage_names, (64, 128, 256, 512, 512), convolutions):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            names = [*map(str, range(len(layers) - 1)), "relu"]
            setattr(self, name, nn.Sequential(OrderedDict(zip(names, layers))))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        he_fan_out(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        large = x.shape[-2] >= 64
        for i, name in enumerate(self.stage_names):
            x = getattr(self, name)(x)
            if i < 3 or (i == 3 and large):
                x = F.max_pool2d(x, 2)
        return self.fc(self.avgpool(x).flatten(1))
