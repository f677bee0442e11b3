"""Teachers: what each source of knowledge gives for a batch. FrozenTeacher and Ensemble are plain objects, so they are
in no checkpoint and no optimiser; Momentum, PastSelf and CoTrainedTeacher learn with the student, so they are modules
that are saved and restored.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.distillation.objective import Progress
from stillhouse.distillation.own_input import OwnInput, ViewInput
from stillhouse.errors import UserError
from stillhouse.signals import Batch, Signals, Taps, TopK, image_size, in_float32, own_precision
from stillhouse.tasks.base import Task

PLAIN = Task()
EVERYTHING = frozenset({"logits", "embedding", "taps", "parts"})


class Reader:
    """Calls a network once on a batch, as its task says, and reads its outputs, embedding and taps as `Signals`.

    Maps that a network holds as (B, H, W, C), as Swin transformers do, are given as (B, C, H, W): here, for everything
    that reads a tap. Which they are is decided at the first call.

    Args:
        model: the network.
        owner: what messages call it: "student", "teacher".
        embedding: the classifier submodule whose input is the embedding; None finds it.
        task: how the network is called and read; None: as the student's task says, and the plain way before that is
            known.
        prepare: makes the network's own input from a batch; None: the batch's.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: str,
        embedding: str | None = None,
        task: Task | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.model, self.owner, self._classifier = model, owner, embedding
        self.task, self.prepare = task, prepare
        self.losses = False  # whether the network's own losses are wanted, in training
        self._inside = False  # whether nothing but taps is wanted
        self._taps: Taps | None = None
        self._paths: dict[str, str] = {}  # name asked for -> tap of the model
        self._channels_last: frozenset[str] | None = None  # taps of the model that are (B, H, W, C)

    def attach(self, wanted: Iterable[str], probe: Batch) -> None:
        """Make the hooks for `embedding` and `tap:NAME` (a submodule, or `stage:N`), before any compilation; note
        whether the network's own `losses` are wanted."""
        self.close()
        wanted = set(wanted)
        self.losses = "losses" in wanted
        self._inside = bool(wanted) and all(name.startswith("tap:") for name in wanted)
        probe = self.prepared(probe)
        self._channels_last = None
        for name in sorted(wanted):
            if name == "embedding" and not (self.task or PLAIN).embeds:
                from stillhouse.models.anatomy import classifier

                self._classifier = self._classifier or classifier(self.model, probe)
                self._paths["embedding"] = f"{self._classifier}:in"
            elif name.startswith("tap:"):
                self._paths[name.removeprefix("tap:")] = self._resolve(name.removeprefix("tap:"))
        if self._paths:
            self._taps = Taps(self.model, list(self._paths.values()), self.owner)

    def _resolve(self, name: str) -> str:
        if name.partition(":")[0] in ("hidden", "query", "key"):
            from stillhouse.models.text_layers import tap

            return tap(self.model, name)
        if not name.startswith("stage:"):
            return name
        from stillhouse.models.anatomy import stages

        place, _, suffix = name.removeprefix("stage:").partition(":")
        number, dot, inside = place.partition(".")
        found = stages(self.model)
        if not number.lstrip("-").isdigit() or number == "0" or not 1 <= abs(int(number)) <= len(found):
            raise UserError(
                f"The {self.owner} has {len(found)} stages ({', '.join(found)}), so '{name}' is none of them: give "
                f"stage:1 to stage:{len(found)}, or stage:-1 for the last."
            )
        index = int(number)
        return found[index - 1 if index > 0 else index] + dot + inside + (f":{suffix}" if suffix else "")

    @property
    def paths(self) -> dict[str, str]:
        """What is captured: name asked for -> tap of the model."""
        return dict(self._paths)

    def __call__(self, batch: Batch) -> Signals:
        with own_precision(self.model):
            return self._read(batch)

    def _read(self, batch: Batch) -> Signals:
        task = self.task or PLAIN
        captured: AbstractContextManager[dict[str, Tensor]] = (
            nullcontext({}) if self._taps is None else self._taps.capture()
        )
        with captured as got:
            own = self.prepared(batch)
            output = None
            inside = self._inside and task.run_inside(self.model, own)
            if not inside:
                output = task.call(self.model, own, losses=self.losses and self.model.training)
        signals = Signals() if inside else task.read(output, batch)
        signals.logits = None if signals.logits is None else in_float32(signals.logits)
        signals.image = image_size(own)
        found = {path: in_float32(x) for path, x in self._channels_second(got, signals.image).items()}
        signals.taps |= {name: found[path] for name, path in self._paths.items() if name != "embedding"}
        if "embedding" in self._paths:
            from stillhouse.models.anatomy import embedding_from

            signals.embedding = embedding_from(found[self._paths["embedding"]])
        return signals

    def _channels_second(self, got: Mapping[str, Tensor], image: tuple[int, int] | None) -> dict[str, Tensor]:
        """The captured tensors, maps as (B, C, H, W)."""
        if self._channels_last is None:
            from stillhouse.models.anatomy import has_channels_last

            maps = {path for path, x in got.items() if x.ndim == 4}
            self._channels_last = frozenset(
                path for path in maps if has_channels_last(self.model, path, got[path].shape, image)
            )
        return {path: x.movedim(-1, 1) if path in self._channels_last else x for path, x in got.items()}

    def prepared(self, batch: Batch) -> Batch:
        """The batch with the network's own input."""
        return batch if self.prepare is None else self.prepare(batch)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile in place what a call runs."""
        (self.task or PLAIN).compiled_part(self.model).compile(*args, **kwargs)

    def close(self) -> None:
        """Leave no hook on the model."""
        self._paths, self._inside = {}, False
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
        self._paths = {}


class Teacher:
    """A source of knowledge. A subclass gives `gives` and `__call__`; one that learns with the student is an
    `nn.Module` too, and is saved.

    Attributes:
        gives: kinds of signals: logits, top, embedding, taps, parts.
        reads_student: whether its answer depends on the student's signals.
        hint: what a message adds where it does not give what an objective needs.
    """

    gives: frozenset[str] = frozenset({"logits"})
    reads_student: bool = False
    hint: str = ""

    def attach(self, wanted: Iterable[str], probe: Batch, student: nn.Module) -> None:
        """Get ready to give `embedding` and `tap:NAME`s."""

    def __call__(self, batch: Batch, student: Signals | None = None) -> Signals:
        raise NotImplementedError

    def observe(self, batch: Batch, student: Signals, progress: Progress) -> None:
        """After each batch: the student's outputs (detached)."""

    def follow(self, student: nn.Module) -> None:
        """After each optimiser step."""

    def readers(self) -> list[Reader]:
        """What calls its live networks; none for one that is stored or remembered."""
        return []

    def to(self, device: Any) -> Any:
        """Move its networks and tensors to a device."""
        return self

    def fingerprint(self) -> str | None:
        """A hash of its weights or its store, recorded with results; None for a teacher that learns."""
        return None

    def close(self) -> None:
        """Remove its hooks."""


class FrozenTeacher(Teacher):
    """A live network that is not trained: evaluation mode, no autograd, at most one forward a batch. Its outputs are
    ordinary tensors, usable as targets.

    Args:
        model: the network.
        embedding: the classifier submodule whose input is the embedding; None finds it.
        name: what messages call it.
        task: its own; None: the student's.
        prepare: makes its own input from a batch, such as an `OwnInput` or any function of yours; None: the student's
            input.
    """

    gives = EVERYTHING

    def __init__(
        self,
        model: nn.Module,
        *,
        embedding: str | None = None,
        name: str = "teacher",
        task: Task | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.model = model
        self._was_training = model.training
        model.eval()
        self._reader = Reader(model, name, embedding, task, prepare)

    @property
    def task(self) -> Task | None:
        """How the network is called and read."""
        return self._reader.task

    def readers(self) -> list[Reader]:
        return [self._reader]

    def attach(self, wanted: Iterable[str], probe: Batch, student: nn.Module) -> None:
        self._reader.attach(wanted, probe)

    @torch.no_grad()
    def __call__(self, batch: Batch, student: Signals | None = None) -> Signals:
        if self.model.training:
            self.model.eval()
        return self._reader(batch)

    def to(self, device: Any) -> FrozenTeacher:
        self.model.to(device)
        return self

    def fingerprint(self) -> str:
        """A hash of the weights, and of what is done to their input, recorded in place of the weights."""
        digest = hashlib.blake2b(digest_size=12)
        if isinstance(self._reader.prepare, OwnInput | ViewInput):
            digest.update(repr(self._reader.prepare).encode())
        for key, value in self.model.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        self._reader.close()
        self.model.train(self._was_training)


class Ensemble(Teacher):
    """Several teachers as one: `mean="probs"` averages their probabilities (at whatever temperature is asked),
    `mean="logits"` their logits."""

    gives = frozenset({"logits"})

    def __init__(self, members: Sequence[FrozenTeacher], mean: Literal["probs", "logits"] = "probs") -> None:
        if not members:
            raise UserError("An ensemble needs at least one member.")
        self.members, self.mean = list(members), mean

    def attach(self, wanted: Iterable[str], probe: Batch, student: nn.Module) -> None:
        for member in self.members:
            member.attach((), probe, student)

    def __call__(self, batch: Batch, student: Signals | None = None) -> Signals:
        outputs = tuple(m(batch, student) for m in self.members)
        widths = {s.logits.shape[-1] for s in outputs if s.logits is not None}
        if len(widths) > 1:
            raise UserError(f"The members of an ensemble must have the same classes, but give {sorted(widths)}.")
        logits = (
            torch.stack([s.logits for s in outputs if s.logits is not None]).mean(0) if self.mean == "logits" else None
        )
        return Signals(logits=logits, members=outputs)

    def readers(self) -> list[Reader]:
        return [reader for member in self.members for reader in member.readers()]

    def to(self, device: Any) -> Ensemble:
        for member in self.members:
            member.to(device)
        return self

    def fingerprint(self) -> str:
        return "+".join(m.fingerprint() for m in self.members)

    def close(self) -> None:
        for member in self.members:
            member.close()


class NotLive(UserError, AttributeError):
    """A stored teacher was asked for the network itself."""


class StoredTeacher(Teacher):
    """A teacher whose signals were stored: they come with each batch, under `stored`, from a store
    (`stillhouse.store.Store`).

    Args:
        store: what is read; the batches come from a `StoredDataset` that reads it too.
        name: what messages call it.
    """

    def __init__(self, store: Any, *, name: str = "teacher") -> None:
        self.store, self.name = store, name
        self.gives = store.gives
        self.hint = f"; the store '{store.folder}' holds no more: cache again with what is missing"

    @property
    def model(self) -> nn.Module:
        raise NotLive(
            f"This method runs the teacher '{self.name}' itself, but it is read from a store; give a live teacher."
        )

    def attach(self, wanted: Iterable[str], probe: Batch, student: nn.Module) -> None:
        taps = [f"tap:{t}" for t in self.store.manifest["taps"]]
        for name in wanted:
            if name.startswith("tap:") and name not in taps:
                raise UserError(
                    f"The objectives need the teacher's {name}, but the store '{self.store.folder}' holds "
                    f"{', '.join(taps) or 'no taps'}; cache again with it among store.taps."
                )

    def __call__(self, batch: Batch, student: Signals | None = None) -> Signals:
        signals = (batch.get("stored") or {}).get(self.store.id)
        if signals is None:
            raise UserError(
                f"This batch carries no signals of the store '{self.store.folder}': a stored teacher knows the "
                "training samples as they were cached, and no others (a sweep without augmentation needs a store of "
                "data.augment: plain)."
            )
        top = TopK(signals["top"], signals["top.indices"], signals["top.tail"]) if "top" in signals else None
        taps = {k.removeprefix("tap:"): v for k, v in signals.items() if k.startswith("tap:")}
        return Signals(
            logits=signals.get("logits"),
            top=top,
            embedding=signals.get("embedding"),
            taps=taps,
            image=image_size(batch),
        )

    def fingerprint(self) -> str:
        """The store's identity."""
        identity: str = self.store.id
        return identity


class Momentum(nn.Module, Teacher):
    """The student's own exponential moving average as teacher: w <- m w + (1 - m) w_student after each optimiser step;
    buffers are copied."""

    gives = EVERYTHING

    def __init__(self, momentum: float = 0.999, *, embedding: str | None = None) -> None:
        super().__init__()
        if not 0 < momentum < 1:
            raise UserError(f"momentum must lie between 0 and 1; given {momentum}.")
        self.momentum, self._embedding = momentum, embedding
        self.model: nn.Module | None = None

    def attach(self, wanted: Iterable[str], probe: Batch, student: nn.Module) -> None:
        self.model = copy.deepcopy(student).eval().requires_grad_(False)
        self._reader = Reader(self.model, "momentum teacher", self._embedding)
        self._reader.attach(wanted, probe)

    def train(self, mode: bool = True) -> Momentum:
        return super().train(False)

    def readers(self) -> list[Reader]:
        return [self._reader]

    @torch.no_grad()
    def forward(self, batch: Batch, student: Signals | None = None) -> Signals:
        return self._reader(batch)

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        assert self.model is not None
        torch._foreach_lerp_(
            [p.data for p in self.model.parameters()], [p.data for p in student.parameters()], 1 - self.momentum
        )
        for mine, theirs in zip(self.model.buffers(), student.buffers()):
            mine.copy_(theirs)

    def close(self) -> None:
        if self.model is not None:
            self._reader.close()


BIG_TABLE = 1 << 28
"""Entries of a table of float32 that would take 1 GiB, in memory and in every checkpoint."""


class PastSelf(nn.Module, Teacher):
    """The student's predictions of its last epoch, by sample index; in the first epoch, the one-hot labels.

    The table is (N, C) probabilities outside the parameters (and no buffer: DDP does not broadcast it), float32, or
    float16 where it has more than `BIG_TABLE` entries; it is part of the checkpoint.
    """

    gives = frozenset({"logits"})

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def start(self, labels: Tensor, num_classes: int) -> None:
        """Size the table from the training labels (N,), in index order."""
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise UserError(
                f"The past-self teacher begins with the labels, which must be from 0 to {num_classes - 1}; given: "
                f"{int(labels.min())} to {int(labels.max())}."
            )
        dtype = torch.float16 if len(labels) * num_classes > BIG_TABLE else torch.float32
        self.table = torch.zeros(len(labels), num_classes, dtype=dtype)
        self.table[torch.arange(len(labels)), labels] = 1.0

    def attach(self, wanted: Iterable[str], probe: Batch, student: nn.Module) -> None:
        if self.table is None:
            raise UserError(
                "The past-self teacher does not know the training labels: call start(labels, num_classes), or train "
                "from a recipe."
            )
        if "index" not in probe:
            raise UserError(
                f"The past-self teacher needs `index` in every batch, but the data gives only: {', '.join(probe)}."
            )

    def forward(self, batch: Batch, student: Signals | None = None) -> Signals:
        assert self.table is not None
        index = batch["index"]
        if self.table.device != index.device:
            self.table = self.table.to(index.device)
        return Signals(probs=self.table[index].float())

    @torch.no_grad()
    def observe(self, batch: Batch, student: Signals, progress: Progress) -> None:
        from stillhouse.functional.gather import gather

        assert self.table is not None
        probs = gather(torch.softmax(student.require("logits").float(), dim=-1))
        self.table[gather(batch["index"])] = probs.to(self.table.dtype)

    def get_extra_state(self) -> dict[str, Tensor | None]:
        return {"table": None if self.table is None else self.table.cpu()}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        if state["table"] is not None:
            device = self.table.device if self.table is not None else "cpu"
            self.table = state["table"].to(device)


class CoTrainedTeacher(nn.Module, Teacher):
    """A peer that is trained together with the student. Its signals arrive attached: each objective detaches what its
    paper detaches."""

    gives = EVERYTHING

    def __init__(self, model: nn.Module, *, embedding: str | None = None) -> None:
        super().__init__()
        self.model = model
        self._reader = Reader(model, "peer", embedding)

    def attach(self, wanted: Iterable[str], probe: Batch, student: nn.Module) -> None:
        self._reader.attach(wanted, probe)

    def readers(self) -> list[Reader]:
        return [self._reader]

    def forward(self, batch: Batch, student: Signals | None = None) -> Signals:
        return self._reader(batch)

    def close(self) -> None:
        self._reader.close()
