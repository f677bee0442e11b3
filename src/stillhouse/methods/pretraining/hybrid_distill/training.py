"""Hybrid Distill's training: frozen teachers as sources of features and relations, and the module that learns from
both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stillhouse.distillation.own_input import OwnInput
from stillhouse.errors import UserError
from stillhouse.evaluation.cost import times_in_turns
from stillhouse.functional.masking import take_tokens
from stillhouse.methods.pretraining.hybrid_distill.losses import (
    FeatureLoss,
    feature_loss,
    relations_loss,
    with_class_token,
)
from stillhouse.methods.pretraining.hybrid_distill.pruning import encode_pruned
from stillhouse.nn.masked_vit import check_blocks, check_grid, decay_groups, encode
from stillhouse.signals import Batch, Taps
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule


class Source:
    """A frozen teacher with its own input, which stays outside the module tree.

    Args:
        vit: in evaluation mode.
        prepare: turns the student's images into the teacher's.
        blocks: whose queries, keys and values are read.
    """

    def __init__(self, vit: VisionTransformer, prepare: OwnInput, blocks: Sequence[int] = ()) -> None:
        self.vit, self.prepare, self.blocks = vit, prepare, list(blocks)
        self._taps = Taps(vit, [f"blocks.{b}.attn.qkv" for b in blocks], owner="teacher")

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """(B, 1 + L, D) after the final norm."""
        return encode(self.vit, self.prepare.image(images)).tokens

    @torch.no_grad()
    def queries_keys_values(self, images: Tensor) -> list[Tensor]:
        """(B, 1 + L, 3 D) of each block; the teacher runs no further than the last."""
        with self._taps.capture() as found:
            encode(self.vit, self.prepare.image(images), None, [max(self.blocks)], stop=True)
        return [found[name] for name in self._taps.names]

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        self.vit.to(device)


class HybridTraining(TrainingModule):
    """Training module: the student, the layer that maps its tokens to the first teacher's, and two frozen teachers.

    Args:
        student: the encoder.
        contrastive: source of last features; None: no feature loss.
        masked: source of relations, with its blocks; None: no relation loss.
        blocks: of the student, one for each of the masked teacher's.
        heads: relation heads.
        counts: patches left before which blocks; {}: all stay.
        weights: of relations and features.
        loss: of the features.
        projection: map the student's tokens by a linear layer; without, widths must agree.

    Raises:
        UserError: teachers with other patches, a block that is not there, heads or widths that do not fit.
    """

    student: VisionTransformer

    def __init__(
        self,
        student: VisionTransformer,
        contrastive: Source | None,
        masked: Source | None,
        blocks: Sequence[int],
        heads: int,
        counts: dict[int, int],
        weights: tuple[float, float] = (1.0, 1.0),
        loss: FeatureLoss = "smooth_l1",
        projection: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.counts, self.heads = student, counts, heads
        self.relations_weight, self.features_weight = weights
        self.loss, self.blocks = loss, list(blocks)
        self._contrastive, self._masked = [contrastive], [masked]
        for source in (contrastive, masked):
            if source is not None:
                check_grid(student, source.vit)
        self.project: nn.Module = nn.Identity()
        if contrastive is not None and projection:
            self.project = nn.Linear(student.embed_dim, contrastive.vit.embed_dim)
        elif contrastive is not None and student.embed_dim != contrastive.vit.embed_dim:
            widths = f"{student.embed_dim} and {contrastive.vit.embed_dim}"
            raise UserError(f"features.projection: false needs a student as wide as its teacher; they have {widths}.")
        if masked is not None:
            check_blocks(blocks, len(student.blocks), "relations.student_blocks")
            check_blocks(masked.blocks, len(masked.vit.blocks), "relations.teacher_blocks")
            if len(blocks) != len(masked.blocks):
                counted = f"{len(blocks)} and {len(masked.blocks)}"
                raise UserError(f"relations: student_blocks and teacher_blocks must name as many; given: {counted}.")
        self._taps = Taps(student, [f"blocks.{b}.attn.qkv" for b in blocks] if masked else [], owner="student")

    def param_groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, vectors without."""
        return decay_groups(self)

    def build(self, batch: Batch) -> None:
        """Move the teachers to the student's device."""
        device = next(self.student.parameters()).device
        for source in (self._contrastive[0], self._masked[0]):
            if source is not None:
                source.to(device)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["input"]
        contrastive, masked = self._contrastive[0], self._masked[0]
        features = None if contrastive is None else contrastive.tokens(images)
        relations = [] if masked is None else masked.queries_keys_values(images)
        with self._taps.capture() as found:
            mine = encode_pruned(self.student, images, self.counts)
        terms: dict[str, Tensor] = {}
        total = mine.tokens.new_zeros(())
        for name, block, theirs in zip(self._taps.names, self.blocks, relations):
            for kind, value in relations_loss(found[name], theirs, mine.kept[block], self.heads).items():
                terms[kind] = terms[kind] + value if kind in terms else value
        if relations:
            total = total + self.relations_weight * (terms["qk"] + terms["vv"])
        if features is not None:
            wanted = take_tokens(features, with_class_token(mine.kept[-1]))
            terms["features"] = feature_loss(self.project(mine.tokens), wanted, self.loss)
            total = total + self.features_weight * terms["features"]
        return {"loss": total, **terms}


def step_times(module: HybridTraining, images: Tensor) -> dict[str, float]:
    """`step_ms`: milliseconds of a pre-training step without the optimiser; and where patches are dropped,
    `step_unpruned`: the same step with all patches, over that."""

    def step(counts: dict[int, int]) -> Callable[[], None]:
        def work() -> None:
            module.counts = counts
            module({"input": images}, Progress())["loss"].backward()
            module.zero_grad()

        return work

    counts = module.counts
    works = {"step": step(counts), **({"unpruned": step({})} if counts else {})}
    seconds = times_in_turns(works, images.device)
    module.counts = counts
    found = {"step_ms": 1000 * seconds["step"]}
    return {**found, "step_unpruned": seconds["unpruned"] / seconds["step"]} if counts else found
