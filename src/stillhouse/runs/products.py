"""Products: what a run leaves to keep. Each kind saves to a folder, loads from it, and is judged by the evaluator of
its kind.

A product folder holds `product.json` (its kind, and how to build it again) and data files: safetensors, never pickles.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from stillhouse import catalog
from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError, unknown
from stillhouse.files import CHECKSUMS, damage
from stillhouse.models.class_names import label_maps
from stillhouse.runs import network_files
from stillhouse.tasks.base import Task

KINDS = {
    "student": "stillhouse.runs.products:Student",
    "language": "stillhouse.runs.products:Student",  # as format 1 called students of text
    "synthetic_set": "stillhouse.synthetic.product:SyntheticSet",
    "generator": "stillhouse.generation.product:Generator",
}
"""Kind -> where its class is. A method that leaves another kind names it in `Product.kind` as `module:Class`, or adds a
line here."""


AGAIN = "Copy it again from where it was made, or run its recipe again."


class Product:
    """Something to keep. A kind gives `kind`, `save` and `load`, and where other programs can read it, `formats` and
    `export`.

    Attributes:
        kind: a key of `KINDS`, or `module:Class`.
        formats: format -> name of the file or folder; the default first.
        reads: what `predict` takes: "images" (uint8 (C, H, W)), "texts", "files" (see `found_in`), or "" where it
            predicts nothing for people.
        figures: of its production, such as `train_seconds`; saved with the run, not with the product.
    """

    kind: ClassVar[str]
    formats: ClassVar[Mapping[str, str]] = {}
    reads: str = ""
    figures: dict[str, float]

    def save(self, folder: Path) -> None:
        """Write the product, with its product.json, into a folder that is there."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> Any:
        """The product in a folder. `trust_code`: allow a model that the user's own Python file builds."""
        raise NotImplementedError

    def export(self, to: str, path: Path) -> list[str]:
        """Write one of `formats`; returns sentences for the user."""
        raise NotImplementedError

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """What it finds in, or makes of, each input; only where it `reads` any."""
        raise NotImplementedError

    def found_in(self, files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The same of files that belong together, where it reads `files`: by a name, words and numbers to show, lists
        to store, and a `picture`, uint8 (3, H, W)."""
        raise NotImplementedError


@dataclass
class Student(Product):
    """A trained network, the recipe of its model, and its task.

    Attributes:
        module: the network.
        model: how it is built again.
        task: what it predicts.
        figures: of its training, such as `train_seconds`; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "student"
    formats: ClassVar[Mapping[str, str]] = network_files.FORMATS
    module: nn.Module
    model: ModelSpec
    task: Task
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def reads(self) -> str:  # type: ignore[override]
        """What `predict` takes, as the task has it."""
        return self.task.reads

    @property
    def classes(self) -> list[str]:
        """Class names, in label order."""
        return list(self.task.class_names)

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """What the network finds in each input (see `Task.predict`)."""
        return self.task.predict(self.module, inputs)

    def write_weights(self, folder: Path) -> None:
        """Write the network's weights; a subclass that stores them in another form has its own."""
        on_cpu = {p.device.type for p in self.module.parameters()} <= {"cpu"}
        self.task.save_module(self.module if on_cpu else _copy_to_cpu(self.module), folder)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.write_weights(folder)
        spec = self.model.model_copy(
            update={
                "checkpoint": None,
                "pretrained": False,
                "model": _bring_along(self.model.model, folder, self.classes),
            }
        )
        task = {"name": self.task.name, **self.task.facts(folder)}
        meta = {"kind": self.kind, "format": 2, "model": spec.model_dump(mode="json"), "task": task, **self.extras()}
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    def export(self, to: str, path: Path) -> list[str]:
        if to == "safetensors":
            network_files.write_network(self.module, None, to, path)
        else:
            network, outputs = self.task.for_export(self.module)
            network_files.write_network(network, self.task.example(), to, path, outputs)
        return [f"Wrote {path}"]

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> Self:
        meta = read_meta(folder)
        spec = ModelSpec.model_validate(meta["model"]) if "model" in meta else ModelSpec(model="hf:model")
        spec = spec.model_copy(update={"checkpoint": None, "pretrained": False})
        place = Path(spec.model.partition(":")[2])
        if spec.model.startswith(("file:", "hf:")) and (place.is_absolute() or ".." in place.parts):
            raise UserError(f"The product in {folder} names '{spec.model}', which lies outside of it. {AGAIN}")
        if spec.model.startswith("file:") and not trust_code:
            raise UserError(
                f"The product in {folder} is built by the Python file '{spec.model}'; load it with trust_code=True if "
                "you trust that file."
            )
        for scheme, suffix in (("file:", ".py"), ("hf:", "")):
            brought = folder / spec.model.removeprefix(scheme)
            if (
                spec.model.startswith(scheme)
                and Path(str(brought).rpartition(".py:")[0] + suffix if suffix else brought).exists()
            ):
                spec = spec.model_copy(update={"model": f"{scheme}{brought}"})
        facts = dict(meta["task"]) if isinstance(meta.get("task"), Mapping) else _facts_of_format_1(meta)
        task = catalog.task(facts.pop("name")).restored(facts, folder)
        return cls.rebuilt(meta, spec, task, folder)

    def extras(self) -> dict[str, Any]:
        """What a subclass adds to product.json."""
        return {}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> Self:
        """The product from its parts; a subclass whose module is not what the task builds makes its own."""
        return cls(task.load_module(spec, folder), spec, task)


def _facts_of_format_1(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a task in products of format 1: all at the top level, without the task's name."""
    if meta["kind"] == "language":
        return {"name": "tokens", "kind": meta["task"], "context": meta["context"], "classes": meta["classes"]}
    return {"name": "classification", **{k: meta[k] for k in ("classes", "input_shape", "mean", "std")}}


def _bring_along(name: str, folder: Path, classes: list[str]) -> str:
    """The model's name, with the user's Python file or the transformers config that it points to copied into the
    product, so that the product stands alone.

    The config gets the names of the classes.
    """
    if name.startswith("file:"):
        path, _, rest = name.removeprefix("file:").partition(".py")
        source = Path(path + ".py").expanduser()
        shutil.copyfile(source, folder / source.name)
        return f"file:{source.name}{rest}"
    config = Path(name.removeprefix("hf:")).expanduser() / "config.json"
    if name.startswith("hf:") and config.is_file():
        (folder / "config").mkdir()
        id2label, label2id = label_maps(classes)
        facts = {**json.loads(config.read_text()), **({"id2label": id2label, "label2id": label2id} if classes else {})}
        (folder / "config" / "config.json").write_text(json.dumps(facts, indent=1))
        return "hf:config"
    return name


def _copy_to_cpu(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).cpu()


def read_meta(folder: Path) -> dict[str, Any]:
    """product.json of a folder. Raises `UserError` where there is none."""
    path = Path(folder) / "product.json"
    if not path.is_file():
        raise UserError(
            f"There is no product in '{folder}': it holds no product.json. Give a run's folder, or the product folder "
            "inside it."
        )
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(meta, dict):
            raise ValueError("no mapping")
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is no JSON mapping. {AGAIN}") from None
    return meta


def load_product(folder: str | Path, trust_code: bool = False) -> Any:
    """The product in a run folder or a product folder, as an object of its kind."""
    folder = Path(folder).expanduser()
    if (folder / "product" / "product.json").is_file():
        folder = folder / "product"
    kind = str(read_meta(folder).get("kind", ""))
    wrong = damage(folder)
    if wrong is not None:
        raise UserError(
            f"The product in {folder} is not as it was written: {wrong}. {AGAIN} If you changed it yourself, remove "
            f"{CHECKSUMS} there."
        )
    module, _, name = KINDS.get(kind, kind).partition(":")
    if not name or module not in {c.module for c in catalog.list_methods()} | {
        w.partition(":")[0] for w in KINDS.values()
    }:
        raise unknown("kind of product", kind, KINDS)  # a file may name only the modules of installed methods
    cls = getattr(importlib.import_module(module), name, None)
    if not isinstance(cls, type) or not issubclass(cls, Product):
        raise unknown("kind of product", kind, KINDS)
    try:
        return cls.load(folder, trust_code)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a file that no run wrote may cause
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The product in {folder} cannot be loaded ({type(error).__name__}: {reason}); a file of it is damaged, or "
            f"of another version. {AGAIN}"
        ) from error


def load(folder: str | Path, trust_code: bool = False) -> Any:
    """The product of a finished run, ready to use: for a student, its network as an `nn.Module` in evaluation mode, on
    the CPU; other kinds as they are.

    Args:
        folder: a run's folder, or the product folder inside it.
        trust_code: allow a model that your own Python file builds (`file:`).

    Raises:
        UserError: no product there, or weights that do not fit.
    """
    product = load_product(folder, trust_code)
    return product.module if isinstance(product, Student) else product


def state_on_cpu(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a module on the CPU, detached."""
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
