"""Relations of queries, keys and values, their distance to the teacher's, and the training of all sub-networks by it
(AutoDistil, equation 4 and section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.functional.relations import relation_heads, relation_scores
from stillhouse.methods.language.autodistil.networks import ATTENTION, LAYER, SuperNet
from stillhouse.methods.language.autodistil.space import SubNet, drawn
from stillhouse.signals import Batch, Taps, call_model, evaluating, to_device
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

Kind = Literal["scores", "softmax"]
Padding = Literal["left_out", "counted"]
MASKED = -1e4  # added to padded keys, as published; it fits into half precision


@full_precision
def relation(x: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(B, heads, L, L) scaled dot products of tokens with each other, head by head.

    Args:
        x: (B, L, D) queries, keys or values of all attention heads; the last D mod heads features are left out.
        heads: relation heads, of which D must hold at least one feature each.
        mask: (B, L) 1 where a token is real; -10,000 is added to the others' columns.

    Raises:
        UserError: more heads than features.
    """
    width = x.shape[-1]
    if heads > width:
        raise UserError(f"relation.heads: {heads} relation heads cannot be cut from {width} features; lower it.")
    parts = relation_heads(x[..., : width - width % heads].contiguous(), heads)
    scores = relation_scores(parts, parts)
    return scores if mask is None else scores + MASKED * (1 - mask[:, None, None, :].to(scores))


@full_precision
def relation_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    kind: Kind = "scores",
    mask: Tensor | None = None,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """The mean squared differences of relations, summed over queries, keys and values.

    Args:
        student: three relations (B, A, L, L), as `relation` gives them.
        teacher: the same of the teacher; detached.
        kind: scores: of the scaled dot products (released code); softmax: of their softmax over keys (equation 4),
            whose gradients are smaller by about 1 / L^2.
        mask: (B, L): pairs with a padded token are left out of the mean; None: all pairs count, as published.
        weights: of queries, keys and values.

    Raises:
        UserError: different shapes.
    """
    if any(s.shape != t.shape for s, t in zip(student, teacher, strict=True)):
        raise UserError(
            f"Relations of shape {tuple(student[0].shape)} and {tuple(teacher[0].shape)} (batch, heads, tokens, tokens)"
            " cannot be compared; give both networks the same relation heads and the same tokens."
        )
    pairs = None
    if mask is not None:
        real = mask.to(student[0])
        pairs = (real[:, :, None] * real[:, None, :])[:, None]
    total = student[0].new_zeros(())
    for s, t, weight in zip(student, teacher, weights, strict=True):
        s, t = (s, t.detach()) if kind == "scores" else (s.softmax(-1), t.detach().softmax(-1))
        squares = (s - t).square()
        if pairs is None:
            total = total + weight * squares.mean()
        else:
            total = total + weight * (squares * pairs).sum() / (pairs.sum() * s.shape[1]).clamp_min(1)
    return total


class RelationTeacher:
    """The relations of a frozen encoder's last layer.

    Args:
        model: of transformers, whole or its encoder.
        heads: relation heads; None: its attention heads.
    """

    def __init__(self, model: nn.Module, heads: int | None = None) -> None:
        base: Any = model.base_model
        self.model, self.heads = base.eval().requires_grad_(False), heads or base.config.num_attention_heads
        last = f"{LAYER}{base.config.num_hidden_layers - 1}.{ATTENTION}"
        self._names = [last + part for part in ("query", "key", "value")]
        self._taps = Taps(base, self._names, "teacher")

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[Tensor]:
        """Three relations (B, heads, L, L)."""
        with self._taps.capture() as got:
            call_model(self.model, batch)
        mask = batch["input"].get("attention_mask")
        return [relation(got[name], self.heads, mask) for name in self._names]


class Sandwich(TrainingModule):
    """All sub-networks of a space, trained by the teacher's relations: each step the largest, the smallest, and some
    drawn by the step.

    Args:
        student: the shared weights.
        nets: the space's sub-networks, sorted.
        teacher: gives the relations.
        kind, padding, weights: see `relation_distance`.
        between: how many are drawn a step besides the largest and the smallest.
        offset: added to the step in the draw: another for each seed.
    """

    student: SuperNet

    def __init__(
        self,
        student: SuperNet,
        nets: Sequence[SubNet],
        teacher: RelationTeacher,
        kind: Kind = "scores",
        padding: Padding = "left_out",
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        between: int = 2,
        offset: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.nets, self._teacher = student, list(nets), [teacher]
        self.kind, self.padding, self.weights, self.between, self.offset = (
            kind,
            padding,
            tuple(weights),
            between,
            offset,
        )
        drawn(len(nets), 0, between)  # a space that is too small is refused here

    def distance(self, net: SubNet, batch: Batch, targets: Sequence[Tensor]) -> Tensor:
        """`relation_distance` of one sub-network."""
        mask, heads = batch["input"].get("attention_mask"), self._teacher[0].heads
        mine = [relation(x, heads, mask) for x in self.student.queries_keys_values(net, batch["input"])]
        return relation_distance(mine, targets, self.kind, mask if self.padding == "left_out" else None, self.weights)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        targets = self._teacher[0](batch)
        chosen = drawn(len(self.nets), progress.step + self.offset, self.between)
        parts = [self.distance(self.nets[i], batch, targets) for i in chosen]
        return {"loss": torch.stack(parts).sum(), "largest": parts[0], "smallest": parts[1]}

    def judged(self, nets: Sequence[SubNet], batches: Iterable[Batch], device: torch.device) -> list[float]:
        """The mean distance of each sub-network over batches."""
        sums, count = torch.zeros(len(nets), dtype=torch.double), 0
        with evaluating(self):
            for batch in batches:
                on_device = to_device(dict(batch), device)
                targets = self._teacher[0](on_device)
                found = torch.stack([self.distance(net, on_device, targets) for net in nets])
                sums += found.double().cpu()
                count += 1
        return (sums / max(count, 1)).tolist()
