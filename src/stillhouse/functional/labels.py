"""Labels as losses need them: class ids (B,), or soft labels (B, C) from mixup and smoothing."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.functional import checks


def is_soft(label: Tensor) -> bool:
    """Whether a label is a row of class weights, (B, C) floating, and not a class id."""
    return label.is_floating_point()


def check_label(name: str, label: Tensor, logits: Tensor) -> None:
    """Raise `UserError` for a label that does not fit logits (B, C): a wrong shape, or (where it is on the CPU) a class
    id out of range."""
    checks.one_prediction_a_sample(name, logits)
    rows, classes = logits.shape
    if is_soft(label):
        if label.shape != logits.shape:
            raise UserError(
                f"{name}: soft labels must have the logits' shape {(rows, classes)}; given: {tuple(label.shape)}."
            )
    elif label.shape != (rows,):
        raise UserError(
            f"{name}: labels must be class ids of shape ({rows},) or soft labels of shape {(rows, classes)}; given: "
            f"{label.dtype} {tuple(label.shape)}."
        )
    else:
        check_range(name, label, classes)


def check_range(name: str, label: Tensor, classes: int) -> None:
    """Raise `UserError` for a class id that is not from 0 to classes - 1, where labels are on the CPU (on a GPU,
    looking would stall the step)."""
    if label.device.type != "cpu" or not label.numel():
        return
    low, high = (int(end) for end in label.aminmax())
    if low < 0 or high >= classes:
        raise UserError(f"{name}: labels must be class ids from 0 to {classes - 1}; given: {low} to {high}.")


def hard_only(name: str, label: Tensor) -> None:
    """Raise `UserError` for soft labels."""
    if is_soft(label):
        raise UserError(
            f"{name}: is defined for class ids only, but labels are soft, of shape {tuple(label.shape)}; turn mixup "
            "and cutmix off."
        )


def class_ids(label: Tensor) -> Tensor:
    """(B,) class ids: the labels themselves, or the largest entry of soft ones (the first of equals)."""
    return label.argmax(dim=-1) if is_soft(label) else label


def without_classes(x: Tensor, classes: Tensor) -> Tensor:
    """Drop K distinct columns per row, keeping the order of the rest: (B, C) and (B,) or (B, K) ids -> (B, C - K).

    >>> without_classes(torch.tensor([[1., 2., 3.]]), torch.tensor([1]))
    tensor([[1., 3.]])
    """
    ids = (classes.unsqueeze(-1) if classes.ndim == 1 else classes).sort(dim=1).values
    others = torch.arange(x.shape[1] - ids.shape[1], device=x.device).expand(len(x), -1)
    for k in range(ids.shape[1]):  # each dropped column, from the left, moves all at and after it by one
        others = others + (others >= ids[:, k : k + 1])
    return x.gather(1, others)
