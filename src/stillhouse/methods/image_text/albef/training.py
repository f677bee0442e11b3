"""One step of ALBEF: contrast, matching and masked words, under a momentum network with queues."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.gather import gather
from stillhouse.methods.image_text.albef.losses import (
    Contrast,
    MaskedWords,
    contrast,
    drawn,
    mask_words,
    masked_places,
    masked_word_loss,
    matching_loss,
    negative_weights,
    right_keys,
)
from stillhouse.models.fusion import FusedEncoders
from stillhouse.processes import rank_world
from stillhouse.signals import Batch, Signals
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

COLDEST, WARMEST = 0.001, 0.5
NOBODY = -100
"""Id of a place of the queue that nothing was put into yet."""


@dataclass(frozen=True)
class Terms:
    """What a step consists of.

    Attributes:
        alpha: share of the momentum network's answers in the targets of contrast, after the ramp.
        alpha_words: likewise of masked words.
        contrast, matching, words: weights of the three losses.
        targets: ids: samples of one id are right for each other; pairs: each for itself alone.
        negatives: hard: by the similarity; random: uniform.
        random_until: epochs in which they are random before they are hard.
        mask_share: of the words that are masked.
        ramp: epochs over which both alphas rise from 0.
    """

    alpha: float = 0.4
    alpha_words: float = 0.4
    contrast: float = 1.0
    matching: float = 1.0
    words: float = 1.0
    targets: Literal["ids", "pairs"] = "pairs"
    negatives: Literal["hard", "random"] = "hard"
    random_until: float = 0.0
    mask_share: float = 0.15
    ramp: float = 1.0

    def risen(self, progress: Progress) -> float:
        """How much of the alphas there is by now, in [0, 1]."""
        return min(1.0, progress.exact_epoch / self.ramp) if self.ramp else 1.0

    def hard(self, progress: Progress) -> bool:
        """Whether negatives are drawn by the similarity by now."""
        return self.negatives == "hard" and progress.exact_epoch >= self.random_until


class Negatives:
    """For each text an image, and for each image a text, that do not belong to it: positions in the batch.

    Attributes:
        image, text: (B,).
        there: (B,) 0 where the batch holds none.
    """

    def __init__(self, image: Tensor, text: Tensor, there: Tensor) -> None:
        self.image, self.text, self.there = image, text, there


class FusionTraining(TrainingModule):
    """The network, its exponential moving average, and queues of the average's embeddings.

    The average follows after each step of the optimiser, which is before the next one's use of it; it stays in
    evaluation mode, without dropout. Average and queues are part of the checkpoint.

    Args:
        student: the network.
        terms: losses and their settings.
        queue: embeddings in each queue; 0: none.
        momentum: what of the average stays in a step.
        begin, mask: ids of the token that a text begins with, and of the mask.
    """

    student: FusedEncoders
    image_queue: Tensor
    text_queue: Tensor
    id_queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        student: FusedEncoders,
        terms: Terms | None = None,
        queue: int = 65536,
        momentum: float = 0.995,
        begin: int = 101,
        mask: int = 103,
    ) -> None:
        super().__init__()
        self.student, self.terms, self.momentum = student, terms or Terms(), momentum
        self.average = copy.deepcopy(student).requires_grad_(False).eval()
        self._marks = begin, mask
        dim = student.visual_projection.out_features
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(queue, dim), dim=-1))
        self.register_buffer("id_queue", torch.full((queue,), NOBODY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> FusionTraining:
        """As `nn.Module.train`; the average stays in evaluation mode."""
        super().train(mode)
        self.average.eval()
        return self

    def build(self, batch: Batch) -> None:
        texts = batch["input"].get("input_ids") if isinstance(batch["input"], Mapping) else None
        if texts is None or len(texts) != len(batch["label"]):
            raise UserError("albef: every image needs one text.")

    # ---- the step ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        given, terms, net = batch["input"], self.terms, self.student
        images, ids, inside = given["pixel_values"], given["input_ids"], given["attention_mask"]
        if len(images) < 2:
            raise UserError("albef: a batch needs two pairs at least, as negatives are drawn from it.")
        with torch.no_grad():
            net.temperature.clamp_(COLDEST, WARMEST)
        risen = terms.risen(progress)
        seen, read = net.image_tokens(images), net.text_tokens(ids, inside)
        their_image = self.their_image_tokens(images)
        found = self.contrasted(seen, read, their_image, ids, inside, batch["label"], terms.alpha * risen)
        negatives = self.negatives(found, batch["label"], terms.hard(progress))
        out = {"contrast": found.loss, "matching": self.matched(seen, read, inside, negatives)}
        if terms.words:
            masked = mask_words(ids, inside, *self._marks, net.word_head.bias.numel(), terms.mask_share)
            out["words"] = self.masked(seen, their_image, inside, masked, terms.alpha_words * risen)
        weights = {"contrast": terms.contrast, "matching": terms.matching, "words": terms.words}
        return {"loss": torch.stack([weights[k] * v for k, v in out.items()]).sum(), **out}

    @torch.no_grad()
    def their_image_tokens(self, images: Tensor) -> Tensor:
        """(B, 1 + N, W) of the momentum network."""
        return self.average.image_tokens(images)

    def contrasted(
        self, seen: Tensor, read: Tensor, their_image: Tensor, ids: Tensor, inside: Tensor, label: Tensor, alpha: float
    ) -> Contrast:
        """The contrastive loss of the batches of all processes, whose momentum embeddings then go into the queues."""
        net = self.student
        image, text = net.visual_projection(seen[:, 0]), net.text_projection(read[:, 0])
        image, text = (gather(F.normalize(x.float(), dim=-1)) for x in (image, text))
        with torch.no_grad():
            theirs = (
                self.average.visual_projection(their_image[:, 0]),
                self.average.text_projection(self.average.text_tokens(ids, inside)[:, 0]),
            )
            their_image, their_text = (gather(F.normalize(x.float(), dim=-1)) for x in theirs)
            own = gather(label)
            if self.terms.targets == "pairs":
                own = torch.arange(len(own), device=own.device)
            queued = self.id_queue if self.terms.targets == "ids" else torch.full_like(self.id_queue, NOBODY)
            right = right_keys(own, torch.cat([own, queued]))
            images, texts = torch.cat([their_image, self.image_queue]), torch.cat([their_text, self.text_queue])
        found = contrast(image, text, their_image, their_text, images, texts, right, net.temperature, alpha)
        self.enqueue(their_image, their_text, own)
        return found

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Put embeddings (B, e) and ids (B,) in the place of the oldest.

        Raises:
            UserError: a batch that is larger than the queue.
        """
        size = len(self.id_queue)
        if not size:
            return
        if len(ids) > size:
            raise UserError(f"albef: the queue holds {size}, but a batch of all processes has {len(ids)} samples.")
        places = (self.pointer + torch.arange(len(ids), device=ids.device)) % size
        for queue, new in ((self.image_queue, image), (self.text_queue, text), (self.id_queue, ids)):
            queue.index_copy_(0, places, new.to(queue.dtype))
        self.pointer.copy_((self.pointer + len(ids)) % size)

    @torch.no_grad()
    def negatives(self, found: Contrast, label: Tensor, hard: bool = True) -> Negatives:
        """Drawn within this process's batch by the similarities, or uniformly, among what does not belong together."""
        allowed = self.apart(label)
        image, text = (drawn(weights, allowed) for weights in self.weights(found, allowed, hard))
        return Negatives(image, text, allowed.any(1))

    def apart(self, label: Tensor) -> Tensor:
        """(B, B): which images and texts of a batch do not belong together."""
        if self.terms.targets == "ids":
            return label[:, None] != label[None, :]
        return ~torch.eye(len(label), dtype=torch.bool, device=label.device)

    def weights(self, found: Contrast, allowed: Tensor, hard: bool = True) -> tuple[Tensor, Tensor]:
        """(B, B) twice: how likely each image is the negative of a text, and each text that of an image."""
        start = rank_world()[0] * len(allowed)
        here = slice(start, start + len(allowed))
        rows = [x.detach()[here, here] for x in (found.text_to_image, found.image_to_text)]
        if not hard:
            rows = [torch.zeros_like(x) for x in rows]
        return negative_weights(rows[0], allowed), negative_weights(rows[1], allowed)

    def matched(self, seen: Tensor, read: Tensor, inside: Tensor, negatives: Negatives) -> Tensor:
        """The matching loss of the pairs, each text with its negative image, and each image with its negative text."""
        scores = self.student.match(self.read_pairs(seen, read, inside, negatives))
        return matching_loss(scores[: len(seen)], scores[len(seen) :], negatives.there.repeat(2))

    def read_pairs(self, seen: Tensor, read: Tensor, inside: Tensor, negatives: Negatives) -> Tensor:
        """(3B, L, W) of the fusion: the pairs, the texts with their negative images, the images with their negative
        texts."""
        texts = torch.cat([read, read, read[negatives.text]])
        masks = torch.cat([inside, inside, inside[negatives.text]])
        return self.student.fused(texts, masks, torch.cat([seen, seen[negatives.image], seen]))

    def masked(self, seen: Tensor, their_image: Tensor, inside: Tensor, masked: MaskedWords, alpha: float) -> Tensor:
        """The loss of masked words; both networks read the same masked texts."""
        at = masked_places(masked.labels, self.terms.mask_share)
        labels = masked.labels.flatten()[at]

        def scores(net: FusedEncoders, image: Tensor) -> Tensor:
            fused = net.fused(net.text_tokens(masked.ids, inside), inside, image)
            return net.words(fused.flatten(0, 1)[at])

        theirs = None
        if alpha:
            with torch.no_grad():
                theirs = scores(self.average, their_image)
        return masked_word_loss(scores(self.student, seen), labels, theirs, alpha)

    def after_step(self, batch: Batch, progress: Progress, stepped: bool) -> None:
        if stepped:
            self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the network: its parameters, not its buffers."""
        own = [p.data for p in self.average.parameters()]
        torch._foreach_lerp_(own, [p.data for p in self.student.parameters()], 1 - self.momentum)

    def read_student(self, batch: Batch) -> Signals:
        given: Any = batch["input"]
        image = F.normalize(self.student.get_image_features(given["pixel_values"]), dim=-1)
        return Signals(embedding=image, parts={"image": image})
