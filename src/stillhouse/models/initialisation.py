"""The initialisation that the papers' CIFAR nets share (He et al., arXiv 1502.01852): normal with variance 2 / fan-out
for convolutions."""

from __future__ import annotations

from torch import nn


def he_fan_out(model: nn.Module, linear_std: float | None = None) -> None:
    """Set convolutions to N(0, 2 / (kernel area * output channels)) and their biases to 0; norms stay at weight 1, bias
    0.

    Args:
        model: changed in place.
        linear_std: also set linear layers to N(0, linear_std**2) with bias 0; None leaves them at torch's default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            std = (2.0 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)) ** 0.5
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0.0, linear_std)
            nn.init.zeros_(module.bias)
