"""Figures of networks that embed images and texts: zero-shot accuracy, of base and of new classes; retrieval both
ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import UserError, unknown
from stillhouse.signals import Batch, Signals

GROUPS = ("zero_shot", "retrieval")
RANKS = (1, 5, 10)


def harmonic(first: float, second: float) -> float:
    """The harmonic mean of two fractions; 0 where one of them is 0."""
    return 2 * first * second / (first + second) if first and second else 0.0


def base_and_new(logits: Tensor, labels: Tensor, new: Sequence[int]) -> dict[str, float]:
    """`accuracy_base`, `accuracy_new` and `accuracy_harmonic`: each half of the classes is judged on its own samples,
    among its own classes.

    Args:
        logits: (N, C).
        labels: (N,) class ids.
        new: ids of the classes that were not seen in training; the others are base.

    Raises:
        UserError: no samples of one of the two.
    """
    classes = range(logits.shape[1])
    found = {}
    for name, own in (("base", [c for c in classes if c not in set(new)]), ("new", sorted(set(new)))):
        ids = torch.tensor(own, dtype=torch.int64, device=labels.device)
        inside = torch.isin(labels, ids)
        if not inside.any():
            raise UserError(f"There are no samples of {name} classes to judge by.")
        predicted = ids[logits[inside][:, ids].argmax(-1)]
        found[f"accuracy_{name}"] = (predicted == labels[inside]).double().mean().item()
    return {**found, "accuracy_harmonic": harmonic(found["accuracy_base"], found["accuracy_new"])}


def recall(queries: Tensor, candidates: Tensor, query_ids: Tensor, ids: Tensor, chunk: int = 1024) -> list[float]:
    """Of queries (Q, D) among candidates (N, D), both unit: the share of queries that have a candidate of their own id
    among the 1, 5 and 10 nearest. A candidate as near as the right one counts as nearer, so that equal embeddings earn
    nothing.

    Args:
        query_ids, ids: (Q,) and (N,): a candidate is right for the queries of its id.
        chunk: queries compared at once, a bound on memory.
    """
    places = []
    for some, own in zip(torch.split(queries, chunk), torch.split(query_ids, chunk)):
        places.append(_places(some @ candidates.T, own[:, None] == ids[None, :]))
    return _shares(torch.cat(places))


def recall_by_scores(scores: Tensor, query_ids: Tensor, ids: Tensor) -> list[float]:
    """As `recall`, of scores (Q, N) of candidates, larger where they are nearer."""
    return _shares(_places(scores, query_ids[:, None] == ids[None, :]))


def _places(near: Tensor, right: Tensor) -> Tensor:
    """(Q,) how many wrong candidates are as near as the nearest right one, or nearer."""
    best = near.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((near >= best) & ~right).sum(1).masked_fill(~right.any(1), near.shape[1])


def _shares(place: Tensor) -> list[float]:
    return [(place < rank).double().mean().item() for rank in RANKS]


class ImageTextMeter:
    """Figures of a network with class vectors, as fractions.

    Args:
        groups: `zero_shot` gives `accuracy` (of the samples that have a class), and where there are classes that
            training did not see, `accuracy_base`, `accuracy_new` and `accuracy_harmonic`; `retrieval` gives
            `image_to_text_r1`, …, `text_to_image_r10`.
        classes: how many; a sample of another label has a caption, but no class.
        new: ids of the classes that training did not see.
    """

    def __init__(self, groups: Sequence[str], classes: int, new: Sequence[int] = ()) -> None:
        for group in groups:
            if group not in GROUPS:
                raise unknown("evaluation group", group, GROUPS)
        self.groups, self.classes, self.new = groups, classes, new
        self._rows: dict[str, list[Tensor]] = {k: [] for k in ("logits", "image", "text", "label", "text_label")}

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the embeddings of a batch with its `label` (B,), and those of its texts with their `text_label` (T,), by
        default the same."""
        label = batch["label"]
        found = {"logits": outputs.logits, "image": outputs.parts.get("image"), "text": outputs.parts.get("text")}
        found |= {"label": label, "text_label": batch.get("text_label", label)}
        for name, value in found.items():
            if value is not None and len(value):
                self._rows[name].append(value)

    def _all(self, name: str) -> Tensor | None:
        return torch.cat([x.cpu() for x in self._rows[name]]) if self._rows[name] else None

    def figures(self) -> dict[str, float]:
        """Figures of the groups."""
        label, logits = self._all("label"), self._all("logits")
        if label is None:
            raise UserError("There is nothing to evaluate on: the loader gave no batch.")
        out: dict[str, float] = {}
        known = (label >= 0) & (label < self.classes)
        if "zero_shot" in self.groups and logits is not None and known.any():
            logits, own = logits.float()[known], label[known]
            out["accuracy"] = (logits.argmax(-1) == own).double().mean().item()
            if self.new:
                out |= base_and_new(logits, own, self.new)
        image, text, text_label = self._all("image"), self._all("text"), self._all("text_label")
        if "retrieval" in self.groups and image is not None and text is not None and text_label is not None:
            image, text = image.float(), text.float()
            for name, values in (
                ("image_to_text", recall(image, text, label, text_label)),
                ("text_to_image", recall(text, image, text_label, label)),
            ):
                out |= {f"{name}_r{rank}": value for rank, value in zip(RANKS, values)}
        if not out:
            raise UserError("There is nothing to judge by: no sample has a class, and no figures of retrieval are on.")
        return out
