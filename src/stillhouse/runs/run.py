"""`Run`: the folder, seed, device, data, models, stages and loops of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from stillhouse.config.specs import DataSpec, InputSpec, MethodConfig, ModelSpec, NamedSpec, TeacherSpec, TrainSpec
from stillhouse.distillation.own_input import OwnInput
from stillhouse.distillation.teachers import Frozen
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import judge
from stillhouse.files import cache_folder
from stillhouse.models import class_names
from stillhouse.models.sources import published_normalisation
from stillhouse.processes import rank_world
from stillhouse.randomness import keyed
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.stages import kept
from stillhouse.tasks.base import Task
from stillhouse.training.display import Live
from stillhouse.training.engine import Fitted, fit
from stillhouse.training.loop import loop

C = TypeVar("C", bound=MethodConfig)
T = TypeVar("T")


class Run:
    """What a method asks for data, models, stages and loops. Everything is under `folder`; stages that other runs may share are in the cache.

    Args:
        folder: the run's own folder; None for a plan, which writes nothing.
        config: the resolved recipe.
        data_root: where data is, before STILLHOUSE_DATA.
        live: the display.
        cpu: stay on the CPU.
    """

    def __init__(
        self, folder: Path | None, config: MethodConfig, *, data_root: str | None = None, live: Live | None = None, cpu: bool = False
    ) -> None:
        self._folder, self.config, self.data_root, self.live, self.cpu = folder, config, data_root, live or Live(), cpu
        self.seed = config.seed
        self.planned: set[str] | None = None
        self.record: dict[str, Any] = {}  # further facts for environment.json and the report
        self.live_teachers: list[Frozen] = []  # for the pictures of the report
        self._bundles: dict[str, Any] = {}
        self._stores: dict[str, list[Any]] = {}  # data -> stores that its training batches replay

    @property
    def folder(self) -> Path:
        assert self._folder is not None, "a plan writes nothing"
        return self._folder

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() and not self.cpu else "cpu")

    # ---- data and models -------------------------------------------------------------------------------------------------------------------

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
            raise UserError(f"This method is for {of.name}, but data.name '{spec.name}' is data for {bundle.task.name}.")
        return bundle

    def loader(self, spec: NamedSpec, split: str, batch_size: int | None = None, *, train: bool = False) -> Any:
        """A loader of a split, by default of batches that suit evaluation; `train=True`: shuffled and augmented as the run's seed says, sharded over processes."""
        from stillhouse.data import Loader

        bundle = self.data(spec)
        dataset = bundle.dataset(split, train=train)
        if isinstance(spec, DataSpec) and split == "train" and (train or spec.augment == "plain"):
            from stillhouse.store import StoredDataset

            dataset = StoredDataset(dataset, self._stores.setdefault(spec.model_dump_json(), [])) if _reads_store(self.config) else dataset
        default: int = bundle.evaluation_batch
        rank, world = rank_world() if train else (0, 1)
        workers = spec.workers if train and isinstance(spec, DataSpec) else 0
        return Loader(dataset, batch_size or default, seed=self.seed, shuffle=train, drop_last=train, workers=workers, rank=rank, world=world)

    def model(self, spec: ModelSpec, data: DataSpec, role: str = "student", seed: int | None = None) -> nn.Module:
        """The network of a spec, sized for the data, initialised as (seed, role) say."""
        with keyed("model", role, self.seed if seed is None else seed):
            module: nn.Module = self.data(data).task.build(spec)
            return module

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
        """What `fit` judges epochs by: the task's figures over the data that may pick a checkpoint (see `validation`); None where there is none."""
        check = self.validation(spec)
        return None if check is None else lambda model, device: self.figures(model, spec, check, device)

    def judging_data(self) -> tuple[NamedSpec, str]:
        """The recipe's data, and the split of it that a product is judged on: test, or val or holdout where there is none.

        Raises:
            UserError: a recipe without `data`, or data without any of these splits.
        """
        spec = getattr(self.config, "data", None)
        if not isinstance(spec, NamedSpec):
            raise UserError("This recipe names no `data` to judge its product by; give it the data, or judge the product in its method.")
        split = next((s for s in ("test", "val", "holdout") if self.data(spec).has(s)), None)
        if split is None:
            raise UserError("There is no data to judge by: give the data set a test part, or set data.val to a share above 0.")
        return spec, split

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Inside, the run's seed is another: that of a stage which runs with other seeds share."""
        outer, self.seed = self.seed, seed
        try:
            yield
        finally:
            self.seed = outer

    def student(self, module: nn.Module, spec: ModelSpec, data: DataSpec, figures: Mapping[str, float]) -> Student:
        """A trained network as the product of this run."""
        return Student(module, spec, self.data(data).task, dict(figures))

    def figures(self, model: nn.Module, data: DataSpec, loader: Any, device: torch.device, groups: Sequence[str] | None = None) -> dict[str, float]:
        """Figures of a network over a loader, as the task of its data is judged; by default all groups."""
        task = self.data(data).task
        return judge(task, model, loader, device, task.groups if groups is None else groups)

    def evaluated(self, product: Any) -> dict[str, float]:
        """The figures of a product on test data, by the evaluator of its kind: a function (product, run) -> {name: number}."""
        from stillhouse.runs.evaluators import evaluator

        return evaluator(product.kind)(product, self)

    # ---- stages ----------------------------------------------------------------------------------------------------------------------------

    def stage(self, name: str, make: Callable[[], T], uses: Mapping[str, Any], *, shared: bool = True) -> T:
        """The result of `make()`, kept on disk under a hash of `uses` and reused by every run that uses the same.

        Inside `make`, `run.folder` is the stage's own folder, so that a fit that was cut off goes on. The result may be a mapping of tensors, plain
        JSON data, or a mapping of those two. Two processes that want the same stage take turns.

        Args:
            name: one of the plan's stages (an index may follow a dot: `expert.3`).
            uses: everything that the result depends on, as JSON data.
            shared: keep it in the cache for other runs; False: in the run's folder.
        """
        if self.planned is not None and name.split(".")[0] not in self.planned:
            raise UserError(f"The stage '{name}' is not in the method's plan ({', '.join(sorted(self.planned))}).")

        def inside(folder: Path) -> T:
            outer, self._folder = self._folder, folder
            try:
                return make()
            finally:
                self._folder = outer

        return kept((cache_folder() if shared else self.folder) / "stages", name, inside, uses)

    def fit(
        self,
        name: str,
        module: Any,
        train: Any,
        spec: TrainSpec,
        *,
        evaluate: Callable[..., dict[str, float]] | None = None,
        splits: Mapping[str, Any] | None = None,
    ) -> Fitted:
        """Train a module over a loader (see `stillhouse.training.engine.fit`) in this run's folder."""
        return fit(
            module, train, spec, folder=self.folder, stage=name, seed=self.seed, evaluate=evaluate, splits=splits, live=self.live, cpu=self.cpu
        )

    def last_step(self, module: Any, train: Any, spec: TrainSpec, splits: Mapping[str, Any]) -> tuple[Any, Any]:
        """A batch on the device and the context of a fit's last epoch, to measure a further step by (see `evaluation.cost.step_cost`)."""
        from stillhouse.distillation.objective import Progress
        from stillhouse.signals import to_device
        from stillhouse.training.context import TrainingContext

        device = next(p.device for p in module.parameters())
        progress = Progress(epoch=spec.epochs - 1, steps_per_epoch=len(train), epochs=spec.epochs)
        batch = to_device(next(iter(train.batches(spec.epochs - 1, 0, spec.epochs))), device)
        return batch, TrainingContext(module, progress, splits, self.seed, device, self.folder, train)

    def loop(self, name: str, state: Mapping[str, Any], step: Callable[[int], Mapping[str, Tensor]], steps: int, **options: Any) -> float:
        """The same loop where there is no loader (see `stillhouse.training.loop.loop`)."""
        return loop(self.folder, name, state, step, steps, seed=self.seed, live=self.live, **options)

    # ---- teachers --------------------------------------------------------------------------------------------------------------------------

    def teacher(self, name: str, spec: TeacherSpec, data: DataSpec) -> Any:
        """A teacher from its spec; one without weights is trained first, as a stage that every recipe with the same teacher shares."""
        from stillhouse.distillation.teachers import CoTrained, Ensemble, Momentum, PastSelf

        if spec.store is not None:
            return self._stored(name, spec, data)
        if spec.ensemble is not None:
            return Ensemble([self.teacher(f"{name}.{i}", member, data) for i, member in enumerate(spec.ensemble)], spec.mean)
        if spec.momentum is not None:
            return Momentum(spec.momentum)
        if spec.past_self:
            past = PastSelf()
            bundle = self.data(data)
            past.start(self.loader(data, "train").labels(), bundle.num_classes)
            return past
        if spec.peer is not None:
            return CoTrained(self.model(spec.peer, data, role=name), embedding=spec.peer.embedding)
        task, its = self.data(data).task, self.data(spec.data or data).task
        if its.class_names != task.class_names and set(its.class_names) == set(task.class_names):
            raise UserError(
                f"The teacher '{name}' is trained on the student's classes in another order ({', '.join(its.class_names[:6])}, not "
                f"{', '.join(task.class_names[:6])}); give both data sets the same order."
            )
        model = self.network(name, spec, data, as_saved=True)
        prepare = self._own_input(spec, model, data)
        if type(its) is type(task):
            model, its = task.as_teacher(model, spec, its), task
        teacher = Frozen(model, embedding=spec.embedding, name=name, task=its, prepare=prepare)
        self.live_teachers.append(teacher)
        return teacher

    def _own_input(self, spec: TeacherSpec, model: nn.Module, data: DataSpec) -> OwnInput | None:
        """How the data's images become the teacher's: as its spec says; of a network with published weights, normalised as these were."""
        wanted, given = spec.input or InputSpec(), self.data(data).task.normalisation
        own = (wanted.mean, wanted.std) if wanted.mean is not None and wanted.std is not None else None
        if own is None and spec.pretrained and spec.train is None:
            own = published_normalisation(spec.network, model)
        if spec.input is None and own in (None, given):
            return None
        size = (wanted.size, wanted.size) if isinstance(wanted.size, int) else wanted.size
        return OwnInput(given, own or ((), ()), size, wanted.pool or 1)

    def network(self, name: str, spec: TeacherSpec, data: DataSpec, as_saved: bool = False) -> nn.Module:
        """The network of a live teacher with its weights, trained first where it has none.

        Its weights are in float32, or with `as_saved`, where they are not trained here, in the precision that a transformers folder has them in.
        """
        if spec.input is not None and not as_saved:
            raise UserError(f"The teacher '{name}' has an `input` of its own, but this method runs its network on the data's; leave it out.")
        seed, data, own = spec.seed or 0, spec.data or data, spec.network
        if as_saved and spec.train is None and own.model.startswith("hf:"):
            own = own.model_copy(update={"options": {"dtype": "auto", **own.options}})
        model = self.model(own, data, role="teacher", seed=seed)
        if spec.train is not None and spec.checkpoint is None:  # from published weights where it is pretrained: fine-tuned
            trained = self.trained("teacher", model, spec.network, spec.train, data, seed)
            model.load_state_dict(trained["weights"])
            self.record.setdefault("teachers", {})[name] = {"model": spec.model, **trained["figures"]}
        elif spec.checkpoint is None and not spec.pretrained:
            raise UserError(
                f"The teacher '{name}' ({spec.model}) has no weights: give it a `checkpoint`, `pretrained: true`, or `train:` to train it first."
            )
        else:
            class_names.check(model, self.data(data).task.class_names, spec.model or name)
        return model

    def _stored(self, name: str, spec: TeacherSpec, data: DataSpec) -> Any:
        """A teacher read from its store, which is written first where the recipe says what to keep and not where it is."""
        from stillhouse.distillation.teachers import Stored
        from stillhouse.runs.stores import data_facts, make
        from stillhouse.store import Store

        if data.mixup or data.cutmix:
            raise UserError(
                f"The teacher '{name}' is read from a store, sample by sample, but data.mixup and data.cutmix mix a batch; set both to 0."
            )
        folder = spec.store if isinstance(spec.store, str) else make(self, name, spec, data)
        bundle = self.data(data)
        store = Store(folder)
        store.check(data_facts(data, bundle), bundle.num_classes, bundle.dataset("train", train=True))
        beside = self._stores.setdefault(data.model_dump_json(), [])
        for other in beside:
            if (other.views, other.manifest["seed"]) != (store.views, store.manifest["seed"]):
                raise UserError(
                    f"The stores '{other.folder}' and '{store.folder}' hold other views of the samples ({other.views} of seed {other.manifest['seed']}, "
                    f"{store.views} of seed {store.manifest['seed']}), but a student sees one view at a time; cache both with the same views and seed."
                )
        beside.append(store)
        return Stored(store, name=name)

    def trained(self, stage: str, model: nn.Module, spec: ModelSpec, train: TrainSpec, data: DataSpec, seed: int) -> dict[str, Any]:
        """A network trained alone, on what its task calls plain training, as a shared stage: {"weights": tensors, "figures": test figures}."""
        from stillhouse.distillation.distillation import Distillation
        from stillhouse.distillation.weighted import objective_from_spec

        bundle = self.data(data)

        def make() -> dict[str, Any]:
            stores, self._stores = self._stores, {}  # a network trained alone sees its own augmentation, not the views of a store
            try:
                with self.seeded(seed):
                    objectives = [objective_from_spec(o) for o in bundle.task.supervised]
                    module = Distillation(model, None, objectives, seed=seed, task=bundle.task)
                    loader = self.loader(data, "train", train.batch_size, train=True)
                    self.fit(stage, module, loader, train, evaluate=self.validating(data))
                module.close()
            finally:
                self._stores = stores
            figures = self.figures(model, data, self.loader(data, "test"), next(model.parameters()).device) if bundle.has("test") else {}
            return {"weights": state_on_cpu(model), "figures": figures}

        start = {"start": Frozen(model).fingerprint()} if spec.pretrained else {}
        return self.stage(
            stage,
            make,
            {
                **start,
                "model": spec.model_dump(mode="json"),
                "train": train.identity(),
                "data": bundle.fingerprint,
                "augment": _augmentation(data),
                "seed": seed,
            },
        )


def _augmentation(spec: DataSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", include={"augment", "mixup", "cutmix", "image_size"})


def _reads_store(config: Any) -> bool:
    """Whether a recipe names a stored teacher anywhere."""
    if isinstance(config, TeacherSpec) and config.store is not None:
        return True
    if isinstance(config, BaseModel):
        return any(_reads_store(getattr(config, name)) for name in type(config).model_fields)
    if isinstance(config, Mapping):
        return any(map(_reads_store, config.values()))
    return isinstance(config, list | tuple) and any(map(_reads_store, config))
