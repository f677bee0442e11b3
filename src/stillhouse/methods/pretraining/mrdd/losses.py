"""The mathematics of MRDD (2403.10897): masks, the two variational losses, and the upper bound of the information
between the two codes.

The functions keep the scale of the released code by default (`reduction="sum"`): reconstruction summed over batch and
pixels, KL a mean over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision

Reduction = Literal["sum", "sample"]


def check_mask(shape: Sequence[int], patch: int, ratio: float) -> int:
    """The number of patches of images (..., H, W).

    Raises `UserError` where patches do not tile the image, or for a ratio outside [0, 1).
    """
    h, w = shape[-2:]
    if patch < 1 or h % patch or w % patch:
        raise UserError(
            f"mrdd: patches of {patch} x {patch} pixels do not tile views of {h} x {w}; choose a patch size that "
            "divides both."
        )
    if not 0 <= ratio < 1:
        raise UserError(f"mrdd: the mask ratio must be at least 0 and below 1; given: {ratio}.")
    return (h // patch) * (w // patch)


def mask_image(images: Tensor, scores: Tensor, patch: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Zero the int(ratio * P) patches with the lowest scores, in every channel; the images themselves are not changed.

    Args:
        images: (B, C, H, W).
        scores: (B, P), P = (H / patch)(W / patch), rows first; uniform draws in training.

    Returns:
        The masked images (B, C, H, W), and the visible patches (B, P - int(ratio * P), patch * patch * C) in the order
        of their scores, each flattened as (row, column, channel).

    Raises:
        UserError: see `check_mask`; scores of another shape.
    """
    count = check_mask(images.shape, patch, ratio)
    b, channels, h, w = images.shape
    if scores.shape != (b, count):
        raise UserError(
            f"mrdd: scores must have shape {(b, count)} for views of shape {tuple(images.shape)}; given: "
            f"{tuple(scores.shape)}."
        )
    order = scores.argsort(1)
    hidden, kept = order[:, : int(ratio * count)], order[:, int(ratio * count) :]
    drop = torch.zeros(b, count, dtype=torch.bool, device=images.device).scatter_(1, hidden, True)
    drop = drop.view(b, 1, h // patch, w // patch).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    patches = (
        images.view(b, channels, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1).reshape(b, count, -1)
    )
    return images.masked_fill(drop, 0.0), patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))


def sample_code(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """mu + exp(logvar / 2) noise; all (B, D)."""
    return mean + (0.5 * log_variance).exp() * noise


@full_precision
def reconstruction(targets: Sequence[Tensor], rebuilt: Sequence[Tensor], reduction: Reduction = "sum") -> Tensor:
    """The squared error summed over views, channels and pixels, and over the batch (`sum`) or averaged over it
    (`sample`); a scalar."""
    for t, r in zip(targets, rebuilt, strict=True):
        if t.shape != r.shape:
            raise UserError(
                f"mrdd: a view of shape {tuple(t.shape)} was rebuilt with shape {tuple(r.shape)}; they must be equal."
            )
    total = torch.stack([(t - r).square().sum() for t, r in zip(targets, rebuilt, strict=True)]).sum()
    return total if reduction == "sum" else total / len(targets[0])


@full_precision
def kl_per_dimension(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), mean over the batch: (B, D) twice -> (D,), nats."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean(0)


def variational_loss(
    targets: Sequence[Tensor],
    rebuilt: Sequence[Tensor],
    mean: Tensor,
    log_variance: Tensor,
    alpha: float = 1.0,
    kl_weight: float = 1.0,
    reduction: Reduction = "sum",
) -> dict[str, Tensor]:
    """alpha * reconstruction + kl_weight * KL, as two terms: L_c of stage 1 (all views), and L_r of stage 2 (one view).

    Args:
        targets: the unmasked views, each (B, C, H, W).
        rebuilt: what the decoders gave, of the same shapes.
        mean, log_variance: of the code, (B, D).
    """
    return {
        "reconstruction": alpha * reconstruction(targets, rebuilt, reduction),
        "kl": kl_weight * kl_per_dimension(mean, log_variance).sum(),
    }


class Estimator(nn.Module):
    """q(c | s) = N(m(s), diag exp l(s)), with l in (-1, 1): it measures how much of c can be predicted from s.

    Args:
        specific, consistent: dimensions of s and c.
        width: of the method; each of the two networks has a hidden layer of half of it.
    """

    def __init__(self, specific: int, consistent: int, width: int = 100) -> None:
        super().__init__()
        self.p_mu = nn.Sequential(nn.Linear(specific, width // 2), nn.ReLU(), nn.Linear(width // 2, consistent))
        self.p_logvar = nn.Sequential(
            nn.Linear(specific, width // 2), nn.ReLU(), nn.Linear(width // 2, consistent), nn.Tanh()
        )

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(B, specific) -> mean and log-variance of c, each (B, consistent)."""
        return self.p_mu(s), self.p_logvar(s)


@full_precision
def estimator_loss(mean: Tensor, log_variance: Tensor, c: Tensor) -> Tensor:
    """The negative log-likelihood of c under q, up to constants: mean over the batch of sum_d [(m - c)^2 / exp(l) + l];
    (B, D) three times -> scalar."""
    return ((mean - c).square() / log_variance.exp() + log_variance).sum(-1).mean()


@full_precision
def sampled_bound(mean: Tensor, log_variance: Tensor, c: Tensor, permutation: Tensor) -> Tensor:
    """The sampled upper bound of I(c; s) in nats (vCLUB): c_i against c_perm(i); an upper bound only as far as q fits,
    and it may be negative.

    Args:
        mean, log_variance, c: (B, D).
        permutation: (B,) indices.

    Raises:
        UserError: a batch of one, of which every permutation is the identity.
    """
    if len(c) < 2:
        raise UserError("mrdd: the bound of the information compares samples, so a batch must hold at least two.")
    precision = (-log_variance).exp()
    return 0.5 * (((mean - c[permutation]).square() - (mean - c).square()) * precision).sum(-1).mean()


@full_precision
def full_bound(mean: Tensor, log_variance: Tensor, c: Tensor) -> Tensor:
    """The same bound with every c_j in place of one: (B, D) three times -> scalar.

    mean_j (m - c_j)^2 = (m - mean c)^2 + var c.
    """
    others = (mean - c.mean(0)).square() + c.var(0, unbiased=False)
    return 0.5 * ((others - (mean - c).square()) * (-log_variance).exp()).sum(-1).mean()
