"""`RunData`: the data of a run, and networks sized for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from stillhouse.config.specs import DataSpec, MethodConfig, ModelSpec, NamedSpec, TeacherSpec
from stillhouse.data.source import find_root, located
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import judge
from stillhouse.models.backbone import Backbone, backbone
from stillhouse.processes import rank_world
from stillhouse.randomness import key as keys
from stillhouse.randomness import keyed
from stillhouse.runs.products import Student
from stillhouse.tasks.base import Task


class RunData:
    """What a run knows of data: bundles, loaders, networks sized for a task, and figures as the task has them.

    Args:
        config: the resolved recipe.
        data_root: where data is, before STILLHOUSE_DATA.
        bundles: data that was loaded before; what this run loads is added.
    """

    def __init__(
        self, config: MethodConfig, data_root: str | None = None, bundles: dict[str, Any] | None = None
    ) -> None:
        self.config, self.data_root, self.seed = config, data_root, config.seed
        self._bundles: dict[str, Any] = {} if bundles is None else bundles
        self._stores: dict[str, list[Any]] = {}  # data -> stores that its training batches replay

    def data(self, spec: NamedSpec, of: type[Task] = Task) -> Any:
        """The data set of a spec (a `stillhouse.data.Bundle`), loaded once.

        Raises:
            UserError: data of another task than `of`.
        """
        from stillhouse.data import load

        name = spec.model_dump_json() + ("" if isinstance(spec, DataSpec) else f" of seed {self.seed}")
        if name not in self._bundles:
            self._bundles[name] = load(spec, self.data_root, self.seed)
        bundle = self._bundles[name]
        if not isinstance(bundle.task, of):
            raise UserError(
                f"This method is for {of.name}, but data.name '{spec.name}' is data for {bundle.task.name}."
            )
        return bundle

    def loader(self, spec: NamedSpec, split: str, batch_size: int | None = None, *, train: bool = False) -> Any:
        """A loader of a split, by default of batches that suit evaluation; `train=True`: shuffled and augmented as the
        run's seed says, sharded over processes."""
        bundle = self.data(spec)
        dataset = bundle.dataset(split, train=train)
        if train and batch_size is not None and batch_size > len(dataset) > 0:
            raise UserError(
                f"A batch of {batch_size:,} samples is larger than the {split} split of '{spec.name}', which has "
                f"{len(dataset):,}; set batch_size to at most that."
            )
        if isinstance(spec, DataSpec) and split == "train" and (train or spec.augment == "plain"):
            from stillhouse.store import StoredDataset

            dataset = (
                StoredDataset(dataset, self._stores.setdefault(spec.model_dump_json(), []))
                if _reads_store(self.config)
                else dataset
            )
        default: int = bundle.evaluation_batch
        workers = spec.workers if isinstance(spec, DataSpec) else 0
        return _loader(dataset, batch_size or default, self.seed, train, workers)

    def unlabelled(self, spec: DataSpec, *, train: bool) -> Any:
        """The samples of `data.unlabelled` as a data set, which a method reads without their labels; -1 stands for a
        class that the task does not have.

        Raises:
            UserError: data without `unlabelled`.
        """
        from stillhouse.data.streams import pool_for

        if spec.unlabelled is None:
            raise UserError(
                f"The method '{self.config.method}' learns from unlabelled samples too: set data.unlabelled, such as "
                "{size: 1000}."
            )
        if spec.unlabelled.data is None:
            return self.data(spec).dataset("unlabelled", train=train)
        return pool_for(self.data(spec), self.data(spec.unlabelled.data)).dataset("train", train=train)

    def streams(self, spec: DataSpec, batch_size: int, *, second: str | None = None) -> Any:
        """Training batches, each of which carries one of `data.unlabelled` (a `stillhouse.data.Streams`).

        Args:
            second: the name of a second unlabelled batch, in an order of its own.

        Raises:
            UserError: data without `unlabelled`.
        """
        from stillhouse.data import Streams

        pool, other = self.unlabelled(spec, train=True), spec.unlabelled
        assert other is not None
        workers, seed = (other.data or spec).workers, keys(self.seed, "unlabelled")
        unlabelled = _loader(pool, other.batch_size or batch_size, seed, True, workers)
        both = Streams(self.loader(spec, "train", batch_size, train=True), unlabelled)
        if second is None:
            return both
        seed = keys(self.seed, "unlabelled", second)
        return Streams(both, _loader(pool, other.batch_size or batch_size, seed, True, workers), name=second)

    def model(
        self, spec: ModelSpec, data: DataSpec, role: str = "student", seed: int | None = None, trained: bool = True
    ) -> nn.Module:
        """The network of a spec, sized for the data, initialised as (seed, role) say. Where it is trained afterwards,
        its classifier may be new although the rest comes from a checkpoint."""
        found = self._located(spec.with_classifier("new" if trained else "same"), data)
        with keyed("model", role, self.seed if seed is None else seed):
            module: nn.Module = self.data(data).task.build(found)
            return module

    def backbone(self, spec: ModelSpec, data: DataSpec, role: str = "student") -> Backbone:
        """The network of a spec without its last layer, for the data's images, initialised as (seed, role) say."""
        with keyed("model", role, self.seed):
            return backbone(self._located(spec, data), self.data(data).input_shape)

    def _located(self, spec: ModelSpec, data: DataSpec) -> ModelSpec:
        """The spec with files that lie under the data root."""
        return ModelSpec.model_validate(located(spec.model_dump(), find_root(data, self.data_root)))

    def weights_file(self, path: str) -> Path:
        """A file of weights as given, or where there is none under the folder that holds data."""
        found = located({"checkpoint": path}, find_root(None, self.data_root))
        return Path(found["checkpoint"]).expanduser()

    def splits(self, spec: DataSpec, batch_size: int | None = None) -> dict[str, Any]:
        """Evaluation loaders of the splits that may steer training: train, and holdout and val where they exist."""
        bundle = self.data(spec)
        return {s: self.loader(spec, s, batch_size) for s in ("train", "holdout", "val") if bundle.has(s)}

    def validation(self, spec: DataSpec) -> Any:
        """The loader that may pick a checkpoint: val, else holdout, else None."""
        bundle = self.data(spec)
        for split in ("val", "holdout"):
            if bundle.has(split):
                return self.loader(spec, split)
        return None

    def validating(self, spec: DataSpec) -> Callable[[nn.Module, torch.device], dict[str, float]] | None:
        """What `fit` judges epochs by: the task's figures over the data that may pick a checkpoint (see `validation`);
        None where there is none."""
        check = self.validation(spec)
        return None if check is None else lambda model, device: self.figures(model, spec, check, device)

    def judging_data(self) -> tuple[NamedSpec, str]:
        """The recipe's data, and the split of it that a product is judged on: test, or val or holdout where there is
        none.

        Raises:
            UserError: a recipe without `data`, or data without any of these splits.
        """
        spec = getattr(self.config, "data", None)
        if not isinstance(spec, NamedSpec):
            raise UserError(
                "This recipe names no `data` to judge its product by; give it the data, or judge the product in its "
                "method."
            )
        split = next((s for s in ("test", "val", "holdout") if self.data(spec).has(s)), None)
        if split is None:
            raise UserError(
                "There is no data to judge by: give the data set a test part, or set data.val to a share above 0."
            )
        return spec, split

    def student(self, module: nn.Module, spec: ModelSpec, data: DataSpec, figures: Mapping[str, float]) -> Student:
        """A trained network as the product of this run."""
        return Student(module, spec, self.data(data).task, dict(figures))

    def figures(
        self, model: nn.Module, data: DataSpec, loader: Any, device: torch.device, groups: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Figures of a network over a loader, as the task of its data is judged; by default all groups."""
        task = self.data(data).task
        return judge(task, model, loader, device, task.groups if groups is None else groups)


def _loader(dataset: Any, batch_size: int, seed: int, train: bool, workers: int) -> Any:
    """Batches of a data set; of training: shuffled, whole, and a share for each process."""
    from stillhouse.data import Loader

    rank, world = rank_world() if train else (0, 1)
    return Loader(
        dataset,
        batch_size,
        seed=seed,
        shuffle=train,
        drop_last=train,
        workers=workers if train else 0,
        rank=rank,
        world=world,
    )


def _reads_store(config: Any) -> bool:
    """Whether a recipe names a stored teacher anywhere."""
    if isinstance(config, TeacherSpec) and config.store is not None:
        return True
    if isinstance(config, BaseModel):
        return any(_reads_store(getattr(config, name)) for name in type(config).model_fields)
    if isinstance(config, Mapping):
        return any(map(_reads_store, config.values()))
    return isinstance(config, list | tuple) and any(map(_reads_store, config))
