"""What is drawn at random for a training batch: crops and flips of small images all at once, torchvision's v2
transforms sample by sample, mixup and CutMix.

Mixup: Zhang et al., ICLR 2018, arXiv 1710.09412. CutMix: Yun et al., ICCV 2019, arXiv 1905.04899.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError, nearest, unknown
from stillhouse.randomness import keyed

ELSEWHERE = {
    "Normalize": "leave it out: images are normalised after the list",
    "MixUp": "set data.mixup instead",
    "CutMix": "set data.cutmix instead",
}


def crop_flip(images: np.ndarray, rows: np.ndarray, draws: np.ndarray, pad: int, flip: bool) -> np.ndarray:
    """Random crops of zero-padded images, mirrored at random; a whole batch at once.

    Args:
        images: (N, C, H, W) uint8, or floats.
        rows: (B,) which of them.
        draws: (B, 3) uniform numbers: down, right, mirror.
        pad: pixels of padding on each side; the crop has the image's own size.
        flip: mirror left-right with probability 1/2.

    Returns:
        (B, C, H, W) of the same type.
    """
    _, channels, height, width = images.shape
    padded = np.zeros((len(rows), channels, height + 2 * pad, width + 2 * pad), dtype=images.dtype)
    padded[:, :, pad : pad + height, pad : pad + width] = images[rows]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    offsets = (draws[:, :2] * (2 * pad + 1)).astype(np.int64)
    out = windows[np.arange(len(rows)), :, offsets[:, 0], offsets[:, 1]]
    if flip:
        mirrored = draws[:, 2] < 0.5
        out[mirrored] = out[mirrored][..., ::-1]
    return out


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) uint8 as floats in [0, 1], or floats as they are, of another size (bilinear, antialiased)."""
    if images.dtype != torch.uint8:
        return F.interpolate(images.to(torch.float32), size=size, mode="bilinear", antialias=True)
    return F.interpolate(images.to(torch.float32) / 255, size=size, mode="bilinear", antialias=True).clamp_(0, 1)


def transforms(items: list[str | dict[str, Any]], where: str = "data.augment") -> Callable[[Any], Any]:
    """torchvision.transforms.v2 classes by name with their arguments, in order.

    Raises:
        UserError: a class that does not exist (with the nearest), or an argument that it does not take; the message
            names the place.
    """
    from torchvision.transforms import v2

    built = [_transform(item, f"{where}.{i}") for i, item in enumerate(items)]
    compose: Callable[[Any], Any] = v2.Compose(built) if built else v2.Identity()
    return compose


def _transform(item: str | dict[str, Any], where: str) -> Any:
    from torchvision.transforms import v2

    if isinstance(item, dict) and len(item) != 1:
        raise UserError(
            f"{where}: give one transform with its arguments, such as {{RandomCrop: {{size: 32, padding: 4}}}}; "
            f"given: {item}."
        )
    name, arguments = next(iter(item.items())) if isinstance(item, dict) else (item, None)
    arguments = {} if arguments is None else arguments
    if name in ELSEWHERE:
        raise UserError(f"{where}.{name}: {ELSEWHERE[name]}.")
    known = [
        n
        for n, c in vars(v2).items()
        if inspect.isclass(c) and issubclass(c, v2.Transform) and n != "Transform" and n not in ELSEWHERE
    ]
    if name not in known:
        raise UserError(f"{where}: {unknown('transform in torchvision.transforms.v2 called', name, known)}")
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}.{name}: name the arguments, such as "
            f"{{{name}: {{{next(iter(_takes(getattr(v2, name))), 'p')}: {arguments}}}}}."
        )
    if "transforms" in arguments:
        arguments = {
            **arguments,
            "transforms": [
                _transform(t, f"{where}.{name}.transforms.{i}") for i, t in enumerate(arguments["transforms"])
            ],
        }
    takes = _takes(getattr(v2, name))
    for argument in arguments:
        if argument not in takes:
            close = nearest(argument, takes, 1)
            there = f"did you mean '{close[0]}'?" if close else f"it takes: {', '.join(takes) or 'none'}."
            raise UserError(f"{where}.{name}: unknown argument '{argument}'; {there}")
    parameters = inspect.signature(getattr(v2, name)).parameters
    try:
        named = {k: _member(v, parameters[k].default) for k, v in arguments.items()}
        return getattr(v2, name)(**named)
    except Exception as error:
        raise UserError(f"{where}.{name}: {str(error).replace('.__init__()', '').rstrip('.')}.") from None


def _member(value: Any, default: Any) -> Any:
    """The member of an enumeration by its value, where the argument's default is one: a recipe writes `cifar10`."""
    return type(default)(value) if isinstance(default, Enum) and isinstance(value, str) else value


def _takes(cls: type) -> list[str]:
    return [n for n in inspect.signature(cls).parameters if n not in ("args", "kwargs")]


def partners(positions: np.ndarray, count: int) -> np.ndarray:
    """With which position of its batch each is mixed: neighbours swap (the order is random already); the last of an odd
    batch takes the one before."""
    other = positions ^ 1
    return np.where(other < count, other, np.maximum(count - 2, 0))


def mix(
    own: Tensor,
    other: Tensor,
    own_label: Tensor,
    other_label: Tensor,
    mixup: float,
    cutmix: float,
    keys: tuple[int | str, ...],
) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix of a batch with its partners, one share (and one box) a batch; with both on, one of the two at
    random.

    Args:
        own, other: (B, C, H, W), or (B, ...) for mixup.
        own_label, other_label: (B, C) probabilities.
        mixup, cutmix: their alphas; 0 is off.
        keys: of the draw.

    Returns:
        inputs as `own`, and labels (B, C) whose rows sum to one.
    """
    with keyed(*keys):
        cut = cutmix > 0 and (mixup == 0 or np.random.random() < 0.5)
        share = float(np.random.beta(cutmix, cutmix) if cut else np.random.beta(mixup, mixup))
        place = np.random.random(2)
    if cut:
        height, width = own.shape[-2:]
        side = (1 - share) ** 0.5
        top, left = int(place[0] * height), int(place[1] * width)
        half_h, half_w = int(height * side) / 2, int(width * side) / 2
        rows = slice(max(int(top - half_h), 0), min(int(top + half_h), height))
        columns = slice(max(int(left - half_w), 0), min(int(left + half_w), width))
        mixed = own.clone()
        mixed[..., rows, columns] = other[..., rows, columns]
        share = 1 - max(rows.stop - rows.start, 0) * max(columns.stop - columns.start, 0) / (height * width)
    else:
        mixed = share * own + (1 - share) * other
    return mixed, share * own_label + (1 - share) * other_label
