"""`Task`: what is predicted, and all that follows from it without samples: how a network for it is built, called, read,
judged and saved.

A task is a frozen dataclass of plain facts. `Task()` itself is the plain loop: any model that gives logits, judged as a
classifier. The class axis of logits is the last, and a label stands where its prediction stands: `label.shape ==
logits.shape[:-1]`; -100 counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec, TeacherSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import GROUPS, ClassificationMeter
from stillhouse.evaluation.judge import Meter, one_sample
from stillhouse.models import load_weights
from stillhouse.signals import Batch, Signals, call_model, read_logits

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Task:
    """The facts of a task; most methods have useful defaults, and the smallest task is `build`, `meter` and `example`.

    Attributes:
        name: as in product.json; the name of the task's file.
        parts: what its networks give besides logits: name -> shape and meaning (`Signals.parts`).
        supervised: objectives of plain training: of teachers, and of variants without one.
        reads: what `predict` takes: "images" (uint8 (C, H, W)), "texts", or "" where it takes batches only.
        embeds: whether `read` gives the embedding, so that no classifier is looked for.
    """

    name: ClassVar[str] = "any"
    parts: ClassVar[Mapping[str, str]] = {}
    supervised: ClassVar[tuple[str | dict[str, Any], ...]] = ("ce",)
    reads: ClassVar[str] = ""
    embeds: ClassVar[bool] = False

    @property
    def groups(self) -> tuple[str, ...]:
        """Figures by group, for a recipe's `evaluate`; `cost` and `step` are everybody's."""
        return GROUPS

    @property
    def slow_groups(self) -> tuple[str, ...]:
        """Groups of figures that are computed only where `evaluate` names them."""
        return ()

    @property
    def positions(self) -> bool:
        """Whether there is one prediction a pixel or token, not a sample."""
        return False

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order; () where there are none."""
        return ()

    @property
    def outcomes(self) -> int:
        """How many scores a prediction has; by default one a class. 0 where there are no classes."""
        return len(self.class_names)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel that inputs in [0, 1] were normalised with; () where they are used as
        they are."""
        return (), ()

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) that its networks need their images to have; None where they take what they are given."""
        return None

    # ---- a network ---------------------------------------------------------------------------------------------------

    def build(self, spec: ModelSpec) -> nn.Module:
        """A network for these classes and this size. Raises `UserError` for one that cannot serve the task."""
        raise UserError("There is nothing to build for: a model by name needs data.")

    def call(self, model: nn.Module, batch: Batch, *, losses: bool = False) -> Any:
        """The network's output for a batch. With `losses`, a network that computes its own losses is given the
        targets."""
        return call_model(model, batch)

    def run_inside(self, model: nn.Module, batch: Batch) -> bool:
        """Run a network for what is captured inside it alone, where that is less work than `call`; else do nothing.

        Returns:
            whether it ran.
        """
        return False

    def read(self, output: Any, batch: Batch) -> Signals:
        """What a network's output means."""
        return Signals(logits=read_logits(output))

    def compiled_part(self, model: nn.Module) -> nn.Module:
        """The module that `call` runs, which is what torch.compile should see."""
        return model

    def as_teacher(self, model: nn.Module, spec: TeacherSpec, its: Task) -> nn.Module:
        """A teacher of another task of the same kind, `its`, wrapped so that its outputs fit this task."""
        return model

    def serving(self, model: nn.Module, student: Task) -> tuple[nn.Module, Task]:
        """A teacher of this task for a student of another: the network, and the task by which it is called and read."""
        return model, self

    def ready(self, model: nn.Module) -> Task:
        """This task with what it computes of a network once, before the network is judged or shown; default: itself."""
        return self

    def constrain(self, model: nn.Module) -> None:
        """Put weights of a trained network back into their range, after each optimiser step."""

    def reads_as(self, model: nn.Module) -> Task:
        """The task by which a teacher's network is called and read: this one, or another for a network that only gives
        features."""
        return self

    @property
    def prefers_chunks(self) -> bool:
        """Whether its scores are so many that losses should be computed some positions at a time, where they can be."""
        return False

    def chunked(self, models: Mapping[str, nn.Module], probe: Batch) -> Task | str:
        """This task with networks that are called without their last layer; or the reason why they cannot be, a clause.

        Args:
            models: owner -> network.
            probe: a few samples.
        """
        return "its scores are made whole"

    # ---- figures -----------------------------------------------------------------------------------------------------

    def meter(self, groups: Sequence[str]) -> Meter:
        """What collects the figures of these groups, batch by batch."""
        return ClassificationMeter(groups)

    def own_figures(self, module: nn.Module, loader: Iterable[Batch], groups: Sequence[str]) -> dict[str, float]:
        """Figures that need the network itself and not its outputs for a batch, of the groups among these."""
        return {}

    def one(self, batch: Batch) -> Batch:
        """The input of the batch's first sample, as a batch of one, for figures of cost."""
        return one_sample(batch)

    def example(self) -> Batch:
        """A batch of one without data, for export and dry runs. Raises `UserError` where inputs have no one shape."""
        raise UserError(
            f"A model of the task '{self.name}' takes inputs of no one shape, so there is no example of one."
        )

    def for_export(self, module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        """The network as other programs run it, from an input (B, …) to tensors; and the names of these."""
        return _Logits(module), ("logits",)

    # ---- on disk -----------------------------------------------------------------------------------------------------

    def facts(self, folder: Path) -> dict[str, Any]:
        """What product.json says of the task, as JSON data; may write files into the product's folder."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], folder: Path) -> Task:
        """The task of a product's folder."""
        return cls(**{k: _frozen(v) for k, v in facts.items()})

    def save_module(self, module: nn.Module, folder: Path) -> None:
        """Write the network's weights into a product's folder."""
        from safetensors.torch import save_model

        from stillhouse.files import atomic_write

        with atomic_write(folder / WEIGHTS) as temporary:
            save_model(module, str(temporary))

    def load_module(self, spec: ModelSpec, folder: Path) -> nn.Module:
        """The network of a product's folder, in evaluation mode."""
        module = self.build(spec)
        load_weights(module, folder / WEIGHTS, owner=f"model {spec.model}")
        return module.eval()

    def weights_file(self, folder: Path) -> Path:
        """The file that `save_module` writes."""
        return folder / WEIGHTS

    # ---- for people --------------------------------------------------------------------------------------------------

    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """What the network finds in each input: labels, boxes, texts, pictures."""
        raise UserError(
            f"Nothing predicts for people with a model of the task '{self.name}' yet; call its module on batches."
        )

    def among(self, names: Sequence[str], whole: bool = False) -> Task:
        """This task with the classes that a user names.

        Args:
            names: class names, or with `whole`, texts to be taken as they are.

        Raises:
            UserError: a network whose classes are fixed.
        """
        raise UserError(
            f"The classes of this product are fixed ({', '.join(self.class_names[:6])}…); only one that embeds texts "
            "takes others."
        )

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        """For a report's gallery, what a network finds in each sample of a batch: uint8 pictures (3, H, W); [] where
        there is nothing to draw."""
        return []

    def truth(self, batch: Batch) -> list[Tensor]:
        """What is right, drawn as `pictures` draws it."""
        return []

    def captions(self, batch: Batch, outputs: Signals | None) -> list[str]:
        """What stands under each of `pictures`; under each of `truth` without outputs."""
        return []

    def baselines(self, batch: Batch) -> dict[str, Signals]:
        """For a report's gallery, what needs no network, by name: of an image to be restored, the input enlarged."""
        return {}

    def disagreement(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """(B,) how much student and teacher differ on each sample: by default the KL divergence of their class
        probabilities."""
        theirs = teacher.log_probs()
        kl = torch.nn.functional.kl_div(student.log_probs(), theirs, reduction="none", log_target=True).sum(-1)
        return kl.flatten(1).mean(1) if kl.ndim > 1 else kl


class _Logits(nn.Module):
    """A network whose output is its logits, whatever its library returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return read_logits(self.network(x))


def _frozen(value: Any) -> Any:
    """Lists of JSON as the tuples they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
