"""Stored stages, stores and products that are torn, changed or hostile: found, reported in a sentence, and computed
again alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stillhouse
from stillhouse.config.specs import ModelSpec, StoreSpec
from stillhouse.data import BatchKey
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.runs.execution import _save_product
from stillhouse.runs.products import Student
from stillhouse.runs.stages import cached
from stillhouse.store import Store
from stillhouse.store.writing import cache
from stillhouse.tasks.classification import Classification

Change = Callable[[Path], Any]


def overwrite(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-9])

    return change


def flip(name: str, at: int = -1) -> Change:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return change


def edited(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, **values}))

    return change


def gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def linked(folder: Path) -> None:
    """The folder is a link to another one, which holds something of the user's."""
    elsewhere = folder.parent.parent / "mine"
    elsewhere.mkdir()
    (elsewhere / "result.json").write_text('{"": {"value": "theirs"}}')
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)


# ---- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        cut("weights.safetensors"),
        flip("weights.safetensors"),
        flip("weights.safetensors", 12),
        gone("weights.safetensors"),
        gone("result.json"),
        cut("result.json"),
        overwrite("result.json", b"[" * 100_000),
        overwrite("result.json", b"null"),
        overwrite("result.json", b'{"weights": {"tensors": "../../../mine.safetensors"}}'),
        overwrite("result.json", b'{"weights": {"tensors": "/etc/passwd"}}'),
        edited("result.json", figures={"value": 7}),
        overwrite("checksums.json", b"{"),
        overwrite("checksums.json", b'{"../../x": "0"}'),
        linked,
        lambda folder: (shutil.rmtree(folder), folder.write_text("a file")),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_stage_is_computed_again_alone(change: Change, sealed: bool, tmp_path: Path) -> None:
    calls, said = [], list[str]()

    def make(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return {"weights": {"w": torch.arange(40.0)}, "figures": {"accuracy": 0.5}}

    def result(name: str = "teacher") -> Any:
        return cached(tmp_path / "stages", name, make, {"seed": 0}, said.append)

    result("other")
    first = result()
    before = first["weights"]["w"].clone()  # the pages of the file lie behind the tensor itself
    folder = next((tmp_path / "stages").glob("teacher-*[!k]"))
    if not sealed:  # as an earlier version wrote it
        (folder / "checksums.json").unlink()
    changed_values = change is not None and not sealed
    try:
        change(folder)
    except FileNotFoundError:
        return  # of a file that an earlier version did not write
    again = result()
    if changed_values and len(calls) == 2 and not said:
        return  # without checksums, a changed value that still reads cannot be known
    assert len(calls) == 3 and len(said) == 1 and f"'teacher' in {folder} is damaged" in said[0] and "\n" not in said[0]
    assert torch.equal(again["weights"]["w"], before) and again["figures"] == first["figures"]
    result("other"), result()
    assert len(calls) == 3, "nothing else was computed again"
    mine = tmp_path / "mine" / "result.json"
    assert not mine.parent.exists() or "theirs" in mine.read_text(), "what a link led to is as it was"


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ""])
def test_a_stages_name_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot name a folder|1 to 120 characters"):
        cached(tmp_path, name, lambda folder: 1, {})


def test_interrupted_stages_are_swept_when_nothing_can_resume_them(tmp_path: Path) -> None:
    ages = {"empty-1.partial": 7200, "young-1.partial": 60, "held-1.partial": 7200, "resumable-1.partial": 7200,
            "forgotten-1.partial": 30 * 24 * 3600, "link-1.partial": 0}  # fmt: skip
    for name, age in ages.items():
        folder = tmp_path / name
        if name.startswith("link"):
            folder.symlink_to(tmp_path.parent)
            continue
        folder.mkdir()
        if name.startswith(("resumable", "forgotten")):
            (folder / "student.pt").touch()
            os.utime(folder / "student.pt", (time.time() - age,) * 2)
        os.utime(folder, (time.time() - age,) * 2)
    holder = holding(tmp_path / "held-1")
    try:
        cached(tmp_path, "x", lambda folder: 1, {})
    finally:
        holder.kill()
        holder.wait()
    left = {p.name for p in tmp_path.glob("*.partial")}
    assert left == {"young-1.partial", "held-1.partial", "resumable-1.partial", "link-1.partial"}


def holding(path: Path) -> subprocess.Popen[str]:
    """A process that works on a path."""
    code = (
        "import sys, time; from pathlib import Path; from stillhouse.files import turn\n"
        f"with turn(Path({str(path)!r}), 'it', print):\n    print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_waiting_for_another_process_names_it(tmp_path: Path) -> None:
    cached(tmp_path, "teacher", lambda folder: 1, {"a": 1})
    done = next(tmp_path.glob("teacher-*[!k]"))
    shutil.rmtree(done)
    holder = holding(done)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        holder.kill()  # a process that is killed leaves nothing locked
        holder.wait()

    assert cached(tmp_path, "teacher", lambda folder: 2, {"a": 1}, say) == 2
    assert len(said) == 1 and f"process {holder.pid} on " in said[0] and "at work since 20" in said[0]
    assert f"the stage 'teacher' in {done}" in said[0]
    assert not list(tmp_path.glob("*.owner.json"))


# ---- stores ----------------------------------------------------------------------------------------------------------


class Rows:
    def __len__(self) -> int:
        return 20

    def batch(self, key: BatchKey, seed: int) -> dict[str, Any]:
        own = key.indices[key.start : key.stop]
        x = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(int(i))) for i in own])
        return {"input": x, "label": torch.zeros(len(own), dtype=torch.long), "index": torch.from_numpy(own)}


def written(folder: Path) -> int:
    torch.manual_seed(0)
    facts = {"fingerprint": "f", "split": "train", "spec": {}, "transform": {}}
    teacher = FrozenTeacher(nn.Linear(4, 3))
    return cache(
        teacher, Rows(), folder, StoreSpec(shard_rows=5), teacher_facts={"model": "x"}, data_facts=facts, batch_size=5
    )


@pytest.mark.parametrize(
    ("change", "shards"),
    [
        (cut("shards/000002.json"), 1),
        (flip("shards/000002.json", 30), 1),
        (overwrite("shards/000002.json", b"null"), 1),
        (overwrite("shards/000002.json", b"[" * 100_000), 1),
        (overwrite("shards/000002.json", b"\xff\xfe"), 1),
        (edited("shards/000002.json", bytes=3), 1),
        (edited("shards/000002.json", arrays={}), 1),
        (edited("shards/000002.json", store="another"), 1),
        (lambda folder: shutil.copy(folder / "shards/000001.json", folder / "shards/000002.json"), 1),
        (cut("shards/000002.bin"), 1),
        (flip("shards/000002.bin"), 1),
        (gone("shards/000002.bin"), 1),
        (cut("manifest.json"), 0),
        (overwrite("manifest.json", b"null"), 0),
        (overwrite("manifest.json", b"[" * 100_000), 0),
        (edited("manifest.json", shard_rows=0), 0),
        (edited("manifest.json", count=10**15), 0),
        (edited("manifest.json", classes="x"), 0),
        (edited("manifest.json", views=2), 0),
        (edited("manifest.json", data=3), 0),
    ],
)
def test_a_damaged_store_is_a_sentence_and_repaired_by_the_same_command(
    change: Change, shards: int, tmp_path: Path
) -> None:
    assert written(tmp_path / "s") == 4
    whole = Store(tmp_path / "s").column("logits", np.arange(20)).copy()
    change(tmp_path / "s")
    with pytest.raises(UserError, match="run the command that wrote the store again") as told:
        Store(tmp_path / "s")
    assert "\n" not in str(told.value)
    assert written(tmp_path / "s") == shards, "only what was damaged is written again"
    assert np.array_equal(Store(tmp_path / "s").column("logits", np.arange(20)), whole)


@pytest.mark.parametrize("dtype", ["O", "V8", "U3", "M8[s]", "nonsense"])
def test_a_record_names_only_numbers_inside_its_file(dtype: str, tmp_path: Path) -> None:
    from stillhouse.store.format import sealed

    written(tmp_path / "s")
    path = tmp_path / "s" / "shards" / "000000.json"
    for change in ({"dtype": dtype}, {"offset": -8}, {"offset": 10**6}, {"shape": [-1, 3]}, {"shape": [10**9, 3]}):
        record = json.loads(path.read_text())
        record.pop("seal")
        record["arrays"]["logits"] |= change
        path.write_text(json.dumps(sealed(record)))
        with pytest.raises(UserError, match="is damaged"):
            Store(tmp_path / "s")


# ---- products --------------------------------------------------------------------------------------------------------


def product(folder: Path) -> Path:
    torch.manual_seed(0)
    spec = ModelSpec(model="stillhouse:mlp", options={"widths": [4]})
    task = Classification(("a", "b"), (3,))
    _save_product(Student(task.build(spec), spec, task), folder / "product")
    return folder / "product"


@pytest.mark.parametrize(
    "change",
    [
        cut("product.json"),
        overwrite("product.json", b"null"),
        overwrite("product.json", b"[" * 100_000),
        overwrite("product.json", b"\xff"),
        edited("product.json", kind=["student"]),
        edited("product.json", kind="os:system"),
        edited("product.json", kind="stillhouse.runs.products:shutil"),
        edited("product.json", kind="stillhouse.runs.products:nothing"),
        edited("product.json", model=3),
        edited("product.json", model={"model": 3}),
        edited("product.json", model={"model": "stillhouse:mlp", "options": {"widths": ["x"]}}),
        edited("product.json", model={"model": "hf:/etc"}),
        edited("product.json", model={"model": "hf:../other"}),
        edited("product.json", model={"model": "file:../x.py:Net"}),
        edited("product.json", task={"name": "classification"}),
        edited("product.json", task={"name": 3}),
        edited("product.json", task={"name": "../x"}),
        edited("product.json", task={"name": "classification", "classes": 3, "input_shape": "x"}),
        cut("model.safetensors"),
        flip("model.safetensors"),
        overwrite("model.safetensors", b""),
        gone("model.safetensors"),
        overwrite("checksums.json", b"["),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_product_is_a_sentence(change: Change, sealed: bool, tmp_path: Path) -> None:
    folder = product(tmp_path)
    assert stillhouse.load(folder)(torch.zeros(1, 3)).shape == (1, 2)
    if not sealed:
        (folder / "checksums.json").unlink()
    change(folder)
    try:
        stillhouse.load(folder)
    except UserError as error:
        assert "\n" not in str(error), error
    else:
        assert not sealed, "a change of a bit in the weights can be known by checksums alone"
