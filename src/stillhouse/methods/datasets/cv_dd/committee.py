"""The committee's mathematics (CV-DD, arXiv 2501.07575): who votes and with what weight, the weighted recovery loss,
and batch-specific soft labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.recovery import BatchNormStatistics, statistics_loss
from stillhouse.randomness import generator
from stillhouse.signals import evaluating
from stillhouse.synthetic.relabel import Views, running_logits


def vote_weights(priors: Sequence[float], temperature: float = 5.0) -> Tensor:
    """softmax(prior / temperature), (members,) float64.

    Args:
        priors: accuracies in percent.

    Raises:
        UserError: fractions (all at most 1), which would make every vote equal, or numbers outside 0 to 100.
    """
    if any(not 0 <= p <= 100 for p in priors) or (len(priors) > 1 and max(priors) <= 1):
        raise UserError(
            f"priors are accuracies in percent, from 0 to 100; given: {', '.join(f'{p:g}' for p in priors)}."
        )
    return torch.softmax(torch.tensor(list(priors), dtype=torch.float64) / temperature, 0)


def chosen(slot: int, members: int, voters: int, how: str, priors: Sequence[float], seed: int) -> tuple[int, ...]:
    """The members that vote on the image of this number: the pairs in order, a random pair, or those with the best
    priors; one voter is the first."""
    if voters == 1:
        return (0,)
    if how == "best":
        return tuple(sorted(sorted(range(members), key=lambda m: -priors[m])[:voters]))
    every = list(itertools.combinations(range(members), voters))
    at = (
        slot if how == "in_turn" else int(torch.randint(0, len(every), (1,), generator=generator(seed, "voters", slot)))
    )
    return every[at % len(every)]


def medium_first(count: int) -> list[int]:
    """Ranks (from 0, ascending) from the middle outwards: m = ceil(count / 2), then m + 1, m - 1, m + 2, … (DELT's
    rule; rank 0 of an even count comes last)."""
    middle = math.ceil(count / 2)
    order = [middle, *(at for d in range(1, count + 1) for at in (middle + d, middle - d))]
    return [at for at in order if 0 <= at < count]


def committee_loss(
    networks: Sequence[nn.Module],
    statistics: Sequence[BatchNormStatistics],
    weights: Sequence[float],
    x: Tensor,
    labels: Tensor,
    r_bn: float,
    first: float = 10.0,
) -> dict[str, Tensor]:
    """sum_m w_m (CE(f_m(x), y) + r_bn (first r_m1 + the other r_ml)) as `loss`, with the weighted parts; x (B, C, H,
    W), labels (B,)."""
    ce = torch.stack([w * F.cross_entropy(network(x).float(), labels) for w, network in zip(weights, networks)]).sum()
    bn = torch.stack([w * statistics_loss(s.distances(), first) for w, s in zip(weights, statistics)]).sum()
    return {"loss": ce + r_bn * bn, "ce": ce, "bn": bn}


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, only batch norms are in training mode, so that they see the batch, and their running statistics stay as
    they were; no gradients."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m, m.track_running_stats, m.running_mean, m.running_var) for m in layers]
    with evaluating(network):
        for m in layers:
            m.track_running_stats, m.running_mean, m.running_var = False, None, None
        try:
            yield
        finally:
            for m, track, mean, var in kept:
                m.track_running_stats, m.running_mean, m.running_var = track, mean, var


def batch_labels(networks: Sequence[nn.Module], weights: Sequence[float], x: Tensor) -> Tensor:
    """Batch-specific soft labels: logits (B, classes) of both halves of a batch by their own statistics, weighted over
    networks.

    The halves are the first B // 2 images and the rest; an empty one is left out.
    """
    parts: list[Tensor] = []
    for w, network in zip(weights, networks):
        with batch_statistics(network):
            halves = [half for half in (x[: len(x) // 2], x[len(x) // 2 :]) if len(half)]
            try:
                parts.append(w * torch.cat([network(half).float() for half in halves]))
            except ValueError as error:  # torch's refusal of one value a channel
                raise UserError(
                    f"A half batch of {len(halves[0])} images has no statistics in this network ({error}); take a "
                    "larger relabel.batch_size."
                ) from None
    return torch.stack(parts).sum(0)


def relabelled(
    networks: Sequence[nn.Module], weights: Sequence[float], images: Tensor, made: Views, statistics: str
) -> Tensor:
    """Logits (epochs, N, classes) in half precision of all views, by `batch` or `running` statistics."""
    out: Tensor | None = None
    for epoch in range(made.epochs):
        for x, rows in made.batches(images, epoch):
            logits = (
                batch_labels(networks, weights, x)
                if statistics == "batch"
                else weighted_running_logits(networks, weights, x)
            )
            if out is None:
                out = torch.zeros(made.epochs, len(images), logits.shape[1], dtype=torch.float16)
            out[epoch, rows] = logits.half().cpu()
    assert out is not None
    return out


def weighted_running_logits(networks: Sequence[nn.Module], weights: Sequence[float], x: Tensor) -> Tensor:
    """Logits (B, classes) by the networks' own statistics, weighted."""
    return torch.stack([w * running_logits(network, x) for w, network in zip(weights, networks)]).sum(0)


def compared(networks: Sequence[nn.Module], weights: Sequence[float], images: Tensor, made: Views) -> dict[str, float]:
    """Batch-specific labels compared with those of the running statistics, over the first epoch of views.

    `views_agreement`: the share of views whose largest logit is the same; `confidence_batch`, `confidence_running`: the
    mean largest probability.
    """
    views = [x for x, _ in made.batches(images, 0)]
    batch = torch.cat([batch_labels(networks, weights, x) for x in views])
    running = torch.cat([weighted_running_logits(networks, weights, x) for x in views])
    return {
        "views_agreement": float((batch.argmax(1) == running.argmax(1)).double().mean()),
        "confidence_batch": float(batch.softmax(1).amax(1).mean()),
        "confidence_running": float(running.softmax(1).amax(1).mean()),
    }


@torch.no_grad()
def statistics_distance(network: nn.Module, x: Tensor, first: float = 10.0) -> float:
    """first r_1 + the other r_l of images (B, C, H, W) under a network in evaluation mode."""
    statistics = BatchNormStatistics(network)
    network(x)
    found = float(statistics_loss(statistics.distances(), first))
    statistics.close()
    return found
