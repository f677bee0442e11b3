"""`Distillation`: the general training module. A student, named teachers and weighted objectives; one forward of each
network a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.distillation.teachers import PLAIN, FrozenTeacher, Reader, StoredTeacher, Teacher
from stillhouse.distillation.weighted import Objectives, WeightedObjective, objective_from_spec
from stillhouse.errors import UserError, nearest
from stillhouse.functional.counting import counted
from stillhouse.models.token_labels import place, refuse_copies
from stillhouse.randomness import keyed
from stillhouse.signals import Batch, Signals, first_samples, to_device
from stillhouse.tasks.base import Task
from stillhouse.training.module import TrainingModule

NOTHING = Signals()


class Distillation(TrainingModule):
    """Trains a student (and what learns with it) on the weighted sum of its objectives' terms.

    Frozen teachers stay outside the module tree: not in `state_dict()`, not switched by `.train()`, not in DDP's
    broadcast. Parameters of objectives, and teachers that learn (momentum, past self, co-trained), are inside.

    Args:
        student: the model being trained.
        teachers: one teacher, several by name, or none. A plain `nn.Module` becomes a `FrozenTeacher`
            named "teacher".
        objectives: names ("kd"), mappings ({"name": "kd", "temperature": 2}), objectives, or (objective, weight) pairs;
            a weight is a number or a `WeightSchedule`; default: the published weight.
        seed: seeds the objectives' own layers.
        embedding: the student's classifier submodule, where it cannot be detected.
        task: how the student, and teachers without a task of their own, are called and read; default: any model that
            gives logits.
        chunked: of language models: compute the losses from hidden states and the output matrix, some tokens at a time,
            so that a training step never has a tensor of all logits; None: where the vocabulary is big and all
            objectives, teachers and networks can. (See `functional/chunked.py`.)

    Call `build(batch)` once before training: it registers the hooks and creates the objectives' own layers.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Teacher | Mapping[str, nn.Module | Teacher] | None,
        objectives: Objectives,
        *,
        seed: int = 0,
        embedding: str | None = None,
        task: Task | None = None,
        chunked: bool | None = False,
    ) -> None:
        super().__init__()
        if not objectives:
            raise UserError("A distillation needs at least one objective.")
        self.student = student
        self._frozen_norms = frozen_norms(student)
        self.seed = seed
        named = dict(teachers) if isinstance(teachers, Mapping) else ({} if teachers is None else {"teacher": teachers})
        wrapped: dict[str, Teacher] = {
            name: t if isinstance(t, Teacher) else FrozenTeacher(t, name=name) for name, t in named.items()
        }
        self.learning = nn.ModuleDict({name: t for name, t in wrapped.items() if isinstance(t, nn.Module)})
        self._still = {name: t for name, t in wrapped.items() if not isinstance(t, nn.Module)}
        self._order = list(wrapped)
        self.entries = [self.entry(o) for o in objectives]
        self._distinct_labels()
        self.objectives = nn.ModuleList(e.objective for e in self.entries)
        self.task = task or PLAIN
        self._reader = Reader(student, "student", embedding, self.task)
        self._chunked = chunked
        self._built = False
        self._checked_taps = False
        self._classes: int | None = None  # of the student's logits, where it makes one prediction a sample
        self._student_outputs: Signals | None = None
        self._first = [
            name
            for name in self._still
            if any(e.objective.teacher == name for e in self.entries) and not self._still[name].reads_student
        ]
        self._observing = [t for t in wrapped.values() if isinstance(t, nn.Module)]
        self._stepping = [e for e in self.entries if type(e.objective).before_step is not Objective.before_step]

    @staticmethod
    def entry(item: Any) -> WeightedObjective:
        """An objective in any of the forms that `objectives` takes, with its weight and its name in logs."""
        if isinstance(item, WeightedObjective):
            return item
        if not isinstance(item, Objective | tuple):
            return objective_from_spec(item)
        objective, weight = item if isinstance(item, tuple) else (item, item.default_weight)
        return WeightedObjective(objective, weight, getattr(objective, "name", type(objective).__name__.lower()))

    def _distinct_labels(self) -> None:
        labels = [e.label for e in self.entries]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(f"Two objectives are logged as '{label}': give one of them a `label`.")

    @property
    def teachers(self) -> dict[str, Any]:
        """All teachers by name, in the order given."""
        return {name: self.learning[name] if name in self.learning else self._still[name] for name in self._order}

    # ---- before training ---------------------------------------------------------------------------------------------

    def build(self, batch: Batch) -> Distillation:
        """Check needs, make hooks, and size the objectives' layers from the first two samples of `batch` (evaluation
        mode, no autograd).

        Raises:
            UserError: an objective that needs what its teacher or the batch does not give; a tap that does not exist or
                is not reached; teacher and student with different class counts; predictions of positions for an
                objective of samples, or labels that do not stand where they stand.
        """
        if self._built:
            return self
        refuse_copies(place(batch, self.student), self.student)
        probe = first_samples(batch, 2)
        device = next(self.student.parameters()).device
        probe = to_device(probe, device)
        teachers = self.teachers
        for entry in self.entries:
            self._check_needs(entry, teachers, batch)
        for teacher in self._still.values():
            teacher.to(device)
        mode = self.training
        try:
            self._probe(probe, batch, teachers, device)
            for name, teacher in teachers.items():
                refuse_shared_state(self.student, teacher, name)
        except BaseException:
            self.close()
            raise
        finally:
            self.train(mode)
        self._built = True
        return self

    def train(self, mode: bool = True) -> Distillation:
        """As `nn.Module.train`, but batch norm that was frozen in the student stays as it is (see `frozen_norms`)."""
        super().train(mode)
        self.hold_frozen()
        return self

    def hold_frozen(self) -> None:
        """Put the student's frozen batch norm into evaluation mode, for a loop that calls the student's own
        `train()`."""
        for norm in self._frozen_norms:
            norm.eval()

    def _probe(self, probe: Batch, batch: Batch, teachers: Mapping[str, Any], device: torch.device) -> None:
        with torch.no_grad(), keyed("build", self.seed):
            self.student.eval()
            self._reader.attach(self._wanted("student."), probe)
            for name, teacher in teachers.items():
                teacher.attach(self._wanted("teacher.", name), probe, self.student)
                if isinstance(teacher, nn.Module):
                    teacher.to(device).eval()
            readers = [self._reader, *(r for t in teachers.values() for r in t.readers())]
            for reader in readers:
                reader.task = reader.task or self.task
            self._make_chunked(readers, probe)
            student = self._reader(probe)
            self._classes = (
                student.logits.shape[-1] if student.logits is not None and student.logits.ndim == 2 else None
            )
            outputs = {name: teacher(probe, student) for name, teacher in teachers.items()}
            refuse_other_classes(student, batch, self.task)
            for owner, signals in {
                "student": student,
                **{f"teacher '{name}'": s for name, s in outputs.items()},
            }.items():
                refuse_another_task(owner, signals, probe)
            for entry in self.entries:
                theirs = outputs.get(entry.objective.teacher, NOTHING)
                self._check_classes(entry, student, theirs)
                self._check_positions(entry, student, probe)
                entry.objective.build(student, theirs, probe)
            self.objectives.to(device)

    def _make_chunked(self, readers: Sequence[Reader], probe: Batch) -> None:
        """Call all networks without their last layer, where it is wanted and can be. Raises `UserError` where it must
        be and cannot."""
        if self._chunked is False or (self._chunked is None and not self.task.prefers_chunks):
            return
        task = self._why_not_chunked() or self.task.chunked({reader.owner: reader.model for reader in readers}, probe)
        if isinstance(task, Task):
            for reader in readers:
                reader.task = task
        elif self._chunked:
            raise UserError(f"chunked: true cannot be: {task}; leave it out.")

    def _why_not_chunked(self) -> str | None:
        """What keeps the losses from being computed in chunks, whatever the networks: a clause for the message; None
        where nothing does."""
        for entry in self.entries:
            if not entry.objective.reads_hidden:
                return (
                    f"the objective '{entry.label}' reads logits, not hidden states as gkd, taid, seq_kd, and ce "
                    "without label smoothing can"
                )
            teacher = self.teachers.get(entry.objective.teacher)
            top = teacher is not None and "top" in teacher.gives and "logits" not in teacher.gives
            if top and not entry.objective.top_in_chunks:
                return f"the objective '{entry.label}' reads the student's logits where a teacher gives its top k"
        for name, teacher in self.teachers.items():
            if not isinstance(teacher, StoredTeacher) and len(teacher.readers()) != 1:
                return f"the teacher '{name}' is no single network and no store"
        return None

    def _wanted(self, side: str, teacher: str | None = None) -> set[str]:
        return {
            need.removeprefix(side)
            for e in self.entries
            for need in e.objective.needs
            if need.startswith(side) and (teacher is None or e.objective.teacher == teacher)
        }

    def _check_needs(self, entry: WeightedObjective, teachers: Mapping[str, Teacher], batch: Batch) -> None:
        objective = entry.objective
        wanted = {n.removeprefix("teacher.").partition(":")[0] for n in objective.needs if n.startswith("teacher.")}
        if wanted:
            if objective.teacher not in teachers:
                close = nearest(objective.teacher, teachers)
                there = (
                    f"did you mean '{close[0]}'?"
                    if close
                    else (f"there are: {', '.join(teachers)}." if teachers else "there is no teacher at all.")
                )
                raise UserError(f"The objective '{entry.label}' reads the teacher '{objective.teacher}'; {there}")
            gives = {g.removesuffix("s") for g in teachers[objective.teacher].gives}
            for want in sorted(wanted):
                if want.removesuffix("s") not in gives and not (
                    want == "logits" and "top" in gives and objective.reads_top
                ):
                    raise UserError(
                        f"The objective '{entry.label}' needs the teacher's {want}, but the teacher "
                        f"'{objective.teacher}' gives only "
                        f"{', '.join(sorted(teachers[objective.teacher].gives))}{teachers[objective.teacher].hint}."
                    )
        for key in ("label", "index"):
            if key in objective.needs and key not in batch:
                raise UserError(
                    f"The objective '{entry.label}' needs `{key}` in every batch, but the data gives only: "
                    f"{', '.join(batch)}."
                )

    @staticmethod
    def _check_classes(entry: WeightedObjective, student: Signals, teacher: Signals) -> None:
        if "teacher.logits" not in entry.objective.needs or not getattr(entry.objective, "same_classes", True):
            return
        classes = (
            student.parts["output_weight"].shape[0]
            if student.logits is None and "output_weight" in student.parts
            else None
        )
        classes = classes if student.logits is None else student.logits.shape[-1]
        source = (
            teacher.logits
            if teacher.logits is not None
            else teacher.probs
            if teacher.probs is not None
            else teacher.members[0].logits
            if teacher.members
            else None
        )
        theirs = (
            source.shape[-1]
            if source is not None
            else len(teacher.parts["output_weight"])
            if "output_weight" in teacher.parts
            else None
        )
        if classes is not None and theirs is not None and theirs != classes:
            raise UserError(
                f"The objective '{entry.label}' compares class probabilities, but the teacher has {theirs} classes "
                f"and the student {classes}."
            )

    @staticmethod
    def _check_positions(entry: WeightedObjective, student: Signals, batch: Batch) -> None:
        """Refuse predictions of positions for an objective of samples, and labels that do not stand where the
        predictions stand."""
        logits = student.logits
        if "student.logits" not in entry.objective.needs:
            return
        if logits is None and student.parts and not entry.objective.reads_hidden:
            raise UserError(
                f"The objective '{entry.label}' reads logits, but the student gives none, only "
                f"{', '.join(student.parts)}; take an objective that reads its taps, such as fitnet or at."
            )
        if logits is None:
            return
        if entry.objective.positions:
            counted(batch, logits.shape[:-1])
        elif logits.ndim != 2:
            raise UserError(
                f"The objective '{entry.label}' takes one prediction a sample, (B, C), but the student's logits have "
                f"shape {tuple(logits.shape)}; "
                "of tokens and pixels, those take one a position that say so, such as ce, kd and gkd."
            )
        elif batch.get("mask") is not None:
            raise UserError(
                f"The batch's `mask` says what counts, but the objective '{entry.label}' counts every sample; leave "
                "the mask out."
            )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile the student and the live teachers in place (after `build`, whose hooks must come first)."""
        if not self._built:
            raise UserError("Call build(batch) before compile(): hooks registered after compilation never fire.")
        self._reader.compile(*args, **kwargs)
        for teacher in self._still.values():
            for reader in teacher.readers():
                reader.compile(*args, **kwargs)

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: the student, co-trained peers, and what objectives own."""
        groups: list[dict[str, Any]] = [{"params": [p for p in self.student.parameters() if p.requires_grad]}]
        for teacher in self.learning.values():
            params = [p for p in teacher.parameters() if p.requires_grad]
            if params:
                groups.append({"params": params})
        for entry in self.entries:
            groups += entry.objective.param_groups()
        return groups

    # ---- hooks of the engine -----------------------------------------------------------------------------------------

    def prepare(self, ctx: Context) -> None:
        """Once before training.

        Raises:
            UserError: an objective that needs labels over data of which some have none (class id -1), or what an
                objective raises.
        """
        readers = [e.label for e in self.entries if "label" in e.objective.needs]
        labels = _class_ids(ctx)
        if labels is not None and self._classes is not None and len(labels) and int(labels.max()) >= self._classes:
            raise UserError(
                f"The training data has the label {int(labels.max())}, but the student gives scores of {self._classes} "
                f"classes (0 to {self._classes - 1}); give it a class for each label."
            )
        missing = int((labels == -1).sum()) if readers and labels is not None else 0
        if missing:
            raise UserError(
                f"The objective '{readers[0]}' needs labels, but {missing:,} training samples have none (label -1); "
                "leave them out, or use only objectives without labels, such as kd."
            )
        for entry in self.entries:
            entry.objective.prepare(ctx)

    def begin_epoch(self, ctx: Context) -> None:
        """At the start of each epoch."""
        for entry in self.entries:
            entry.objective.begin_epoch(ctx)

    def before_step(self, batch: Batch, ctx: Context) -> None:
        """Inner steps of objectives that have one; teachers that do not read the student answer here, once, for the
        step that follows too."""
        if not self._stepping:
            return
        place(batch, self.student)
        outputs = batch.setdefault("_teachers", {})
        for entry in self._stepping:
            name = entry.objective.teacher
            if name in self._still and name not in outputs:
                outputs[name] = self._still[name](batch)
            elif name in self.learning and name not in outputs:
                outputs[name] = self.learning[name](batch).detach()
            entry.objective.before_step(batch, outputs.get(name, NOTHING), ctx)
        for name in list(outputs):
            if name in self.learning:
                del outputs[name]

    def before_update(self, ctx: Context) -> None:
        """Before each optimiser step, when the gradients are there: objectives may read or change them."""
        for entry in self.entries:
            entry.objective.before_update(ctx)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss` (the weighted sum) and every term by name, unweighted: `ce`, `kd`, or `nkd.target`; scalars on the
        device."""
        place(batch, self.student)
        outputs: dict[str, Signals] = dict(batch.get("_teachers") or {})
        for (
            name
        ) in self._first:  # before the student, whose saved activations would lie under a teacher's working memory
            if name not in outputs:
                outputs[name] = self._still[name](batch)
        student = self._reader(batch)
        if not self._checked_taps:
            self._check_gradient(student)
        total: Tensor | None = None
        out: dict[str, Tensor] = {}
        for entry in self.entries:
            objective = entry.objective
            name = objective.teacher
            if name not in outputs:
                outputs[name] = self._ask(name, batch, student)
            weight = entry.at(progress)
            terms = objective(student, outputs[name], batch, progress)
            for term, value in terms.items():
                if term.startswith("log:"):
                    out[f"{entry.label}.{term[4:]}"] = value.detach()
                    continue
                out[entry.label if len(terms) == 1 or term == "loss" else f"{entry.label}.{term}"] = value
                total = value * weight if total is None else total + value * weight
        if self._observing:
            self._student_outputs = Signals(logits=None if student.logits is None else student.logits.detach())
        assert total is not None
        out["loss"] = total
        return out

    def figures(self) -> dict[str, float]:
        """After training: what the objectives report of themselves."""
        return {name: value for entry in self.entries for name, value in entry.objective.figures().items()}

    def read_student(self, batch: Batch) -> Signals:
        return self._reader(batch)

    def _ask(self, name: str, batch: Batch, student: Signals) -> Signals:
        if name in self._still:
            return self._still[name](batch, student)
        return self.learning[name](batch, student) if name in self.learning else NOTHING

    def _check_gradient(self, student: Signals) -> None:
        if not torch.is_grad_enabled() or not self.training:
            return
        for name, tap in student.taps.items():
            if tap.is_floating_point() and not tap.requires_grad:  # counts and ids have none
                raise UserError(
                    f"The student's tap '{name}' carries no gradient, so a loss on it would train nothing; is that "
                    "part frozen, or under gradient checkpointing with use_reentrant=True?"
                )
        self._checked_taps = True

    def after_step(self, batch: Batch, progress: Progress, stepped: bool) -> None:
        """The student's weights are put back into the range of its task; teachers that learn look at its outputs, and
        follow it after an optimiser step."""
        if stepped:
            self.task.constrain(self.student)
        for teacher in self._observing:
            assert self._student_outputs is not None
            teacher.observe(batch, self._student_outputs, progress)
            if stepped:
                teacher.follow(self.student)
        self._student_outputs = None

    def close(self) -> None:
        """Remove all hooks from all models."""
        self._reader.close()
        for teacher in self.teachers.values():
            teacher.close()
        self._built = False

    def taps(self) -> dict[str, dict[str, str]]:
        """What is captured, by network: name asked for -> submodule."""
        out = {"student": self._reader.paths}
        for name, teacher in self.teachers.items():
            for reader in teacher.readers():
                out.setdefault(name, {}).update(reader.paths)
        return {k: v for k, v in out.items() if v}


def frozen_norms(student: nn.Module) -> list[nn.Module]:
    """The batch norm that the user froze: in evaluation mode inside a network in training mode, or with weights that
    are not to be trained.

    Its running statistics must not move, but `train()` would switch it back to training mode.
    """
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return [
        m
        for m in norms
        if (student.training and not m.training)
        or (m.weight is not None and not any(p.requires_grad for p in m.parameters()))
    ]


def refuse_shared_state(student: nn.Module, teacher: Teacher, name: str) -> None:
    """Raises `UserError` where a teacher holds weights, statistics or dropout of the student's: it would train along
    with it, and leave evaluation mode."""
    mine = {p.untyped_storage().data_ptr(): n for n, p in student.named_parameters() if p.requires_grad}
    for path, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            mine |= {
                b.untyped_storage().data_ptr(): f"{path}.{n}".lstrip(".")
                for n, b in module.named_buffers(recurse=False)
            }
    mine.pop(0, None)  # tensors without storage
    dropouts = {id(m): n for n, m in student.named_modules() if "drop" in type(m).__name__.lower()}
    for network in (reader.model for reader in teacher.readers()):
        tensors = [*network.parameters(), *network.buffers()]
        shared = [mine[at] for t in tensors if (at := t.untyped_storage().data_ptr()) in mine]
        shared += [dropouts[id(m)] for m in network.modules() if id(m) in dropouts]
        if shared:
            raise UserError(
                f"The teacher '{name}' shares '{shared[0]}' with the "
                f"student{f' (and {len(shared) - 1} more)' if shared[1:] else ''}, "
                "so it would change as the student trains; give the teacher a copy of its own (copy.deepcopy)."
            )


def refuse_other_classes(student: Signals, batch: Batch, task: Task) -> None:
    """Raises `UserError` where the student's logits are for other classes than the data has, or a label is beyond
    them."""
    logits, label = student.logits, batch.get("label")
    if logits is None:
        return
    classes = logits.shape[-1]
    if task.outcomes and task.outcomes != classes:
        raise UserError(
            f"The student gives scores of {classes} classes, but the data has {task.outcomes}; leave the "
            "number of classes out of its options, or choose other data."
        )
    if not isinstance(label, Tensor) or label.is_meta or label.is_floating_point() or not label.numel():
        return
    if logits.ndim == label.ndim + 1:
        largest = int(label.max())
        if largest >= classes:
            raise UserError(
                f"The data has the label {largest}, but the student gives scores of {classes} classes "
                f"(0 to {classes - 1}); give it a class for each label."
            )


def refuse_another_task(owner: str, signals: Signals, batch: Batch) -> None:
    """Raises `UserError` where a network gives a score map or a sequence of scores for samples that have one class
    each."""
    logits, label = signals.logits, batch.get("label")
    if logits is None or label is None or logits.ndim == 2 or label.ndim > 2:
        return
    if label.ndim == 1 or label.is_floating_point():
        raise UserError(
            f"The {owner} gives scores of shape {tuple(logits.shape)} for {len(label)} samples that have one class "
            f"each (labels {tuple(label.shape)}): it is "
            "a network of another task, such as segmentation; take one that gives (B, C)."
        )


def _class_ids(ctx: Context) -> Tensor | None:
    """The class ids of the training samples; None where they are not known beforehand, or are no class ids."""
    try:
        labels = ctx.labels("train")
    except UserError:
        return None
    return labels if labels.ndim == 1 and not labels.is_floating_point() else None
