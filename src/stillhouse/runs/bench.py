"""Comparison of recipes and variants over seeds under one budget: finished runs are reused, and the recipes' claims get
their verdicts.

A finished run is reused where its recipe and the code that it ran are unchanged; where the code has changed it is run
again.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from stillhouse.config.names import folder_name
from stillhouse.config.reading import beside_recipe, dump, parse_sets, parse_yaml, read_yaml, resolve, variants_of
from stillhouse.config.specs import MethodConfig
from stillhouse.errors import MissingExtra, UserError, nearest
from stillhouse.files import atomic_write, read_json
from stillhouse.runs.claims import judge, read_claims, varied_network
from stillhouse.runs.evidence import recipe_hash, row_facts
from stillhouse.runs.folder import clear, diverged, locked, trained
from stillhouse.runs.recipe import validate
from stillhouse.runs.sources import source_hash


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: a recipe, or one of its variants."""

    recipe: Path
    variant: str | None
    group: str | None = None  # which of the recipe's `groups` the row is in
    sets: tuple[str, ...] = ()  # what the group sets, as KEY=VALUE

    @property
    def label(self) -> str:
        return self.variant or self.recipe.stem

    @property
    def folder(self) -> str:
        """The start of its runs' folder names."""
        return self.label if self.group is None else f"{self.label}-{self.group}"


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    entry: Entry
    seed: int
    folder: Path
    sets: tuple[str, ...]
    data_root: str | None
    cpu: bool
    device: str | None = None

    @property
    def done(self) -> bool:
        return (self.folder / "evaluation.json").exists()

    def run(self, live: Any = None) -> None:
        """In this process."""
        from stillhouse.runs.execution import execute

        execute(self.config(), self.folder, data_root=self.data_root, live=live, cpu=self.cpu, device=self.device)

    def tree(self) -> dict[str, Any]:
        """Its recipe as it was written, with the variant and all that is set."""
        sets = {**parse_sets([*self.sets, *self.entry.sets]), "seed": self.seed}
        return resolve(read_yaml(self.entry.recipe), self.entry.variant, sets, where=str(self.entry.recipe))

    @property
    def sources(self) -> str:
        """The hash of the code that it runs."""
        return source_hash(self.tree(), self.entry.recipe.parent)

    def config(self) -> MethodConfig:
        """Its recipe, valid. Raises `UserError` as `validate`."""
        tree = {**beside_recipe(self.tree(), self.entry.recipe.parent), "name": self.folder.name}
        return validate(tree, str(self.entry.recipe))

    def difference(self) -> str | None:
        """Where the recipe of the run in its folder is another; None where there is none, where it is the same, or
        where nothing of an unfinished one was trained. Raises `UserError` for a recipe that is not valid."""
        config, recorded = self.config(), self.folder / "recipe.yaml"
        ours = recorded.is_file() and (self.folder / "environment.json").is_file()
        if not ours or not (self.done or (trained(self.folder) and not diverged(self.folder))):
            return None
        return _changed(read_yaml(recorded), parse_yaml(dump(config), "the recipe"), self.tree())

    def plan(self, bundles: dict[str, Any]) -> None:
        """Raises `UserError`, which names the row, for what can be known to fail before anything is trained.

        Args:
            bundles: data that the plans of other rows loaded.
        """
        from stillhouse.runs.execution import plan

        try:
            plan(self.config(), data_root=self.data_root, cpu=self.cpu, device=self.device, bundles=bundles)
        except UserError as error:
            raise UserError(f"The row '{self.entry.folder}': {error}") from error

    def command(self) -> list[str]:
        """The same as a command for a process of its own."""
        out = [
            sys.executable,
            "-m",
            "stillhouse",
            "run",
            str(self.entry.recipe),
            "--out",
            str(self.folder),
            "--set",
            f"seed={self.seed}",
            "--set",
            f"name={self.folder.name}",
        ]
        out += ["--variant", self.entry.variant] if self.entry.variant else []
        out += [x for s in (*self.sets, *self.entry.sets) for x in ("--set", s)]
        return (
            out
            + (["--data-root", self.data_root] if self.data_root else [])
            + (["--cpu"] if self.cpu else [])
            + (["--device", self.device] if self.device else [])
        )


def entries(recipes: Sequence[str | Path], variants: Sequence[str] | None = None) -> list[Entry]:
    """The rows of a comparison: each recipe itself and its variants; those named `paper…` and `smoke` only if asked
    for. `base` is the recipe itself; a variant that overrides nothing gives it a name, and stands for it.

    A recipe with `groups` (one dotted key and its named values, such as two students) gives every row once a group.
    """
    rows = []
    for path in map(Path, recipes):
        tree = read_yaml(path)
        read_claims(tree, str(path))
        there: dict[str, Any] = variants_of(tree, str(path))
        found: list[Entry] = []
        if variants is None:
            base = [] if any(not overrides for overrides in there.values()) else [Entry(path, None)]
            found = [*base, *(Entry(path, v) for v in there if not v.startswith("paper") and v != "smoke")]
        for v in variants or ():
            if v != "base" and v not in there:
                close = nearest(v, [*there, "base"])
                raise UserError(
                    f"{path}: no variant '{v}'; "
                    + (f"did you mean '{close[0]}'?" if close else f"there are: base, {', '.join(there)}.")
                )
            found.append(Entry(path, None if v == "base" else v))
        rows += [replace(e, **g) for g in _groups(tree.get("groups"), path) for e in found]
    labels = [r.folder for r in rows]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(
            f"Two rows of the comparison are called '{twice[0]}'; choose variants with --variants, or rename the "
            "recipe's file or the variant."
        )
    return rows


def _groups(given: Any, path: Path) -> list[dict[str, Any]]:
    """The group and what it sets, for each group of a recipe; [{}] where there are none."""
    if not given:
        return [{}]
    if not isinstance(given, dict) or len(given) != 1 or not all(isinstance(v, dict) and v for v in given.values()):
        raise UserError(
            f"{path}: groups takes one dotted key with named values, such as student: "
            f"{{small: stillhouse:resnet8, other: stillhouse:vgg8}}."
        )
    ((dotted, values),) = given.items()
    return [
        {"group": folder_name(str(name), f"{path}: groups.{dotted}"), "sets": (f"{dotted}={json.dumps(value)}",)}
        for name, value in values.items()
    ]


def bench(
    rows: Sequence[Entry],
    seeds: Sequence[int],
    out: Path,
    *,
    baseline: str | None = None,
    reference: str | None = None,
    primary: str | None = None,
    sets: Sequence[str] = (),
    data_root: str | None = None,
    cpu: bool = False,
    device: str | None = None,
    overwrite: bool = False,
    engine: str = "local",
    jobs: int = 1,
    slug: str | None = None,
    live: Any = None,
    after: Callable[[Job, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run every row for every seed (reusing what is done) and return the results (see `collect`) with the verdicts of
    the recipes' claims.

    All recipes are checked and planned before the first is run. Which code a run is of is recorded in
    `out`/sources.json as it starts; a run of other code, finished or not, is started over.

    Args:
        out: one folder a run below it.
        baseline: the row that others of its group are compared with; default: `alone`, `ce`, `random`, or the first
            row.
        reference: the row whose training step is the unit of the others' cost, where recipes measure it (`evaluate:
            [step]`); default: `kd`, or the baseline.
        device: the device to work on; None: the first GPU that torch sees, else the CPU.
        overwrite: start over the rows whose folders hold runs of other recipes.
        primary: the figure that rows are compared by; default: `accuracy`, or the first that there is.
        engine: `local` (this process; with `jobs` > 1, so many processes) or `ray`.
    """
    labels = [r.label for r in rows]
    baseline = baseline or next((b for b in ("alone", "ce", "random") if b in labels), labels[0])
    if baseline not in labels:
        raise UserError(f"The baseline '{baseline}' is no row of this comparison; rows: {', '.join(labels)}.")
    bare = sorted({str(r.group) for r in rows} - {str(r.group) for r in rows if r.label == baseline})
    if bare:
        raise UserError(
            f"The baseline '{baseline}' is no row of the group '{bare[0]}', and rows are compared with the baseline "
            "of their own group."
        )
    reference = reference or ("kd" if "kd" in labels else baseline)
    if reference not in labels:
        raise UserError(f"The reference '{reference}' is no row of this comparison; rows: {', '.join(labels)}.")
    every = [Job(e, s, out / f"{e.folder}-s{s}", tuple(sets), data_root, cpu, device) for s in seeds for e in rows]
    others = [(job, changed) for job in every if (changed := job.difference())]
    if others and not overwrite:
        job, changed = others[0]
        more = f", and {len(others) - 1} more rows" if others[1:] else ""
        raise UserError(
            f"The row '{job.entry.folder}': {job.folder} holds {'a finished' if job.done else 'an unfinished'} run of "
            f"another recipe ({changed}){more}; start over with --overwrite, or choose another folder with --out."
        )
    bundles: dict[str, Any] = {}
    for job in every:
        again = not job.done or job in (other for other, _ in others)
        if again and job.seed == seeds[0]:  # other seeds are the same recipe
            job.plan(bundles)
    del bundles  # runs load their own
    _start_over(every, out, [job for job, _ in others])
    todo = [j for j in every if not j.done]
    for number, job in enumerate(_finished(todo, engine, jobs, live), 1):
        if after is not None:
            after(job, number, len(todo))
    results = collect(every, baseline, slug or rows[0].recipe.stem, reference)
    results["sets"] = list(sets)
    results["claims"] = verdicts(rows, results["rows"])
    kinds = _kinds(every)
    if len(kinds) > 1:
        listed = "; ".join(f"{kind}: {', '.join(labels)}" for kind, labels in kinds.items())
        warnings.warn(
            f"The rows leave products of different kinds ({listed}), so that figures of one name may mean different "
            "things.",
            stacklevel=1,
        )
    return results if primary is None else {**results, "primary": primary}


def _start_over(jobs: Sequence[Job], out: Path, others: Sequence[Job] = ()) -> None:
    """Remove the runs of other recipes and those that are not of the present code, and record for every run which code
    it is of."""
    for job in others:
        with locked(job.folder):
            clear(job.folder)
    recorded = out / "sources.json"
    before = read_json(recorded) if recorded.is_file() else {}
    now = {job.folder.name: job.sources for job in jobs}
    of_a_run = ("recipe.yaml", "environment.json")  # nothing that is not a run's is ever removed
    there = [job for job in jobs if all((job.folder / name).is_file() for name in of_a_run)]
    old = [job for job in there if before.get(job.folder.name) != now[job.folder.name]]
    for job in old:
        with locked(job.folder):
            clear(job.folder)
    if old:
        names = ", ".join(job.folder.name for job in old[:5]) + (", …" if len(old) > 5 else "")
        warnings.warn(f"{len(old)} runs in {out} are not of the present code and are run again: {names}.", stacklevel=1)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(recorded) as temporary:
        temporary.write_text(json.dumps({**before, **now}, indent=1) + "\n")


def verdicts(entries: Sequence[Entry], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts of the claims of all recipes of a comparison, as JSON data, each with its recipe; of what these rows
    can decide."""
    out = []
    for recipe in dict.fromkeys(entry.recipe for entry in entries):
        mine = [row for row in rows if row["recipe"] == recipe.name]
        found = judge(read_yaml(recipe), {"": mine}, str(recipe))
        out += [{"recipe": recipe.name, **verdict.record()} for verdict in found if verdict.seeds]
    return out


def _kinds(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """The rows by the kind of product that they leave."""
    out: dict[str, list[str]] = {}
    for job in jobs:
        record = job.folder / "product" / "product.json"
        kind = read_json(record).get("kind", "product") if record.is_file() else "product"
        out.setdefault(kind, [])
        out[kind] += [job.entry.folder] * (job.entry.folder not in out[kind])
    return out


def _changed(then: Mapping[str, Any], now: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first key in which two recipes with all their defaults differ, in words; None where they agree. A key that
    only one of them knows does not count, unless `given`, the later one as it was written, has it as null: so a run
    from before an option came is still the same run."""
    old, new = _leaves(then), _leaves(now)
    for key, value in old.items():
        if value != new.get(key, value):
            return f"'{key}: {value}' there, '{key}: {new[key]}' now"
    for key, value in _leaves(given).items():
        if value is None and any(k == key or k.startswith(f"{key}.") for k in old):
            return f"'{key}' there, '{key}: null' now"
    return None


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists as {dotted key: value}; of a list also its length."""
    if isinstance(value, Mapping) and value:
        return {k: v for name, part in value.items() for k, v in _leaves(part, f"{path}.{name}".lstrip(".")).items()}
    if isinstance(value, list):
        return {
            f"{path} (how many)": len(value),
            **{k: v for i, part in enumerate(value) for k, v in _leaves(part, f"{path}.{i}").items()},
        }
    return {path: value}


def _finished(todo: Sequence[Job], engine: str, jobs: int, live: Any) -> Iterator[Job]:
    if engine == "ray":
        yield from _on_ray(todo)
    elif engine != "local":
        raise UserError(f"There is no engine '{engine}'; there are: local, ray.")
    elif jobs <= 1:
        for job in todo:
            if live is not None:
                live.prefix = f"{job.folder.name} · "
            job.run(live)
            yield job
    else:
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        with _ending_children() as running, ThreadPoolExecutor(jobs) as pool:

            def run(job: Job) -> Job:
                _in_process(job, environment, running)
                return job

            try:
                yield from pool.map(run, todo)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(running):
                    process.terminate()
                raise


@contextmanager
def _ending_children() -> Iterator[set[subprocess.Popen[str]]]:
    """A set for running processes; SIGTERM becomes KeyboardInterrupt inside, so that they are ended too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if in_main else None
    try:
        yield set()
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _in_process(job: Job, environment: dict[str, str], running: set[subprocess.Popen[str]]) -> None:
    process = subprocess.Popen(
        job.command(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running.add(process)
    try:
        _, errors = process.communicate()
    finally:
        running.discard(process)
    if process.returncode:
        raise UserError(f"{job.folder.name} failed:\n{errors.strip()[-2000:]}")


def _on_ray(todo: Sequence[Job]) -> Iterator[Job]:
    try:
        import ray
    except ImportError:
        raise MissingExtra("--engine ray", "ray") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = 0.25 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1)(_in_process)
    try:
        pending = {remote.remote(job, {**os.environ, "OMP_NUM_THREADS": "1"}): job for job in todo}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            ray.get(ready[0])
            yield pending.pop(ready[0])
    finally:
        if started:
            ray.shutdown()


def collect(jobs: Sequence[Job], baseline: str, slug: str, reference: str | None = None) -> dict[str, Any]:
    """The results of finished runs as JSON data: rows with their figures by seed, the teacher's, versions and
    device."""
    rows: dict[str, dict[str, Any]] = {}
    teacher: dict[str, Any] | None = None
    environment: dict[str, Any] = {}
    for job in jobs:
        if not job.done:
            continue
        figures = read_json(job.folder / "evaluation.json")
        environment = read_json(job.folder / "environment.json")
        entry = job.entry
        row = rows.setdefault(
            entry.folder,
            {
                "label": entry.label,
                "recipe": entry.recipe.name,
                "variant": entry.variant,
                "group": entry.group,
                **_facts(job),
                "seeds": [],
                "metrics": {},
            },
        )
        row["seeds"].append(job.seed)
        for name, value in figures.items():
            row["metrics"].setdefault(name, []).append(value)
        for name, facts in (environment.get("teachers") or {}).items():
            if teacher is None:
                teacher = {
                    "label": f"{name} ({facts['model']})",
                    "metrics": {k: [v] for k, v in facts.items() if isinstance(v, int | float)},
                }
    for row in rows.values():
        row["metrics"] = {k: v for k, v in row["metrics"].items() if len(v) == len(row["seeds"])}
        if row["group"] is None:
            del row["group"]
        _check_one_network(row)
    _relative_costs(rows.values(), reference)
    return {
        "slug": slug,
        "title": slug,
        "baseline": baseline,
        **({"reference": reference} if any("step_relative" in r["metrics"] for r in rows.values()) else {}),
        "command": environment.get("command", ""),
        "versions": environment.get("versions", {}),
        "device": environment.get("device", ""),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": list(rows.values()),
        "teacher": teacher,
    }


def _facts(job: Job) -> dict[str, Any]:
    """What a row is of: hashes of its recipe and code, its data, the steps of its stages, and whether its method
    searches for its network."""
    tree = job.tree()
    environment = read_json(job.folder / "environment.json")
    return {
        "recipe_hash": recipe_hash(tree),
        "source_hash": job.sources,
        "steps": environment.get("steps", {}),
        **row_facts(tree),
    }


def _check_one_network(row: Mapping[str, Any]) -> None:
    """Raises `UserError` for a row whose seeds are different networks."""
    reason = varied_network(row)
    if reason is not None:
        raise UserError(
            f"This row cannot be averaged over seeds: {reason}. A method that searches for its network says so by "
            "`searches = True`."
        )


def _relative_costs(rows: Iterable[dict[str, Any]], reference: str | None) -> None:
    """Give each row its step's time and memory as multiples of the reference row's in the same group (the median over
    seeds)."""
    rows = list(rows)
    units = {row.get("group"): row["metrics"] for row in rows if row["label"] == reference}
    for row in rows:
        unit = units.get(row.get("group"), {})
        for relative, name in (("step_relative", "step_ratio"), ("step_memory_relative", "step_bytes")):
            if name in unit and name in row["metrics"]:
                row["metrics"][relative] = [v / statistics.median(unit[name]) for v in row["metrics"][name]]
