"""The class names of a transformers classifier (`id2label` of its config), compared with those of the data: a model
that has the same classes in another order is put in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.signals import evaluating, read_logits


def names_of(model: nn.Module) -> list[str] | None:
    """The names of a classifier's outputs, where its config has any that say more than their numbers."""
    given = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(given, dict):
        return None
    by_id = {int(i): str(name) for i, name in given.items()}
    if sorted(by_id) != list(range(len(by_id))):
        return None
    names = [by_id[i] for i in range(len(by_id))]
    return None if names in (_numbers(len(names)), [f"LABEL_{i}" for i in range(len(names))]) else names


def set_names(model: nn.Module, classes: Sequence[str]) -> None:
    """Write class names into the config of a transformers classifier of as many outputs; another model has no place for
    them."""
    config: Any = getattr(model, "config", None)
    given = getattr(config, "id2label", None)
    if isinstance(given, dict) and len(given) == len(classes):
        config.id2label, config.label2id = label_maps(classes)


def label_maps(classes: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    """`id2label` and `label2id` of a config."""
    return dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}


def put_in_order(model: nn.Module, classes: Sequence[str], owner: str, input_shape: Sequence[int] = ()) -> None:
    """Give a classifier whose classes have the data's names the data's order, by the rows of its last layer.

    A model without names gets the data's; one of other names stays as it is (see `check`).

    Args:
        model: a network for as many classes.
        classes: the data's, in label order.
        owner: what a message calls the model.
        input_shape: (C, H, W) of images; () for tokens.

    Raises:
        UserError: another order, and no last layer that would give this one.
    """
    names = names_of(model)
    order = list(range(len(classes))) if names is None else _order(names, classes)
    if order is None:
        return
    if order != list(range(len(classes))):
        _sort_outputs(model, order, owner, input_shape)
    set_names(model, classes)


def check(model: nn.Module, classes: Sequence[str], owner: str) -> None:
    """Raise `UserError` for a classifier that is used as it is, although its classes have other names than the data's.

    Data whose classes are the numbers from 0 names the model's outputs by their place.
    """
    names = names_of(model)
    if names is None or list(classes) in (names, _numbers(len(classes))):
        return
    raise UserError(
        f"The classes of '{owner}' are {_listed(names)}, but those of the data are {_listed(classes)}; name the "
        "data's classes as "
        "the model does, train it on the data (`train:`), or, if both mean the same in this order, set "
        "options.id2label: null."
    )


def _order(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """For each class of the data, the model's output of the same name (case and separators aside); None where the names
    differ."""
    for alike in (str, lambda name: re.sub(r"[\s_-]+", " ", name).strip().casefold()):
        ids = {alike(name): i for i, name in enumerate(names)}
        wanted = [alike(c) for c in classes]
        if len(ids) == len(names) == len(wanted) and ids.keys() == set(wanted):
            return [ids[c] for c in wanted]
    return None


@torch.no_grad()
def _sort_outputs(model: nn.Module, order: list[int], owner: str, input_shape: Sequence[int]) -> None:
    """Sort the rows of the last layer, or of all heads where a model has several, and see that its logits are
    sorted."""
    inside = set(getattr(model, "base_model", nn.Identity()).modules()) - {model}
    heads = [
        m
        for m in model.modules()
        if m not in inside and isinstance(m, nn.Linear | nn.Conv2d) and len(m.weight) == len(order)
    ]
    wanted = _logits(model, input_shape)[..., order]
    for chosen in (heads[-1:], heads):
        for head in chosen:
            _take_rows(head, order)
        if torch.allclose(_logits(model, input_shape), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
            return
        back = torch.tensor(order).argsort().tolist()
        for head in chosen:
            _take_rows(head, back)
    raise UserError(
        f"'{owner}' has the data's classes in another order, and no last layer whose rows give them; order the data's "
        "classes as the model does: "
        f"{_listed(names_of(model) or [])}."
    )


def _take_rows(head: nn.Linear | nn.Conv2d, order: list[int]) -> None:
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            parameter.copy_(parameter[order].clone())


def _logits(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Logits of one sample that is the same at each call."""
    some = next(model.parameters())
    with evaluating(model):
        if len(input_shape) != 3:
            return read_logits(model(input_ids=torch.arange(1, 5, device=some.device)[None])).float()
        count = input_shape[0] * input_shape[1] * input_shape[2]
        return read_logits(
            model(torch.linspace(-1, 1, count, device=some.device, dtype=some.dtype).sin().view(1, *input_shape))
        ).float()


def _numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:6]) + (", …" if len(names) > 6 else "")
