"""A network's outputs for a batch (`Signals`), and the capture of inner tensors in its one forward pass (`Taps`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest

Batch = dict[str, Any]
"""`input` (tensor, or mapping of tensors passed by keyword), `label` (B,) or (B, C) soft, `index` (B,), and a task's
own keys."""


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of logits (..., C), over the last axis.

    Dense logits (B, H, W, C) are views of a network's (B, C, H, W): over the second axis of that, nothing is copied
    (about three times faster).
    """
    if logits.ndim > 3:
        return logits.movedim(-1, 1).log_softmax(1).movedim(1, -1)
    return logits.log_softmax(-1)


@dataclass(slots=True)
class TopK:
    """The k most probable classes of a teacher; never expanded to all classes."""

    log_probs: Tensor  # (..., k), at temperature 1, falling
    indices: Tensor  # (..., k)
    tail: Tensor  # (...,) probability mass of all other classes


@dataclass(slots=True)
class Signals:
    """What a teacher or a student gives for a batch of B samples and C classes; absent parts are None."""

    logits: Tensor | None = None  # (B, C), (B, L, V) or (B, H, W, C): the class axis is the last
    probs: Tensor | None = None  # where only probabilities are known (a store, the past self)
    top: TopK | None = None
    embedding: Tensor | None = None  # (B, D), pooled, before the classifier
    taps: dict[str, Tensor] = field(default_factory=dict)  # maps are (B, C, H, W), whatever the network
    members: tuple[
        Signals, ...
    ] = ()  # of an ensemble; without `logits`, its output is the mean of the members' probabilities
    parts: dict[str, Tensor] = field(default_factory=dict)  # what else its task's networks give, by name (`Task.parts`)
    losses: dict[str, Tensor] = field(
        default_factory=dict
    )  # a network's own, where they are wanted, in training; their sum is minimised, `log:NAME` is only logged
    image: tuple[int, int] | None = None  # height and width of the images that the network saw

    def require(self, signal: str) -> Tensor:
        """A signal that must be there, in the words of `Objective.needs`: `logits`, `embedding`, `tap:NAME` or
        `part:NAME`.

        Raises:
            UserError: it is not there; the message lists what is.

        >>> Signals(logits=torch.zeros(2, 5)).require("embedding")
        Traceback (most recent call last):
        stillhouse.errors.UserError: There is no `embedding` among these signals, only logits; an objective captures
            what its `needs` names.
        """
        there = {"logits": self.logits, "embedding": self.embedding}
        there |= {f"tap:{name}": x for name, x in self.taps.items()} | {
            f"part:{name}": x for name, x in self.parts.items()
        }
        found = there.get(signal)
        if found is None:
            names = ", ".join(name for name, x in there.items() if x is not None)
            raise UserError(
                f"There is no `{signal}` among these signals, only {names or 'none'}; an objective captures what its "
                "`needs` names."
            )
        return found

    @property
    def only_top(self) -> TopK | None:
        """The k most probable classes, where no more is known than these."""
        return self.top if self.logits is None and self.probs is None and not self.members else None

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """Log-probabilities at a temperature, float32, shape as the logits.

        Works for logits, for probabilities (p ** (1/T), renormalised, is exactly softmax(logits / T)) and for an
        ensemble (the mean over its members of the probabilities at that temperature). As they equal the logits up to a
        constant per row, objectives that rank or renormalise may use `log_probs()` wherever a paper writes the
        teacher's logits.

        Raises:
            UserError: where only the top k are known, or nothing.
        """
        if self.logits is not None:
            logits = self.logits.float()
            return log_softmax(logits if temperature == 1.0 else logits / temperature)
        if self.members:
            stacked = torch.stack([m.log_probs(temperature) for m in self.members])
            return torch.logsumexp(stacked, dim=0) - math.log(len(self.members))
        if self.probs is not None:
            log_p = self.probs.float().log()  # of 0 minus infinity, so that a temperature gives it no mass
            log_p = log_p if temperature == 1.0 else log_softmax(log_p / temperature)
            return log_p.clamp_min(math.log(torch.finfo(torch.float32).tiny))
        if self.top is not None:
            raise UserError(
                "This objective needs the probabilities of all classes, but its teacher knows only the top k; store "
                "full logits or use a top-k objective."
            )
        raise UserError("This objective needs class probabilities, but its teacher gives none.")

    def detach(self) -> Signals:
        """The same signals outside autograd (no copy)."""
        cut = lambda x: None if x is None else x.detach()  # noqa: E731
        top = None if self.top is None else TopK(self.top.log_probs.detach(), self.top.indices, self.top.tail.detach())
        return Signals(
            cut(self.logits),
            cut(self.probs),
            top,
            cut(self.embedding),
            {k: v.detach() for k, v in self.taps.items()},
            tuple(m.detach() for m in self.members),
            {k: v.detach() for k, v in self.parts.items()},
            {k: v.detach() for k, v in self.losses.items()},
            self.image,
        )


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Call a model on a batch: a tensor input as it is, a mapping (`input_ids`, `attention_mask`, …) by keyword; in the
    model's own precision."""
    x = _in_precision(batch["input"], model)
    with own_precision(model):
        return model(**x) if isinstance(x, Mapping) else model(x)


HALF = frozenset({torch.float16, torch.bfloat16})
PRECISIONS = HALF | {torch.float32, torch.float64}


def _in_precision(x: Any, model: nn.Module) -> Any:
    """Real-valued tensors as the model's first weights have them, so that a half-precision network takes the inputs of
    another; ids as they are."""
    own = next((p.dtype for p in model.parameters() if p.dtype in PRECISIONS), None)
    if own is None:
        return x
    if isinstance(x, Mapping):
        return {k: v.to(own) if isinstance(v, Tensor) and v.dtype in PRECISIONS else v for k, v in x.items()}
    return x.to(own) if isinstance(x, Tensor) and x.dtype in PRECISIONS else x


def own_precision(model: nn.Module) -> AbstractContextManager[Any]:
    """Without autocast for a network whose weights are all in half precision, which autocast would mix with another;
    else nothing."""
    first = next(model.parameters(), None)
    if first is None or first.dtype not in HALF or any(p.dtype != first.dtype for p in model.parameters()):
        return nullcontext()
    return torch.autocast(first.device.type, enabled=False)


def in_float32(x: Tensor) -> Tensor:
    """A half-precision tensor in float32, unless autocast is on; any other as it is."""
    return x.float() if x.dtype in HALF and not torch.is_autocast_enabled(x.device.type) else x


def image_size(batch: Batch) -> tuple[int, int] | None:
    """Height and width of a batch's images (B, C, H, W): of its input, or of a mapping of inputs (`pixel_values`); None
    where it has none."""
    x = batch["input"]
    for value in x.values() if isinstance(x, Mapping) else (x,):
        if isinstance(value, Tensor) and value.ndim == 4:
            return value.shape[2], value.shape[3]
    return None


def read_logits(output: Any) -> Tensor:
    """The logits in whatever a classifier returns: a tensor, an object or mapping with `logits` (transformers) or `out`
    (torchvision), or a tuple led by them."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UserError(
        f"Could not find logits in the model's output, {_described(output)}: it may be a network of another task, "
        "such as detection; a classifier returns "
        "a tensor, or an object with `.logits`."
    )


def _described(output: Any) -> str:
    """A type, with the keys of a mapping or of the first of a list of mappings."""
    inner = output[0] if isinstance(output, tuple | list) and output else output
    keys = f" with {', '.join(map(str, list(inner)[:5]))}" if isinstance(inner, Mapping) else ""
    return f"a {type(output).__name__}{'' if inner is output else f' of {type(inner).__name__}'}{keys}"


class Taps:
    """Captures the outputs of named submodules during a forward pass.

    A name is a dotted submodule (`layer3`, `blocks.5.attn`), whose output is captured; with `:in` at the end (`fc:in`),
    its first input is.

    Hooks are registered here: create `Taps` before `torch.compile` sees the model, as hooks registered later never
    fire. They capture only inside `capture()`, and only for the module they were registered on (a deep copy's hooks do
    nothing); `remove()` removes them.

    Args:
        model: any module; it is not edited.
        names: tap names.
        owner: what the message calls the model when a name is wrong.

    Raises:
        UserError: a name that is no submodule (with the nearest names), or a tap that the forward pass did not reach.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> taps = Taps(net, ["0", "0:in"])
    >>> with taps.capture() as got:
    ...     _ = net(torch.ones(2, 4))
    >>> sorted((k, tuple(v.shape)) for k, v in got.items())
    [('0', (2, 3)), ('0:in', (2, 4))]
    """

    def __init__(self, model: nn.Module, names: Sequence[str], owner: str = "model") -> None:
        self.names = tuple(dict.fromkeys(names))
        self._owner = owner
        self._cell: list[dict[str, Tensor] | None] = [None]
        self._handles = []
        modules = dict(model.named_modules())
        for name in self.names:
            path = name.removesuffix(":in")
            if path not in modules:
                close = nearest(path, modules)
                hint = f"; nearest: {', '.join(close)}" if close else ""
                raise UserError(f"The {owner} has no submodule '{path}' to tap{hint}.")
            module = modules[path]
            if name.endswith(":in"):
                self._handles.append(module.register_forward_pre_hook(self._input_hook(name, module), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(name, module)))

    def _output_hook(self, name: str, mine: nn.Module) -> Callable[..., None]:
        cell = self._cell

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if cell[0] is not None and module is mine:
                cell[0][name] = first_tensor(output)

        return hook

    def _input_hook(self, name: str, mine: nn.Module) -> Callable[..., None]:
        cell = self._cell

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if cell[0] is not None and module is mine:
                cell[0][name] = first_tensor(args if args else tuple(kwargs.values()))

        return hook

    @contextmanager
    def capture(self) -> Iterator[dict[str, Tensor]]:
        """Collect tensors by tap name during forward passes inside the block; nothing is retained afterwards."""
        outer = self._cell[0]
        got: dict[str, Tensor] = {}
        self._cell[0] = got
        try:
            yield got
        finally:
            self._cell[0] = outer
        for name in self.names:
            if name not in got:
                raise UserError(
                    f"The forward pass of the {self._owner} never reached the tap '{name}' (fused attention and "
                    "unused branches skip inner modules); tap a module that runs."
                )

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def first_tensor(value: Any) -> Tensor:
    """The tensor itself, or the first in a tuple, list, mapping or output object."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    elif hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, tuple | list):
        for item in value:
            try:
                return first_tensor(item)
            except UserError:
                continue
    raise UserError(f"A tap captured a value of type {type(value).__name__} that holds no tensor; tap another module.")


def first_samples(batch: Batch, n: int) -> Batch:
    """The first n samples of a batch."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: cut(v) for k, v in value.items()}
        if isinstance(value, list):
            return value[:n]  # of ragged targets, one a sample
        return value[:n] if isinstance(value, Tensor) and value.ndim else value

    return {key: cut(value) for key, value in batch.items()}


def to_device(value: Any, device: torch.device | str) -> Any:
    """Tensors in nested mappings and lists moved to a device, without waiting."""
    if isinstance(value, Tensor):
        return value if value.device == torch.device(device) else value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(v, device) for v in value)
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and nothing is recorded for gradients; afterwards each submodule has its
    own mode back.

    `no_grad`, not inference mode: tensors created inside may be used in training later.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
