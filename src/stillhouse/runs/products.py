"""Products: what a run leaves to keep. Each kind saves to a folder, loads from it, and is judged by the evaluator of its kind.

A product folder holds `product.json` (its kind and how it is made again) and data files: safetensors, never pickles.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from stillhouse import catalog
from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError, unknown
from stillhouse.files import written_beside
from stillhouse.runs import network_files

KINDS = {
    "student": "stillhouse.runs.products:Student",
    "language": "stillhouse.runs.language:Language",
    "synthetic_set": "stillhouse.synthetic.product:SyntheticSet",
}
"""Kind -> where its class is. A method that leaves another kind names it in `Product.kind` as `module:Class`, or adds a line here."""


class Product:
    """Something to keep. A kind gives `kind`, `save` and `load`, and where other programs can read it, `formats` and `export`.

    Attributes:
        kind: a key of `KINDS`, or `module:Class`.
        formats: format -> name of the file or folder; the default first.
        figures: of its making, such as `train_seconds`; kept with the run, not with the product.
    """

    kind: ClassVar[str]
    formats: ClassVar[Mapping[str, str]] = {}
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


@dataclass
class Student(Product):
    """A trained classifier and the recipe of its model.

    Attributes:
        module: the network, logits (B, C).
        model: how it is built again.
        num_classes, input_shape, classes, mean, std: of the data it was trained on.
        figures: of its training, such as `train_seconds`; kept with the run, not with the product.
    """

    kind: ClassVar[str] = "student"
    formats: ClassVar[Mapping[str, str]] = network_files.FORMATS
    module: nn.Module
    model: ModelSpec
    num_classes: int
    input_shape: tuple[int, ...]
    classes: list[str] = field(default_factory=list)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_model

        folder.mkdir(parents=True, exist_ok=True)
        on_cpu = {p.device.type for p in self.module.parameters()} <= {"cpu"}
        module = self.module if on_cpu else _copy_to_cpu(self.module)
        with written_beside(folder / "model.safetensors") as beside:
            save_model(module, str(beside))
        spec = self.model.model_copy(update={"checkpoint": None, "pretrained": False, "model": _bring_along(self.model.model, folder)})
        meta = {
            "kind": self.kind,
            "format": 1,
            "model": spec.model_dump(mode="json"),
            "num_classes": self.num_classes,
            "input_shape": list(self.input_shape),
            "classes": self.classes,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    def export(self, to: str, path: Path) -> list[str]:
        network_files.write_network(self.module, self.input_shape, to, path)
        return [f"Wrote {path}"]

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> Student:
        from stillhouse.models import build, load_weights

        meta = read_meta(folder)
        spec = ModelSpec.model_validate(meta["model"])
        if spec.model.startswith("file:") and not trust_code:
            raise UserError(
                f"The product in {folder} is built by the Python file '{spec.model}'; load it with trust_code=True if you trust that file."
            )
        for scheme, suffix in (("file:", ".py"), ("hf:", "")):
            brought = folder / spec.model.removeprefix(scheme)
            if spec.model.startswith(scheme) and Path(str(brought).rpartition(".py:")[0] + suffix if suffix else brought).exists():
                spec = spec.model_copy(update={"model": f"{scheme}{brought}"})
        module = build(spec, meta["num_classes"], tuple(meta["input_shape"]))
        load_weights(module, folder / "model.safetensors", owner=f"model {spec.model}")
        return cls(module.eval(), spec, meta["num_classes"], tuple(meta["input_shape"]), meta["classes"], tuple(meta["mean"]), tuple(meta["std"]))


def _bring_along(name: str, folder: Path) -> str:
    """The model's name, with the user's Python file or the transformers config that it points to copied into the product, so that the product stands alone."""
    if name.startswith("file:"):
        path, _, rest = name.removeprefix("file:").partition(".py")
        source = Path(path + ".py").expanduser()
        shutil.copyfile(source, folder / source.name)
        return f"file:{source.name}{rest}"
    config = Path(name.removeprefix("hf:")).expanduser() / "config.json"
    if name.startswith("hf:") and config.is_file():
        (folder / "config").mkdir()
        shutil.copyfile(config, folder / "config" / "config.json")
        return "hf:config"
    return name


def _copy_to_cpu(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).cpu()


def read_meta(folder: Path) -> dict[str, Any]:
    """product.json of a folder. Raises `UserError` where there is none."""
    path = Path(folder) / "product.json"
    if not path.is_file():
        raise UserError(f"There is no product in '{folder}': it holds no product.json. Give a run's folder, or the product folder inside it.")
    meta: dict[str, Any] = json.loads(path.read_text())
    return meta


def load_product(folder: str | Path, trust_code: bool = False) -> Any:
    """The product in a run folder or a product folder, as an object of its kind."""
    folder = Path(folder).expanduser()
    if (folder / "product" / "product.json").is_file():
        folder = folder / "product"
    kind = read_meta(folder).get("kind", "")
    module, _, name = KINDS.get(kind, kind).partition(":")
    if not name or module not in {c.module for c in catalog.list_methods()} | {w.partition(":")[0] for w in KINDS.values()}:
        raise unknown("kind of product", kind, KINDS)  # a file may name only the modules of installed methods
    cls = getattr(importlib.import_module(module), name)
    return cls.load(folder, trust_code)


def load(folder: str | Path, trust_code: bool = False) -> Any:
    """The product of a finished run, ready to use: for a student, its network as an `nn.Module` in evaluation mode, on the CPU; other kinds as they are.

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
