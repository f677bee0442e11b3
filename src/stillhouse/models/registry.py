"""Our own small nets by name: a class registers its names with what each name fixes (`resnet20` fixes the depth), the
rest are options."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from stillhouse.errors import UserError, unknown

N = TypeVar("N", bound=type[nn.Module])
Fixed = Mapping[str, Any]
LATER = {
    "conv_vit": "stillhouse.models.conv_vit",
    "faster_rcnn": "stillhouse.models.region_detector",
    "fusion": "stillhouse.models.fusion",
    "hybrid_clip": "stillhouse.models.hybrid_clip",
    "mask_rcnn": "stillhouse.models.region_detector",
    "pyramid_detector": "stillhouse.models.pyramid_detector",
    "pyramid_segmenter": "stillhouse.models.pyramid_segmenter",
    "text_rcnn": "stillhouse.models.text_rcnn",
    "two_towers": "stillhouse.models.two_towers",
    "visual_language": "stillhouse.models.visual_language",
}
"""Nets whose module needs another library: it is imported when one of them is asked for."""
_NETS: dict[str, tuple[type[nn.Module], Fixed]] = {}
_PATTERNS: list[tuple[re.Pattern[str], type[nn.Module], Callable[..., Fixed]]] = []


def names() -> list[str]:
    """Names of our own nets, sorted as a reader would (`resnet8` before `resnet110`). Families such as `wrn_D_K` know
    further names."""
    return sorted(
        {*_NETS, *LATER},
        key=lambda name: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", name)
        ],
    )


def register(
    nets: Mapping[str, Fixed], pattern: str | None = None, fixes: Callable[..., Fixed] | None = None
) -> Callable[[N], N]:
    """Register a net class under names.

    Args:
        nets: {name: constructor arguments that the name fixes}. The class takes `num_classes` and `input_shape` and may
            take more, its options.
        pattern: a regular expression for further names of the family; its groups, as integers, go to `fixes`.
        fixes: the constructor arguments that a name of the pattern fixes.
    """

    def decorate(cls: N) -> N:
        _NETS.update({name: (cls, fixed) for name, fixed in nets.items()})
        if pattern is not None and fixes is not None:
            _PATTERNS.append((re.compile(pattern), cls, fixes))
        return cls

    return decorate


def build_own(
    name: str, num_classes: int | None, input_shape: tuple[int, ...] | None, options: Mapping[str, Any]
) -> nn.Module:
    """One of our nets; without `num_classes` it has 10, without `input_shape` it takes (3, 32, 32).

    Raises:
        UserError: an unknown name or option, or an option that the name fixes.
    """
    arguments = dict(options)
    if num_classes is not None:
        arguments.setdefault("num_classes", num_classes)
    if input_shape is not None:
        arguments.setdefault("input_shape", tuple(input_shape))
    cls, fixed = check_own(name, arguments)
    return cls(**fixed, **arguments)


def check_own(name: str, options: Mapping[str, Any]) -> tuple[type[nn.Module], Fixed]:
    """The class of one of our nets and what its name fixes. Raises as `build_own`; builds nothing."""
    cls, fixed = _find(name)
    valid = list(inspect.signature(cls).parameters)
    for key in options:
        if key in fixed:
            raise UserError(
                f"options.{key}: 'stillhouse:{name}' fixes {key} to {fixed[key]} by its name; choose another name."
            )
        if key not in valid:
            known = [f"options.{v}" for v in valid if v not in fixed and v != "input_shape"]
            raise unknown("option", f"options.{key}", known, f" of 'stillhouse:{name}'")
    return cls, fixed


def _find(name: str) -> tuple[type[nn.Module], Fixed]:
    if name in LATER:
        importlib.import_module(LATER[name])
    if name in _NETS:
        return _NETS[name]
    for pattern, cls, fixes in _PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            return cls, fixes(*map(int, match.groups()))
    raise unknown("net", f"stillhouse:{name}", [f"stillhouse:{n}" for n in names()])
