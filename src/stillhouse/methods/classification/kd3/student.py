"""A student that ends in its teacher's classifier: backbone, transfer block, frozen linear layer.

As a network and as a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.methods.classification.kd3.alignment import transfer_block
from stillhouse.models.anatomy import classifier, embedding_from, stages
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import evaluate
from stillhouse.runs.products import Student
from stillhouse.signals import Batch, Taps, call_model, first_tensor
from stillhouse.tasks.base import Task

if TYPE_CHECKING:
    pass

KIND = "stillhouse.methods.classification.kd3:SharedStudent"


class SharedClassifier(nn.Module):
    """Logits cls(mean of transfer(map of the backbone)); the backbone's own classifier is not used.

    Args:
        backbone: any image classifier.
        tap: the submodule that gives its last map (B, s, h', w').
        channels: s of the student and t of the teacher.
        num_classes: C.
        size: (h, w) of the teacher's map; a larger student map is averaged down to it.
        factor: narrows the transfer block.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tap: str,
        channels: tuple[int, int],
        num_classes: int,
        size: tuple[int, int],
        factor: int = 2,
    ) -> None:
        super().__init__()
        self.backbone, self.tap, self.channels, self.size, self.factor = backbone, tap, channels, size, factor
        self.transfer = transfer_block(*channels, factor)
        self.cls = nn.Linear(channels[1], num_classes).requires_grad_(False)
        self._taps = Taps(backbone, [tap], "student")

    def features(self, images: Tensor) -> Tensor:
        """(B, s, h', w') the backbone's last map."""
        with self._taps.capture() as got:
            self.backbone(images)
        return got[self.tap]

    def classify(self, transferred: Tensor) -> Tensor:
        """(B, t, h, w) -> logits (B, C) by the teacher's classifier."""
        return self.cls(transferred.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        size = (min(features.shape[2], self.size[0]), min(features.shape[3], self.size[1]))
        if tuple(features.shape[2:]) != size:
            features = nn.functional.adaptive_avg_pool2d(features, size)
        return self.classify(self.transfer(features))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_taps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._taps = Taps(self.backbone, [self.tap], "student")  # a copy's hooks are silent: it needs its own


def last_map(model: nn.Module, batch: Batch) -> tuple[str, Tensor] | None:
    """The submodule whose map, averaged over space, is what the classifier reads, and that map (2, D, h, w); None where
    there is none.

    Args:
        model: any image classifier; runs in evaluation mode without autograd.
        batch: two samples or more.
    """
    name = classifier(model, batch)
    calls: dict[str, Tensor] = {}

    def watch(at: str) -> Any:
        return lambda module, args, output: calls.__setitem__(at, first_tensor(output))

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    seen: list[Tensor] = []
    handles.append(model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0])))
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for m, training in modes:
            m.training = training
    embedding = embedding_from(seen[0])
    found = [
        (n, x)
        for n, x in calls.items()
        if x.ndim == 4
        and x.shape[1] == embedding.shape[1]
        and torch.allclose(x.mean((2, 3)), embedding, rtol=1e-4, atol=1e-5)
    ]
    return max(found, key=lambda item: item[1][0, 0].numel(), default=None)


def make_shared(student: nn.Module, teacher: nn.Module, batch: Batch, factor: int) -> tuple[SharedClassifier, str]:
    """The student before the teacher's classifier, and the teacher's tap.

    Raises:
        UserError: a teacher whose classifier is not one linear layer on the mean of a map.
    """
    theirs, head = last_map(teacher, batch), teacher.get_submodule(classifier(teacher, batch))
    if theirs is None or not isinstance(head, nn.Linear):
        raise UserError(
            "kd3: the teacher's classifier must be one linear layer on the mean of its last feature map, but that of "
            f"{type(teacher).__name__} is not; "
            "choose a teacher such as a ResNet."
        )
    mine = last_map(student, batch)
    if mine is None:
        tap = stages(student)[-1]
        taps = Taps(student, [tap], "student")
        with torch.no_grad(), taps.capture() as got:
            call_model(student.eval(), batch)
        taps.remove()
        mine = tap, got[tap]
    if mine[1].ndim != 4:
        raise UserError(
            f"kd3: the student's last stage '{mine[0]}' must give a map (B, C, H, W), but gives {tuple(mine[1].shape)}."
        )
    _, channels, height, width = theirs[1].shape
    shared = SharedClassifier(
        student, mine[0], (mine[1].shape[1], channels), head.out_features, (height, width), factor
    )
    shared.cls.weight.data.copy_(head.weight)
    shared.cls.bias.data.copy_(torch.zeros_like(shared.cls.bias) if head.bias is None else head.bias)
    return shared, theirs[0]


@dataclass
class SharedStudent(Student):
    """A student with its transfer block and its teacher's classifier; all three are needed."""

    kind: ClassVar[str] = KIND

    def extras(self) -> dict[str, Any]:
        module = self.module
        assert isinstance(module, SharedClassifier)
        shape = {
            "tap": module.tap,
            "channels": list(module.channels),
            "size": list(module.size),
            "factor": module.factor,
        }
        return {"shared": shape}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> SharedStudent:
        from safetensors.torch import load_model

        shared, classes = meta["shared"], len(task.class_names)
        tap, channels, size = shared["tap"], tuple(shared["channels"]), tuple(shared["size"])
        module = SharedClassifier(task.build(spec), tap, channels, classes, size, shared["factor"])
        load_model(module, str(task.weights_file(folder)))
        return cls(module.eval(), spec, task)


evaluates(KIND)(evaluate)
