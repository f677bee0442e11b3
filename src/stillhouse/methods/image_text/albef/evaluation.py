"""Figures of a network with a fusion: retrieval whose best candidates are ranked again by matching; masked words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.evaluation.image_text import RANKS, recall_by_scores
from stillhouse.models.fusion import FusedEncoders
from stillhouse.signals import Batch, evaluating, to_device

CHUNK = 256
"""Pairs that are read together."""


@dataclass
class Collected:
    """A split as the network reads it, on the CPU.

    Attributes:
        image_tokens: (N, 1 + P, W).
        image: (N, D) unit embeddings.
        text_tokens: (T, L, W').
        text: (T, D) unit embeddings.
        ids, inside: (T, L).
        label, text_label: (N,) and (T,).
    """

    image_tokens: Tensor
    image: Tensor
    text_tokens: Tensor
    text: Tensor
    ids: Tensor
    inside: Tensor
    label: Tensor
    text_label: Tensor

    def own_text(self) -> Tensor:
        """(N,) for each image the first text of its id; -1 where there is none."""
        same = self.label[:, None] == self.text_label[None, :]
        return torch.where(same.any(1), same.to(torch.uint8).argmax(1), -1)


@torch.no_grad()
def collected(
    net: FusedEncoders, batches: Iterable[Batch], device: torch.device, context: int, pad: int, most: int | None = None
) -> Collected:
    """The first `most` images of a split with the texts of their batches."""
    rows: dict[str, list[Tensor]] = {name: [] for name in Collected.__dataclass_fields__}
    count = 0
    with evaluating(net):
        for batch in batches:
            given = to_device(batch, device)["input"]
            seen = net.image_tokens(given["pixel_values"])
            found: dict[str, Tensor] = {
                "image_tokens": seen,
                "image": F.normalize(net.visual_projection(seen[:, 0]).float(), dim=-1),
            }
            if "input_ids" in given and len(given["input_ids"]):
                room = context - given["input_ids"].shape[1]
                ids, inside = F.pad(given["input_ids"], (0, room), value=pad), F.pad(given["attention_mask"], (0, room))
                read = net.text_tokens(ids, inside)
                found |= {"text_tokens": read, "text": F.normalize(net.text_projection(read[:, 0]).float(), dim=-1)}
                found |= {"ids": ids, "inside": inside}
                found["text_label"] = batch["text_label"] if "text_label" in batch else batch["label"]
            found["label"] = batch["label"]
            for name, value in found.items():
                rows[name].append(value.cpu())
            count += len(seen)
            if most is not None and count >= most:
                break
    return Collected(**{name: torch.cat(parts) for name, parts in rows.items()})


@torch.no_grad()
def match_scores(net: FusedEncoders, all_of: Collected, texts: Tensor, images: Tensor, device: torch.device) -> Tensor:
    """(n,) the matching score of pairs, positions of texts and of images (n,): the logit of belonging together."""
    found = []
    for t, i in zip(torch.split(texts, CHUNK), torch.split(images, CHUNK)):
        parts = (all_of.text_tokens[t], all_of.inside[t], all_of.image_tokens[i])
        found.append(net.match(net.fused(*(x.to(device) for x in parts)))[:, 1].float().cpu())
    return torch.cat(found)


def ranked_again(net: FusedEncoders, all_of: Collected, best: int, device: torch.device) -> dict[str, float]:
    """Retrieval both ways where the `best` candidates by cosine are ranked by matching: `matched_image_to_text_r1`,
    …, `matched_text_to_image_r10`."""
    out: dict[str, float] = {}
    cosines = all_of.image @ all_of.text.T
    with evaluating(net):
        for name, near, ids, theirs in (
            ("image_to_text", cosines, all_of.label, all_of.text_label),
            ("text_to_image", cosines.T, all_of.text_label, all_of.label),
        ):
            top = near.topk(min(best, near.shape[1]), dim=1).indices
            queries = torch.arange(len(near)).repeat_interleave(top.shape[1])
            pair = (top.flatten(), queries) if name == "image_to_text" else (queries, top.flatten())
            scores = torch.full_like(near, -torch.inf)
            found = match_scores(net, all_of, *pair, device)
            scores.scatter_(1, top, found.view_as(top))
            values = recall_by_scores(scores, ids, theirs)
            out |= {f"matched_{name}_r{rank}": value for rank, value in zip(RANKS, values)}
    return out


def matching_accuracy(net: FusedEncoders, all_of: Collected, device: torch.device) -> dict[str, float]:
    """`matching_accuracy`: of each image with its own text, and with the next text in order that is another's."""
    own = all_of.own_text()
    images = torch.nonzero(own >= 0)[:, 0]
    other = (all_of.text_label[None, :] != all_of.label[images, None]).to(torch.uint8)
    shifted = torch.stack([row.roll(-int(o)) for row, o in zip(other, own[images])])
    wrong = (shifted.argmax(1) + own[images]) % len(all_of.text_label)
    with evaluating(net):
        yes, no = (_belongs(net, all_of, texts, images, device) for texts in (own[images], wrong))
    return {"matching_accuracy": (yes.double().mean().item() + (~no).double().mean().item()) / 2}


@torch.no_grad()
def _belongs(net: FusedEncoders, all_of: Collected, texts: Tensor, images: Tensor, device: torch.device) -> Tensor:
    found = []
    for t, i in zip(torch.split(texts, CHUNK), torch.split(images, CHUNK)):
        parts = (all_of.text_tokens[t], all_of.inside[t], all_of.image_tokens[i])
        found.append(net.match(net.fused(*(x.to(device) for x in parts))).argmax(1).bool().cpu())
    return torch.cat(found)


def telling(all_of: Collected, special: Iterable[int]) -> Tensor:
    """(T, L) true where a token tells texts apart: no special one, and in fewer than half of the texts."""
    every = all_of.ids.masked_fill(~all_of.inside.bool(), -1)
    distinct = torch.unique(every, dim=0)
    size = int(all_of.ids.max()) + 1
    counts = torch.zeros(size)
    for row in distinct:
        counts[torch.unique(row[row >= 0])] += 1
    rare = counts < len(distinct) / 2
    rare[[i for i in special if i < size]] = False
    return rare[all_of.ids] & all_of.inside.bool()


@torch.no_grad()
def masked_words(
    net: FusedEncoders, all_of: Collected, mask: int, special: Iterable[int], device: torch.device
) -> dict[str, float]:
    """Every token that tells texts apart, masked alone in the text of each image: `masked_accuracy`, how often it is
    found, and `masked_probability`, that of the right one, on average."""
    own, tells = all_of.own_text(), telling(all_of, special)
    images = torch.nonzero(own >= 0)[:, 0]
    row, place = torch.nonzero(tells[own[images]], as_tuple=True)
    if not len(row):
        return {}
    right, sure = [], []
    with evaluating(net):
        for r, p in zip(torch.split(row, CHUNK), torch.split(place, CHUNK)):
            text, image = own[images[r]], images[r]
            ids, inside = all_of.ids[text].clone(), all_of.inside[text]
            at = torch.arange(len(r))
            true = ids[at, p]
            ids[at, p] = mask
            inside = inside.to(device)
            fused = net.fused(net.text_tokens(ids.to(device), inside), inside, all_of.image_tokens[image].to(device))
            probs = net.words(fused[at.to(device), p.to(device)]).float().softmax(-1).cpu()
            right.append(probs.argmax(-1) == true)
            sure.append(probs[at, true])
    return {
        "masked_accuracy": torch.cat(right).double().mean().item(),
        "masked_probability": torch.cat(sure).double().mean().item(),
    }
