"""MI-alpha: a lower bound on the mutual information of teacher and student states (Distiller, section 3.2), after the
interpolated bound of Poole et al. (arXiv 1905.06922), and the critics that score pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_features import check_mask


@full_precision
def log_mean_of_others(scores: Tensor) -> Tensor:
    """(B, B): entry [i, j] is the log of the mean of exp(scores[i, k]) over k other than j.

    By sums from both ends, so that nothing is subtracted: exact also where one score dominates.
    """
    b = len(scores)
    none = scores.new_full((b, 1), -math.inf)
    before = torch.cat([none, scores.logcumsumexp(1)[:, :-1]], 1)
    after = torch.cat([scores.flip(1).logcumsumexp(1).flip(1)[:, 1:], none], 1)
    return torch.logaddexp(before, after) - math.log(b - 1)


@full_precision
def mi_alpha_bound(scores: Tensor, log_baseline: Tensor, alpha: float) -> Tensor:
    """The bound I, a scalar to be maximised: low variance and bias towards alpha 1 (at most log(B - 1)), the reverse
    towards 0.

    Args:
        scores: (B, B), entry [i, j] for student i and teacher j.
        log_baseline: (B,), log q of each teacher state.
        alpha: share of the mean of the other scores; the rest is the baseline's.

    Raises:
        UserError: a batch of one, or alpha outside [0, 1].
    """
    b = len(scores)
    if b < 2:
        raise UserError("MI-alpha compares the samples of a batch with each other, but this batch holds one; raise it.")
    if not 0 <= alpha <= 1:
        raise UserError(f"MI-alpha: alpha must be from 0 to 1; given: {alpha}.")
    baseline = log_baseline[:, None].expand(b, b)
    if alpha == 0:
        mixed = baseline
    elif alpha == 1:
        mixed = log_mean_of_others(scores)
    else:
        mixed = torch.logaddexp(math.log(alpha) + log_mean_of_others(scores), math.log1p(-alpha) + baseline)
    others = ~torch.eye(b, dtype=torch.bool, device=scores.device)
    pairs = b * (b - 1)
    joint = ((scores.diagonal()[:, None] - mixed) * others).sum() / pairs
    apart = (scores - mixed.diagonal()[:, None]).masked_fill(~others, -math.inf)
    return 1 + joint - apart.exp().sum() / pairs


def tower(width: int, hidden: int, out: int) -> nn.Sequential:
    """Three linear layers with ReLU between."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


class FirstTokenCritic(nn.Module):
    """Scores of pairs by inner products of towers on token 0, and the log-baseline of a teacher state.

    Args:
        student, teacher: widths.
        hidden, out: of the towers.
    """

    def __init__(self, student: int, teacher: int, hidden: int = 512, out: int = 64) -> None:
        super().__init__()
        self.student, self.teacher = tower(student, hidden, out), tower(teacher, hidden, out)
        self.baseline = tower(teacher, hidden, 1)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, B) and log-baseline (B,) of states (B, L, D)."""
        s, t = student[:, 0], teacher[:, 0]
        return self.student(s) @ self.teacher(t).T, self.baseline(t)[:, 0]


class SequenceTower(nn.Module):
    """A small Transformer encoder over tokens with sinusoidal positions, (B, L, D) to (B, L, out).

    Args:
        width: D; `heads` must divide it.
        layers, heads, feed_forward, out: of the encoder.
    """

    def __init__(self, width: int, layers: int = 2, heads: int = 8, feed_forward: int = 512, out: int = 16) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"critic.heads: {heads} heads do not divide a state's width of {width}; choose a divisor.")
        layer = nn.TransformerEncoderLayer(width, heads, feed_forward, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.last = nn.Linear(width, out)
        self.width = width

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        places = positions(states.shape[1], self.width).to(states)
        found = self.encoder(states + places, src_key_padding_mask=mask == 0)
        return self.last(found * math.sqrt(self.width))


def positions(length: int, width: int) -> Tensor:
    """(L, D) sines and cosines of Vaswani et al."""
    at = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    out = torch.zeros(length, width)
    out[:, 0::2], out[:, 1::2] = at.sin(), at.cos()[:, : width // 2]
    return out


class SequenceCritic(nn.Module):
    """Scores of pairs by whole sequences: the encoded real tokens of each, as one unit vector, times a learned scale,
    without which scores in [-1, 1] would bound the information. [R] The released code mixes up its axes, so that its
    scores are of positions; this is what it evidently means.

    Args:
        student, teacher: widths.
        layers, heads, feed_forward, out: of the encoders.
    """

    def __init__(
        self, student: int, teacher: int, layers: int = 2, heads: int = 8, feed_forward: int = 512, out: int = 16
    ) -> None:
        super().__init__()
        self.student = SequenceTower(student, layers, heads, feed_forward, out)
        self.teacher = SequenceTower(teacher, layers, heads, feed_forward, out)
        self.baseline = SequenceTower(teacher, layers, heads, feed_forward, 1)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        real = check_mask(mask).to(student)[..., None]
        s = F.normalize((self.student(student, mask) * real).flatten(1), dim=-1)
        t = F.normalize((self.teacher(teacher, mask) * real).flatten(1), dim=-1)
        log_baseline = (self.baseline(teacher, mask) * real).sum((1, 2)) / real.sum((1, 2))
        return self.scale * (s @ t.T), log_baseline
