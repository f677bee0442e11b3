"""`execute`: a recipe run in a folder, from its method's plan to the report; and `plan`, what it would do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

import stillhouse
from stillhouse import catalog
from stillhouse.config.reading import dump
from stillhouse.config.specs import MethodConfig, TrainSpec
from stillhouse.devices import on_device
from stillhouse.errors import UserError
from stillhouse.files import atomic_write, full_disk_reported, read_json, write_checksums
from stillhouse.processes import agreed, rank_world, together, wait
from stillhouse.reporting.run_report import write_run_report
from stillhouse.runs.folder import claim, lacks_report, locked, seconds_before
from stillhouse.runs.gallery import write_gallery
from stillhouse.runs.method import Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.training.display import Display
from stillhouse.training.engine import check_trackers


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    out = {"stillhouse": stillhouse.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "accelerate", "timm", "transformers", "numpy"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def plan(
    config: MethodConfig,
    *,
    data_root: str | None = None,
    cpu: bool = False,
    device: str | None = None,
    bundles: dict[str, Any] | None = None,
) -> list[Stage]:
    """What a recipe would do here.

    Args:
        bundles: data that other plans loaded; what this one loads is added.

    Raises:
        UserError: what can be known to fail before anything is trained.
    """
    with on_device(device, cpu) as on_cpu:
        check_machine(config, on_cpu)
        run = Run(None, config, data_root=data_root, cpu=True, bundles=bundles)
        return catalog.method(config.method).plan(config, run)


def check_machine(config: MethodConfig, cpu: bool) -> None:
    """Raises `UserError` where a training of the recipe needs what this machine, or this installation, has not.

    Args:
        cpu: whether the run is to stay on the CPU.
    """
    from accelerate import PartialState

    cpu = cpu or PartialState().device.type == "cpu"
    for path, spec in trainings(config):
        if cpu and spec.precision == "fp16":
            raise UserError(
                f"{path}.precision: fp16 needs a GPU, and this run is on the CPU; take bf16 or full "
                f"(--set {path}.precision=full)."
            )
        check_trackers(spec, path)


def trainings(config: BaseModel, path: str = "") -> Iterator[tuple[str, TrainSpec]]:
    """Every training that a recipe describes, with its path."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in [("", value), *parts]:
            here = ".".join(str(p) for p in (path, name, key) if p != "")
            if isinstance(part, TrainSpec):
                yield here, part
            elif isinstance(part, BaseModel):
                yield from trainings(part, here)


def execute(
    config: MethodConfig,
    folder: str | Path,
    *,
    data_root: str | None = None,
    live: Display | None = None,
    overwrite: bool = False,
    cpu: bool = False,
    device: str | None = None,
) -> dict[str, float]:
    """Run a recipe in a folder and return the figures of its product; an interrupted run resumes.

    The folder will hold recipe.yaml (resolved), environment.json (versions, seed, device), metrics.csv, checkpoints/,
    product/, evaluation.json and report.html.

    Args:
        device: the device to work on, such as cuda:1; None: the first that torch sees.

    Raises:
        UserError: a folder that holds a finished run (unless `overwrite`), or an unfinished run of another recipe; a
            device that is not there.
    """
    folder = Path(folder).expanduser()
    try:
        with (
            on_device(device, cpu) as on_cpu,
            together(on_cpu),
            locked(folder) if rank_world()[0] == 0 else nullcontext(),
            full_disk_reported(str(folder)),
        ):
            check_machine(config, on_cpu)
            return _executed(config, folder, data_root, live, overwrite, on_cpu)
    finally:
        if live is not None:
            live.close()


def _executed(
    config: MethodConfig, folder: Path, data_root: str | None, live: Display | None, overwrite: bool, cpu: bool
) -> dict[str, float]:
    text = dump(config)
    main = rank_world()[0] == 0
    if agreed(main and not overwrite and lacks_report(folder, text)):
        if main:
            write_run_report(folder)
        wait()
        done: dict[str, float] = read_json(folder / "evaluation.json")
        return done
    before = seconds_before(folder) if main and not overwrite else 0.0
    changes = claim(folder, text, overwrite) if main else {}
    wait()
    method = catalog.method(config.method)
    run = Run(folder, config, data_root=data_root, live=live, cpu=cpu)
    stages = method.plan(config, run)
    run.planned = {s.name for s in stages}
    started = time.monotonic()
    if main:
        _write_json(
            folder / "environment.json",
            {
                "versions": versions(),
                "seed": config.seed,
                "started": time.time(),
                "seconds before": before,
                "device": _device_name(run.device),
                "processes": rank_world()[1],
                "command": " ".join(["stillhouse", *sys.argv[1:]]),
                "steps": {s.name: s.steps for s in stages if s.steps is not None},
                **({"changed after divergence": changes} if changes else {}),
            },
        )
    product = method.run(config, run)
    figures: dict[str, float] = dict(getattr(product, "figures", {}) or {})
    if main:
        _save_product(product, folder / "product")
    figures |= run.evaluated(product)  # in every process, as the judges of some products train networks, together
    if main:
        if isinstance(product, Student):
            write_gallery(run, product)
        figures.setdefault("run_seconds", before + time.monotonic() - started)
        environment = read_json(folder / "environment.json")
        _write_json(folder / "environment.json", {**environment, **run.record})
        _write_json(folder / "evaluation.json", figures)
        write_run_report(folder)
    wait()
    return figures


def _save_product(product: Any, folder: Path) -> None:
    unfinished = folder.with_name("product.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    product.save(unfinished)
    write_checksums(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
