"""`RunTeachers`: teachers from their specs, trained first where they have no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from stillhouse.config.specs import DataSpec, InputSpec, ModelSpec, ObjectiveSpec, TeacherSpec, TrainSpec
from stillhouse.distillation.own_input import OwnInput, ViewInput
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError, unknown
from stillhouse.models import class_names
from stillhouse.models.sources import published_normalisation
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.staging import RunStages


class RunTeachers(RunStages):
    """Data, stages, and teachers from specs."""

    rehearsing = False

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, teachers are made as for training, but not trained or stored: what does not fit together is found
        before anything is trained."""
        outer = self.rehearsing, self.live_teachers, self._stores
        self.rehearsing, self.live_teachers, self._stores = True, [], {}
        try:
            yield
        finally:
            self.rehearsing, self.live_teachers, self._stores = outer

    def teacher(self, name: str, spec: TeacherSpec, data: DataSpec) -> Any:
        """A teacher from its spec; one without weights is trained first, as a stage that every recipe with the same
        teacher shares."""
        from stillhouse.distillation.teachers import CoTrainedTeacher, Ensemble, Momentum, PastSelf

        if spec.store is not None:
            return self._stored(name, spec, data)
        if spec.ensemble is not None:
            return Ensemble(
                [self.teacher(f"{name}.{i}", member, data) for i, member in enumerate(spec.ensemble)], spec.mean
            )
        if spec.momentum is not None:
            return Momentum(spec.momentum)
        if spec.past_self:
            past = PastSelf()
            bundle = self.data(data)
            past.start(self.loader(data, "train").labels(), bundle.num_classes)
            return past
        if spec.peer is not None:
            return CoTrainedTeacher(self.model(spec.peer, data, role=name), embedding=spec.peer.embedding)
        task, its = self.data(data).task, self.data(spec.data or data).task
        alike = type(its) is type(task)
        if alike and its.class_names != task.class_names and set(its.class_names) == set(task.class_names):
            raise UserError(
                f"The teacher '{name}' is trained on the student's classes in another order "
                f"({', '.join(its.class_names[:6])}, not "
                f"{', '.join(task.class_names[:6])}); give both data sets the same order."
            )
        model = self.network(name, spec, data, as_saved=True)
        prepare = self.own_input(spec, model, data)
        if alike:
            found = spec.model_copy(update={"model": self._located(spec.network, data).model})
            model, its = task.as_teacher(model, found, its), task.reads_as(model)
        else:
            model, its = its.serving(model, task)
        teacher = FrozenTeacher(model, embedding=spec.embedding, name=name, task=its, prepare=prepare)
        self.live_teachers.append(teacher)
        return teacher

    def own_input(self, spec: TeacherSpec, model: nn.Module, data: DataSpec) -> OwnInput | ViewInput | None:
        """What makes a teacher's input of a batch of the data, as its spec says; None: nothing, it reads the
        student's."""
        own = self._own_images(spec, model, data)
        if spec.view is None:
            return own
        if spec.view not in (data.views or {}):
            raise unknown("view", spec.view, data.views or {}, " in data.views")
        return ViewInput(spec.view, own)

    def _own_images(self, spec: TeacherSpec, model: nn.Module, data: DataSpec) -> OwnInput | None:
        """How the data's images become the teacher's: as its spec says; of a network with published weights, normalised
        as these were."""
        wanted, given = spec.input or InputSpec(), self.data(data).task.normalisation
        own = (wanted.mean, wanted.std) if wanted.mean is not None and wanted.std is not None else None
        if own is None and spec.pretrained and spec.train is None:
            own = published_normalisation(spec.network, model)
        its = self.data(spec.data or data).task
        if own is None and its.normalisation != given and all(its.normalisation):
            own = its.normalisation  # of the data that it is trained on
        needed = its.image_size if its.image_size != self.data(data).task.image_size else None
        if spec.input is None and own in (None, given) and needed is None:
            return None
        size = (wanted.size, wanted.size) if isinstance(wanted.size, int) else wanted.size or needed
        return OwnInput(given, own or ((), ()), size, wanted.pool or 1, wanted.interpolation)

    def network(self, name: str, spec: TeacherSpec, data: DataSpec, as_saved: bool = False) -> nn.Module:
        """The network of a live teacher with its weights, trained first where it has none.

        Its weights are in float32, or with `as_saved`, where they are not trained here, in the precision that a
        transformers folder has them in.
        """
        own_input = next((k for k in ("input", "view") if getattr(spec, k) is not None), None)
        if own_input is not None and not as_saved:
            raise UserError(
                f"The teacher '{name}' has an `{own_input}` of its own, but this method runs its network on the "
                "data's; leave it out."
            )
        seed, data, own = spec.seed or 0, spec.data or data, spec.network
        if as_saved and spec.train is None and own.model.startswith("hf:"):
            own = own.model_copy(update={"options": {"dtype": "auto", **own.options}})
        model = self.model(own, data, role="teacher", seed=seed, trained=spec.train is not None)
        if spec.train is not None:  # from published weights, or those of its checkpoint: fine-tuned
            if not self.rehearsing:
                trained = self.trained(
                    "teacher", model, spec.network, spec.train, data, seed, spec.objectives, spec.teacher
                )
                model.load_state_dict(trained["weights"])
                self.record.setdefault("teachers", {})[name] = {"model": spec.model, **trained["figures"]}
        elif spec.checkpoint is None and not spec.pretrained:
            raise UserError(
                f"The teacher '{name}' ({spec.model}) has no weights: give it a `checkpoint`, `pretrained: true`, or "
                "`train:` to train it first."
            )
        else:
            class_names.check(model, self.data(data).task.class_names, spec.model or name)
        return model

    def _stored(self, name: str, spec: TeacherSpec, data: DataSpec) -> Any:
        """A teacher read from its store, which is written first where the recipe says what to keep and not where it
        is."""
        from stillhouse.distillation.teachers import StoredTeacher
        from stillhouse.runs.stores import data_facts, make
        from stillhouse.store import Store

        if data.mixup or data.cutmix:
            raise UserError(
                f"The teacher '{name}' is read from a store, sample by sample, but data.mixup and data.cutmix mix a "
                "batch; set both to 0."
            )
        if data.unlabelled is not None:
            raise UserError(f"The teacher '{name}' is read from a store, which holds no data.unlabelled; run it live.")
        if self.rehearsing and not isinstance(spec.store, str):
            return self.teacher(name, spec.model_copy(update={"store": None}), data)
        folder = spec.store if isinstance(spec.store, str) else make(self, name, spec, data)
        bundle = self.data(data)
        store = Store(folder, verify=not self.rehearsing)
        store.check(data_facts(data, bundle), bundle.num_classes, bundle.dataset("train", train=True))
        opened = self._stores.setdefault(data.model_dump_json(), [])
        for other in opened:
            if (other.views, other.manifest["seed"]) != (store.views, store.manifest["seed"]):
                raise UserError(
                    f"The stores '{other.folder}' and '{store.folder}' hold other views of the samples ({other.views} "
                    f"of seed {other.manifest['seed']}, "
                    f"{store.views} of seed {store.manifest['seed']}), but a student sees one view at a time; cache "
                    "both with the same views and seed."
                )
        opened.append(store)
        return StoredTeacher(store, name=name)

    def trained(
        self,
        stage: str,
        model: nn.Module,
        spec: ModelSpec,
        train: TrainSpec,
        data: DataSpec,
        seed: int,
        objectives: Sequence[ObjectiveSpec] | None = None,
        teacher: TeacherSpec | None = None,
    ) -> dict[str, Any]:
        """A network trained by itself as a shared stage: {"weights": tensors, "figures": test figures}.

        Args:
            objectives: what is minimised; default: what its task calls plain training.
            teacher: whom they read.
        """
        from stillhouse.distillation.distillation import Distillation
        from stillhouse.distillation.weighted import objective_from_spec

        data = data.model_copy(update={"unlabelled": None})
        bundle = self.data(data)

        def make() -> dict[str, Any]:
            stores, self._stores = (
                self._stores,
                {},
            )  # a network trained alone sees its own augmentation, not the views of a store
            shown = list(self.live_teachers)  # a teacher's teacher is in no picture
            try:
                with self.seeded(seed):
                    losses = [objective_from_spec(o) for o in objectives or bundle.task.supervised]
                    source = None if teacher is None else self.teacher("teacher's teacher", teacher, data)
                    module = Distillation(model, source, losses, seed=seed, task=bundle.task)
                    loader = self.loader(data, "train", train.batch_size, train=True)
                    self.fit(stage, module, loader, train, evaluate=self.validating(data))
                module.close()
            finally:
                self._stores, self.live_teachers = stores, shown
            figures = (
                self.figures(model, data, self.loader(data, "test"), next(model.parameters()).device)
                if bundle.has("test")
                else {}
            )
            return {"weights": state_on_cpu(model), "figures": figures}

        start: dict[str, Any] = {}
        if spec.pretrained or spec.checkpoint:
            start["start"] = FrozenTeacher(model).fingerprint()
        if objectives is not None:
            start["objectives"] = [o.model_dump(mode="json") for o in objectives]
        if teacher is not None:
            start["teacher"] = self._identity(teacher, data)
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

    def _identity(self, spec: TeacherSpec, data: DataSpec) -> dict[str, Any]:
        """What a teacher from a spec depends on, as JSON data."""
        own = spec.data or data
        train = None if spec.train is None else spec.train.identity()
        nested = None if spec.teacher is None else self._identity(spec.teacher, own)
        facts = spec.model_dump(mode="json", exclude={"train", "teacher", "data"})
        return {
            **facts,
            "train": train,
            "teacher": nested,
            "data": self.data(own).fingerprint,
            "augment": _augmentation(own),
        }


def _augmentation(spec: DataSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", include={"augment", "mixup", "cutmix", "image_size"})
