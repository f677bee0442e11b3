"""The store that a recipe names: its teacher trained or loaded, its data, one manifest; written by this process, by
ranks, or by Ray workers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from stillhouse.config.messages import spell
from stillhouse.config.specs import DataSpec, MethodConfig, StoreSpec, TeacherSpec
from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.processes import rank_world, wait
from stillhouse.runs.stores import data_facts, make
from stillhouse.store.reading import Store
from stillhouse.store.server import Server
from stillhouse.tasks.tokens import Tokens
from stillhouse.training.display import Display

TooLongIs = Literal["refuse", "skip"]


def asked(config: MethodConfig, name: str, given: Mapping[str, Any]) -> TeacherSpec:
    """A recipe's teacher, to be stored as the recipe says, and as `given` (fields of `StoreSpec`) says otherwise.

    Raises:
        UserError: no such teacher, one that cannot be stored, or options that do not fit.
    """
    teachers = _teachers(config)
    if name not in teachers:
        raise unknown("teacher in this recipe called", name, teachers)
    spec = teachers[name]
    if isinstance(spec.store, str):
        raise UserError(
            f"The teacher '{name}' is read from the store '{spec.store}' already; give the recipe of a live teacher."
        )
    own = spec.store.model_dump() if spec.store is not None else {}
    store = store_spec({**own, **given})
    try:
        return TeacherSpec.model_validate({**spec.model_dump(), "store": store.model_dump()})
    except ValidationError as error:
        raise spell(error, TeacherSpec, f"teacher '{name}'") from None


def store_spec(given: Mapping[str, Any]) -> StoreSpec:
    """What to keep, from options. Raises `UserError` for those that do not fit."""
    try:
        return StoreSpec.model_validate(dict(given))
    except ValidationError as error:
        raise spell(error, StoreSpec, "store") from None


def _teachers(config: MethodConfig) -> dict[str, TeacherSpec]:
    found = getattr(config, "all_teachers", None)
    if found is None:
        found = {n: v for n in type(config).model_fields if isinstance(v := getattr(config, n), TeacherSpec)}
    return dict(found)


def make_for(
    config: MethodConfig,
    name: str,
    spec: TeacherSpec,
    folder: Path,
    *,
    engine: str = "local",
    jobs: int = 2,
    data_root: str | None = None,
    cpu: bool = False,
    live: Display | None = None,
) -> None:
    """Write the store of a recipe's teacher into a folder.

    Raises:
        UserError: a recipe without `data`, an unknown engine, and what `cache` raises.
    """
    from accelerate import PartialState

    from stillhouse.runs.run import Run

    data = getattr(config, "data", None)
    if not isinstance(data, DataSpec):
        raise UserError(f"The recipe's method '{config.method}' has no `data` that a teacher could be run over.")
    if engine == "ray":
        make_on_ray(config, name, spec, data, folder, jobs, data_root, cpu)
    elif engine == "local":
        PartialState(cpu=cpu)
        make(Run(None, config, data_root=data_root, live=live, cpu=cpu), name, spec, data, folder)
    else:
        raise UserError(f"There is no engine '{engine}'; there are: local, ray.")


def make_from_server(
    config: MethodConfig,
    server: Server,
    spec: StoreSpec,
    folder: Path,
    *,
    workers: int = 4,
    too_long: TooLongIs = "refuse",
    data_root: str | None = None,
    live: Display | None = None,
) -> None:
    """Write a store from a server's answers on a recipe's training text; its teacher, if it names one, is not looked
    at.

    Raises:
        UserError: data that is no causal text, and what `asking.score` raises.
    """
    from accelerate import PartialState

    from stillhouse.runs.run import Run
    from stillhouse.store.remote import score
    from stillhouse.store.server import Vocabulary

    PartialState(cpu=True)
    data = getattr(config, "data", None)
    bundle: Any = Run(None, config, data_root=data_root, cpu=True).data(data) if isinstance(data, DataSpec) else None
    if not isinstance(data, DataSpec) or not isinstance(bundle.task, Tokens) or bundle.task.kind != "causal":
        raise UserError(
            "A server's log-probabilities are of text: the recipe's data must be text: with data.options.task causal."
        )
    rank, world = rank_world()
    score(
        server,
        bundle.dataset("train", train=True),
        folder,
        spec,
        Vocabulary(bundle.task.tokenizer),
        data_facts=data_facts(data, bundle),
        classes=bundle.num_classes,
        workers=workers,
        too_long=too_long,
        rank=rank,
        world=world,
        live=live,
    )
    wait()


def describe(folder: Path) -> str:
    """What a finished store holds, what it weighs, and what rounding cost; every shard is checked."""
    store = Store(folder)
    facts = store.manifest
    scores = (
        ([f"top {facts['top']} of {facts['classes']} classes and the tail"] if facts["top"] else ["logits"])
        if facts["logits"]
        else []
    )
    signals = ", ".join([*scores, *(["embedding"] if facts["embedding"] else []), *(f"tap {t}" for t in facts["taps"])])
    units, unit = (store.tokens, "token") if store.tokens is not None else (len(store) * store.views, "sample and view")
    lines = [
        f"{len(store):,} samples, {store.views} view{'s' if store.views > 1 else ''}: {signals}; {facts['precision']}",
        f"{store.bytes:,} bytes, {store.bytes / max(units, 1):.1f} a {unit}",
    ]
    if facts["precision"] != "fp32":
        lines += [
            f"rounding of {name}: at most {worst:.2g}, {rms:.2g} root mean square"
            for name, (worst, rms) in store.errors().items()
        ]
    return "\n".join([*lines, f"Train from it: teacher: {{store: {folder}}}"])


def make_on_ray(
    config: MethodConfig,
    name: str,
    spec: TeacherSpec,
    data: DataSpec,
    folder: Path,
    jobs: int,
    data_root: str | None,
    cpu: bool,
) -> None:
    """The same by Ray workers, each with its share of the shards. The teacher is trained before, here."""
    try:
        import ray
    except ImportError:
        raise MissingExtra("--engine ray", "ray") from None
    from stillhouse.runs.run import Run

    Run(None, config, data_root=data_root, cpu=cpu).teacher(name, spec.model_copy(update={"store": None}), data)
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = 0.25 if ray.cluster_resources().get("GPU") and not cpu else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1)(_share)
    environment: Mapping[str, str] = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        ray.get(
            [
                remote.remote(config, name, spec, data, folder.absolute(), i, jobs, data_root, cpu, environment)
                for i in range(jobs)
            ]
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    finally:
        if started:
            ray.shutdown()


def _share(
    config: MethodConfig,
    name: str,
    spec: TeacherSpec,
    data: DataSpec,
    folder: Path,
    rank: int,
    world: int,
    data_root: str | None,
    cpu: bool,
    environment: Mapping[str, str],
) -> None:
    os.environ.update(environment)
    from accelerate import PartialState

    from stillhouse.runs.run import Run

    PartialState(cpu=cpu)
    make(Run(None, config, data_root=data_root, cpu=cpu), name, spec, data, folder, rank=rank, world=world)
