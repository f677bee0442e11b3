"""DiffusionNet (Sharp et al., arXiv 2012.00888): features of the vertices of a mesh."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.methods.correspondence.diffumatch.shapes import Shape


class DiffusionBlock(nn.Module):
    """Heat diffusion of each channel over a learned time, products of gradients, and a perceptron, as a residual."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.times = nn.Parameter(torch.zeros(width))
        self.real = nn.Linear(width, width, bias=False)
        self.imaginary = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(3 * width, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor, shape: Shape, eigenpairs: int) -> Tensor:
        """(V, C) -> (V, C)."""
        kept = torch.exp(-shape.evals[:eigenpairs, None] * self.times.clamp_min(1e-8))
        diffused = shape.basis[:, :eigenpairs] @ (kept * shape.coefficients(x, eigenpairs))
        across, along = shape.gradients(diffused)
        turned = across * (self.real(across) - self.imaginary(along))
        turned = turned + along * (self.real(along) + self.imaginary(across))
        mixed: Tensor = self.mlp(torch.cat([x, diffused, turned.tanh()], 1))
        return x + mixed


class DiffusionNet(nn.Module):
    """Places of vertices (V, 3) to features (V, outputs).

    Args:
        eigenpairs: of the Laplacian that diffusion uses.
    """

    def __init__(self, width: int, outputs: int, depth: int, eigenpairs: int, dropout: float) -> None:
        super().__init__()
        self.eigenpairs = eigenpairs
        self.enter = nn.Linear(3, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width, dropout) for _ in range(depth))
        self.leave = nn.Linear(width, outputs)

    def forward(self, shape: Shape) -> Tensor:
        """Of all vertices of a shape."""
        x = self.enter(shape.points)
        for block in self.blocks:
            x = block(x, shape, self.eigenpairs)
        out: Tensor = self.leave(x)
        return out
