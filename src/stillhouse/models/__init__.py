"""Models by name: `timm:NAME`, `torchvision:NAME`, `hf:FOLDER`, `hf:config:TYPE`, `file:path.py:Class` and our own
small nets, `stillhouse:NAME`.

`build` makes one from a recipe's `ModelSpec`, `check` looks for its name beforehand; `names` lists our own;
`load_weights` reads a checkpoint; `anatomy` finds stages and the classifier.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError, nearest
from stillhouse.models import clip as clip
from stillhouse.models import convnet as convnet  # our own nets register themselves
from stillhouse.models import densenet as densenet
from stillhouse.models import dit as dit
from stillhouse.models import efficientnet as efficientnet
from stillhouse.models import imdn as imdn
from stillhouse.models import mobile as mobile
from stillhouse.models import one_stage as one_stage
from stillhouse.models import point_detectors as point_detectors
from stillhouse.models import resnet as resnet
from stillhouse.models import sources
from stillhouse.models import transformer as transformer
from stillhouse.models import vgg as vgg
from stillhouse.models import wide_resnet as wide_resnet
from stillhouse.models import yolov4 as yolov4
from stillhouse.models.registry import build_own, check_own, names, register
from stillhouse.models.weights import load_weights

__all__ = ["accepts", "build", "check", "load_weights", "names", "register"]

KINDS = ("stillhouse", "timm", "torchvision", "hf", "file")


def build(spec: ModelSpec, num_classes: int | None = None, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    """A network from its spec, with its checkpoint where one is named; initialised by torch's current generator.

    Args:
        spec: name, options of the constructor, checkpoint.
        num_classes: C of the data; None leaves the library's default. `options.num_classes` goes before it.
        input_shape: shape of one sample, (channels, height, width) for images; None leaves the library's default.

    Raises:
        UserError: an unknown kind, name or option, a missing file or extra, weights that do not fit.
    """
    kind, _, name = spec.model.partition(":")
    if kind not in KINDS or not name:
        raise _unknown_kind(spec.model)
    if spec.pretrained and kind in ("stillhouse", "file"):
        raise UserError(
            f"'{spec.model}' has no published weights: set `checkpoint:` to a file of your own, or train it, instead "
            "of `pretrained: true`."
        )
    weights, options = spec.weights, spec.options
    if weights is not None and weights.classifier == "none":
        num_classes, options = 1, {k: v for k, v in options.items() if k != "num_classes"}
    try:
        if kind == "stillhouse":
            model = build_own(name, num_classes, input_shape, options)
        elif kind == "timm":
            model = sources.from_timm(name, num_classes, input_shape, options, spec.pretrained)
        elif kind == "torchvision":
            model = sources.from_torchvision(name, num_classes, input_shape, options, spec.pretrained)
        elif kind == "hf":
            model = sources.from_transformers(name, num_classes, input_shape, options, spec.pretrained)
        else:
            model = sources.from_file(name, num_classes, options)
    except UserError:
        raise
    except Exception as error:  # a library refuses its options by errors of its own
        if kind == "file" and not isinstance(
            error, TypeError | ValueError | RuntimeError | AssertionError | ArithmeticError
        ):
            raise
        given = f" with options {spec.options}" if spec.options else ""
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"Could not build '{spec.model}'{given}: {reason}.") from error
    if weights is not None:
        new = weights.classifier in ("new", "none")
        load_weights(model, weights.path, f"model '{spec.model}'", weights.rename, new_classifier=new)
    return model


def check(model: str, options: Mapping[str, Any]) -> None:
    """Raises `UserError` for a name that its library does not know, or an option that one of our nets does not have.
    Builds and loads nothing."""
    kind, _, name = model.partition(":")
    if kind not in KINDS or not name:
        raise _unknown_kind(model)
    if kind == "stillhouse":
        check_own(name, options)
    elif kind == "timm":
        sources.check_timm(name)
    elif kind == "torchvision":
        sources.check_torchvision(name)


def accepts(model: str, option: str) -> bool:
    """Whether one of our nets takes an option that its name does not fix; of other libraries' False."""
    kind, _, name = model.partition(":")
    if kind != "stillhouse":
        return False
    cls, fixed = check_own(name, {})
    return option in inspect.signature(cls).parameters and option not in fixed


def _unknown_kind(model: str) -> UserError:
    close = nearest(model.rpartition(":")[2], names(), 1)
    hint = f"; did you mean 'stillhouse:{close[0]}'?" if close else "."
    return UserError(f"There is no model '{model}': a name is {', '.join(f'{k}:…' for k in KINDS)}{hint}")
