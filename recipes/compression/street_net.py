"""A small residual network for street scenes: stages at a half, a quarter and an eighth of the image, and a map of
logits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.models.resnet import BasicBlock


class StreetNet(nn.Module):
    """Stem, three stages, and a head that adds up the maps of the last two at a quarter of the image.

    Args:
        widths: channels of the stages.
        num_classes: K.
    """

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96), num_classes: int = 11) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(3, first, 3, 2, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(first), nn.ReLU()
        self.stage_names = ["layer1", "layer2", "layer3"]
        self.layer1 = BasicBlock(first, first, 1)
        self.layer2 = nn.Sequential(BasicBlock(first, second, 2), BasicBlock(second, second, 1))
        self.layer3 = nn.Sequential(BasicBlock(second, third, 2), BasicBlock(third, third, 1))
        self.fine, self.coarse = nn.Conv2d(second, num_classes, 1), nn.Conv2d(third, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, K, H / 4, W / 4) logits."""
        second = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        coarse = F.interpolate(
            self.coarse(self.layer3(second)), second.shape[-2:], mode="bilinear", align_corners=False
        )
        return self.fine(second) + coarse
