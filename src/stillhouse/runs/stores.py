"""The store that a recipe names, written by the processes of a run: its teacher, its data, one manifest."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from stillhouse.config.specs import DataSpec, StoreSpec, TeacherSpec
from stillhouse.errors import UserError
from stillhouse.files import cache_folder, turn
from stillhouse.processes import rank_world, wait
from stillhouse.store.writing import cache
from stillhouse.tasks.classification import Classification

CONTENT = ("name", "size", "test_size", "holdout", "val", "classes", "label_noise", "seed", "options")


def data_facts(spec: DataSpec, bundle: Any) -> dict[str, Any]:
    """What a manifest says of the data: its fingerprint, its recipe, and the transforms of its training split."""
    given, facts = spec.model_dump(mode="json"), bundle.task
    return {
        "fingerprint": bundle.fingerprint,
        "split": "train",
        "spec": {k: given[k] for k in CONTENT},
        "transform": {
            "augment": given["augment"],
            "image_size": given["image_size"],
            "mean": list(facts.mean) if isinstance(facts, Classification) else [],
            "std": list(facts.std) if isinstance(facts, Classification) else [],
            "mirrored": bundle.flip,
        },
    }


def teacher_facts(spec: TeacherSpec, teacher: Any) -> dict[str, Any]:
    """What a manifest says of the teacher: the hash of its weights, and its recipe."""
    return {
        "weights": teacher.fingerprint(),
        "model": spec.model or f"ensemble of {len(spec.ensemble or ())}, mean of {spec.mean}",
    }


def make(run: Any, name: str, spec: TeacherSpec, data: DataSpec, folder: Path | None = None, **options: Any) -> Path:
    """Write the store of a recipe's teacher (`spec.store` says what is stored), or finish an interrupted
    one; each process of the run writes its share.

    Args:
        run: a `stillhouse.runs.run.Run`.
        folder: default: in the cache, under a hash of everything the signals depend on.
        options: of `stillhouse.store.cache`; `rank` and `world` in place of the run's own.

    Returns:
        the folder.
    """
    assert isinstance(spec.store, StoreSpec)
    if data.mixup or data.cutmix:
        raise UserError("Stores are of single samples, but data.mixup and data.cutmix mix a batch; set both to 0.")
    teacher = run.teacher(name, spec.model_copy(update={"store": None}), data)
    bundle = run.data(data)
    facts: dict[str, Any] = {"teacher_facts": teacher_facts(spec, teacher), "data_facts": data_facts(data, bundle)}
    if folder is None:
        digest = hashlib.blake2b(
            json.dumps([facts, spec.store.model_dump(mode="json")], sort_keys=True).encode(), digest_size=10
        ).hexdigest()
        folder = cache_folder() / "stores" / f"{name}-{digest}"
    folder = Path(folder).expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    rank, world = rank_world()
    options = {
        "rank": rank,
        "world": world,
        "batch_size": bundle.evaluation_batch,
        "device": run.device,
        "live": run.live,
        **options,
    }
    alone = options["world"] == 1
    with turn(folder, f"the store of '{name}'", run.live.say) if alone else nullcontext():
        cache(teacher, bundle.dataset("train", train=True), folder, spec.store, **facts, **options)
    wait()
    return folder
