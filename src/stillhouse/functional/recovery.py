"""Recovering images from a trained network with batch norm (SRe2L: Yin et al., NeurIPS 2023, arXiv 2306.13092;
DeepInversion, arXiv 1912.08795)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.matching import safe_norm
from stillhouse.functional.precision import full_precision


class BatchNormStatistics:
    """Hooks on the inputs of a network's BatchNorm2d layers: after a forward, `distances()` says how far the batch is
    from what they remember.

    r_l = |running_var_l - var(x_l)|_2 + |running_mean_l - mean(x_l)|_2, over N, H, W, with the biased variance. Made
    once, before any compilation.

    Raises:
        UserError: a network without BatchNorm2d.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        if not self.layers:
            raise UserError(
                "Images are recovered from the running statistics of BatchNorm2d layers, and this network has none; "
                "take one with batch norm."
            )
        self._network = network
        self._found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._hooks = [layer.register_forward_pre_hook(self._keep) for layer in self.layers]

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        self._found[layer] = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))

    def distances(self) -> Tensor:
        """(layers,) of the last forward. Raises `UserError` where the network was in training mode, or a layer was not
        reached."""
        if self._network.training:
            raise UserError(
                "The network must be in evaluation mode: in training mode the batch moves the statistics that it is "
                "compared with."
            )
        out = []
        for layer in self.layers:
            if layer not in self._found:
                raise UserError(
                    "A BatchNorm2d layer was not reached by the network's forward, so there is nothing to compare its "
                    "statistics with."
                )
            mean, var = self._found[layer]
            assert layer.running_mean is not None and layer.running_var is not None
            out.append(safe_norm(layer.running_var - var) + safe_norm(layer.running_mean - mean))
        self._found = {}
        return torch.stack(out)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@full_precision
def statistics_loss(distances: Tensor, first: float = 10.0) -> Tensor:
    """first * r_1 + the sum of the others, of (layers,) distances."""
    return distances.sum() + (first - 1) * distances[0]


@full_precision
def total_variation(x: Tensor) -> Tensor:
    """The Frobenius norms of the differences of (B, C, H, W) to its neighbours right, below and on both diagonals,
    summed."""
    shifts = (
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
        x[:, :, :-1, 1:] - x[:, :, 1:, :-1],
    )
    return torch.stack([safe_norm(s.flatten(), 0) for s in shifts]).sum()


def pixel_range(mean: Sequence[float], std: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """The values (1, C, 1, 1) of pixels 0 and 1 after normalisation, on the device of a tensor."""
    m, s = (torch.tensor(v, dtype=torch.float32, device=like.device).view(1, -1, 1, 1) for v in (mean, std))
    return -m / s, (1 - m) / s


@torch.no_grad()
def clamp_to_pixels(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Clamp normalised images (B, C, H, W), in place, to what pixels in [0, 1] give."""
    low, high = pixel_range(mean, std, x)
    x.copy_(torch.minimum(torch.maximum(x, low), high))
