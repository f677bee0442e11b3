"""What is where inside a network, whatever library it comes from: its stages, its classifier, and the embedding that
goes into the classifier."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.signals import Batch, call_model, first_tensor, read_logits

MOST_STAGES = 4
AFTER_FEATURES = (
    nn.Linear,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Softmax,
    nn.LogSoftmax,
)


def stages(model: nn.Module) -> list[str]:
    """Dotted names of a model's stages, shallow to deep; a tap on each gives the features of that stage.

    Our nets say them (`stage_names`). Of timm models they are the last four entries of `feature_info`, so that every
    net of five resolutions is without
    its stem. Else: top-level `layer1` …; else the model's longest chain of modules (torchvision's `features`, a
        transformer's layers), cut before each
    module that lowers the resolution, or in four even parts where none does.

    Raises:
        UserError: no such chain; taps must then be named one by one.
    """
    own = getattr(model, "stage_names", None)
    if own:
        return list(own)
    modules = dict(model.named_modules())
    info = [
        entry
        for entry in getattr(model, "feature_info", None) or []
        if isinstance(entry, dict) and entry.get("module") in modules
    ]
    if len(info) > 1:
        names = [entry["module"] for entry in info]
        isotropic = len({entry.get("reduction") for entry in info}) == 1
        return [names[i] for i in quarters(len(names))] if isotropic else names[-MOST_STAGES:]
    numbered = [name for name, _ in model.named_children() if re.fullmatch(r"(layer|stage|block)_?\d+", name)]
    if len(numbered) > 1:
        return numbered
    return _chain_stages(model, modules)


def depths_of(model: nn.Module) -> dict[str, int]:
    """Of each parameter by name, the number of its layer, counted from the input: what lies before the first layer is
    0, the head is the deepest.

    Of timm models the layers are those of `group_matcher`; else the blocks of the model's longest chain, or its stages.

    Raises:
        UserError: neither is found.
    """
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        from timm.models import group_parameters

        layers: dict[str, int] = {
            name: int(n) for name, n in group_parameters(model, matcher(coarse=False), reverse=True).items()
        }
        numbers = {n: i for i, n in enumerate(sorted(set(layers.values())))}
        return {name: numbers[n] for name, n in layers.items()}
    blocks = _blocks(model)
    out: dict[str, int] = {}
    reached = False
    for name, _ in model.named_parameters():
        inside = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        reached = reached or inside is not None
        out[name] = inside + 1 if inside is not None else (len(blocks) + 1 if reached else 0)
    return out


def _blocks(model: nn.Module) -> list[str]:
    """Dotted names of the blocks that follow each other: of the longest chain, where it holds most of the model; else
    the stages."""
    own = getattr(model, "stage_names", None)
    modules = dict(model.named_modules())
    sizes = {
        name: len(list(m.modules()))
        for name, m in modules.items()
        if isinstance(m, nn.Sequential | nn.ModuleList) and len(m) > 1
    }
    chain = max(sizes, key=lambda name: sizes[name], default=None)
    if own or chain is None or 2 * sizes[chain] < len(modules):
        return stages(model)
    return [f"{chain}.{name}".lstrip(".") for name, _ in modules[chain].named_children()]


def quarters(depth: int) -> list[int]:
    """The last index of each quarter of 0 … depth-1 (all of them below four).

    >>> quarters(12), quarters(6), quarters(2)
    ([2, 5, 8, 11], [1, 2, 4, 5], [0, 1])
    """
    count = min(MOST_STAGES, depth)
    return [-(-depth * (i + 1) // count) - 1 for i in range(count)]


def classifier(model: nn.Module, batch: Batch) -> str:
    """Dotted name of the classifier: the linear layer or convolution whose input is the embedding, found by a forward
    pass of the batch.

    It is the last linear layer or convolution whose output is the logits; or, where its output becomes the logits
    without further weights (pooled, averaged over two heads, one token picked), the last module with weights that runs,
    if it has as many outputs as there are logits.

    Args:
        model: any classifier; runs in evaluation mode without autograd, and is left as it was.
        batch: a few samples.

    Raises:
        UserError: there is none such; the spec's `embedding:` must then name it.
    """
    calls, logits = _probe(model, batch)
    width = _width(logits)
    for name, module, output in reversed(calls):
        if (
            _is_linear(module)
            and output.numel() == logits.numel()
            and torch.equal(output.reshape(logits.shape).float(), logits.float())
        ):
            return name
    if calls:
        name, module, output = calls[-1]
        if _is_linear(module) and width in (output.shape[-1], output.shape[min(1, output.ndim - 1)]):
            return name
    raise UserError(
        f"Could not find the classifier of {type(model).__name__}: no linear layer or convolution gives its {width} "
        "logits; "
        "set `embedding:` in the model's spec to the submodule whose input is the embedding."
    )


def num_outputs(model: nn.Module, batch: Batch) -> int:
    """How many classes a model tells apart: the width of its logits for the batch (a forward pass as in
    `classifier`)."""
    return _width(_logits(model, batch))


def embedding_from(tensor: Tensor) -> Tensor:
    """The classifier's input as an embedding (B, D): (B, D, H, W) is averaged over space, (B, L, D) over tokens, (B, D)
    is taken as it is.

    >>> [tuple(embedding_from(torch.ones(shape)).shape) for shape in [(2, 5), (2, 5, 4, 4), (2, 7, 5)]]
    [(2, 5), (2, 5), (2, 5)]
    """
    if tensor.ndim == 4:
        return tensor.mean((2, 3))
    if tensor.ndim == 3:
        return tensor.mean(1)
    if tensor.ndim == 2:
        return tensor
    raise UserError(
        f"An embedding is pooled from (B, D), (B, D, H, W) or (B, L, D), not from shape {tuple(tensor.shape)}; set "
        "`embedding:` to another submodule."
    )


def has_channels_last(model: nn.Module, tap: str, shape: Sequence[int], image: tuple[int, int] | None) -> bool:
    """Whether a tap's map is (B, H, W, C), as in Swin transformers, and not (B, C, H, W).

    The tapped layer tells where it works along one axis. Else the two axes that have the aspect of the image are height
    and width, where the axis that is then the channels is as wide as some linear layer or layer norm of the model; and
    where all three axes are alike, timm's `output_fmt` decides.

    Args:
        model: with the tap, a submodule (`:in` at the end: its input).
        tap: its name.
        shape: of the map, four axes.
        image: (H, W) of the images that the model saw; None: not known.
    """
    module = model.get_submodule(tap.removesuffix(":in"))
    if isinstance(module, nn.Linear):
        return True
    if image is None or isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm):
        return False
    _, a, b, c = shape
    if not _has_aspect(a, b, image):
        return False
    if _has_aspect(b, c, image):
        return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
    return any(
        (isinstance(m, nn.LayerNorm) and m.normalized_shape[-1] == c)
        or (isinstance(m, nn.Linear) and c in (m.in_features, m.out_features))
        for m in model.modules()
    )


def _has_aspect(height: int, width: int, image: tuple[int, int]) -> bool:
    """Whether a map has the proportions of the image, but for a pixel of rounding."""
    return abs(height * image[1] - width * image[0]) < max(image)


def _chain_stages(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Stages of the Sequential or ModuleList that holds most modules."""
    sizes = {
        name: len(list(m.modules()))
        for name, m in modules.items()
        if isinstance(m, nn.Sequential | nn.ModuleList) and len(m) > 1
    }
    chain = max(sizes, key=lambda name: sizes[name], default=None)
    if chain is not None and 3 * sizes[chain] >= len(modules):
        prefix = f"{chain}." if chain else ""
        children = [_runnable(f"{prefix}{name}", child) for name, child in modules[chain].named_children()]
        while children and isinstance(children[-1][1], AFTER_FEATURES):
            children.pop()
        if children:
            ends = [i - 1 for i, (_, child) in enumerate(children) if i > 0 and _lowers_resolution(child)] + [
                len(children) - 1
            ]
            ends = ends[-MOST_STAGES:] if len(ends) > 1 else quarters(len(children))
            return [children[i][0] for i in ends]
    raise UserError(
        f"Could not find the stages of {type(model).__name__} (no chain of layers holds most of it); name the taps by "
        "their submodules instead."
    )


def _runnable(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """A list of modules is never called itself: its last one stands for it."""
    while isinstance(module, nn.ModuleList) and len(module):
        name, module = f"{name}.{len(module) - 1}", module[-1]
    return name, module


def _lowers_resolution(module: nn.Module) -> bool:
    def stride(part: nn.Module) -> int:
        value: Any = getattr(part, "stride", 1) if isinstance(part, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) else 1
        return max(value) if isinstance(value, tuple) else value

    return any(stride(part) > 1 for part in module.modules())


def _probe(model: nn.Module, batch: Batch) -> tuple[list[tuple[str, nn.Module, Tensor]], Tensor]:
    """Calls of the innermost modules with weights, in order, with their outputs; and the logits."""
    calls: list[tuple[str, nn.Module, Tensor]] = []

    def watch(name: str) -> Any:
        return lambda module, args, output: calls.append((name, module, first_tensor(output)))

    handles = [
        m.register_forward_hook(watch(n))
        for n, m in model.named_modules()
        if next(m.parameters(), None) is not None and next(m.children(), None) is None
    ]
    try:
        logits = _logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    try:
        with _evaluating(model), torch.no_grad():
            return read_logits(call_model(model, batch))
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        given = batch["input"]
        shapes = {k: tuple(v.shape) for k, v in given.items()} if isinstance(given, Mapping) else tuple(given.shape)
        raise UserError(
            f"{type(model).__name__} could not run on an input of shape {shapes}: "
            f"{str(error).strip().rstrip('.') or type(error).__name__}."
        ) from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _width(logits: Tensor) -> int:
    """Classes are the last dimension, or for maps (B, C, H, W) the second."""
    return logits.shape[1] if logits.ndim == 4 else logits.shape[-1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's own mode as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
