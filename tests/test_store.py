"""A teacher's signals on disk: what is kept, that students learn from it as from the live teacher, and that nothing
whole is lost or made twice."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse import FrozenTeacher
from stillhouse.config.specs import StoreSpec
from stillhouse.data import BatchKey, IndexedDataset, Loader
from stillhouse.data.dataset import ItemInputs, PixelInputs
from stillhouse.errors import UserError
from stillhouse.objectives.kd import kd_loss, kd_top_loss
from stillhouse.runs import recipe as recipes
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.signals import TopK
from stillhouse.store import Store, StoredDataset, cache
from stillhouse.store.format import decode, encode, rounding
from stillhouse.store.writing import top_k

CLASSES = 6


class Net(nn.Module):
    """A little classifier that counts the images it has seen, and may fail at one of its calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(4, CLASSES)
        self.seen, self.calls, self.at_call = 0, 0, lambda call: None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.at_call(self.calls)
        self.seen += len(x)
        return self.fc(self.body(x).mean((2, 3)))


def images(n: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def dataset(n: int = 50, pad: int = 2, seed: int = 0) -> IndexedDataset:
    inputs = PixelInputs(images(n, seed), np.arange(n), (0.5,) * 3, (0.25,) * 3, (8, 8), pad, flip=pad > 0)
    return IndexedDataset(inputs, np.arange(n) % CLASSES, CLASSES)


FACTS: dict[str, Any] = {
    "teacher_facts": {"weights": "w", "model": "net"},
    "data_facts": {"fingerprint": "f", "split": "train", "spec": {"size": 50}, "transform": {"augment": "standard"}},
}


def written(
    folder: Path, net: Net | None = None, data: Any = None, *, rank: int = 0, world: int = 1, **spec: Any
) -> Store:
    keep = StoreSpec(**{"shard_rows": 16, **spec})
    cache(FrozenTeacher(net or Net()), data or dataset(), folder, keep, batch_size=8, rank=rank, world=world, **FACTS)
    return Store(folder)


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.0), ("fp16", 4e-3), ("bf16", 4e-2), ("int8", 0.04)])
def test_each_precision_is_read_back_within_the_error_that_it_says(precision: Any, bound: float):
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)).mul(2).clamp(-5, 5)
    x[3, 2:] = -math.inf
    held = encode(x, precision)
    back, said = decode(held, precision), rounding(x, held, precision)
    assert torch.equal(torch.isinf(x), torch.isinf(back))
    worst = (back - x)[torch.isfinite(x)].abs().max().item()
    assert worst <= bound and said["largest"] == pytest.approx(worst) and said["count"] == torch.isfinite(x).sum()


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(UserError, match="NaN"):
        encode(torch.tensor([[1.0, math.nan]]), "fp32")
    with pytest.raises(UserError, match=r"65504; choose bf16"):
        encode(torch.tensor([[1.0, 1e5]]), "fp16")


def test_rows_come_in_any_order_as_the_live_teacher_gives_them(tmp_path: Path):
    net, data = Net(), dataset()
    store = written(tmp_path / "s", net, data, views=2, embedding=True, taps=["body"])
    rows = np.array([49, 3, 17, 3, 30])
    for view in (0, 1):
        batch = data.batch(BatchKey(view, rows, 0, 5), 0)
        live = FrozenTeacher(net)
        live.attach({"embedding", "tap:body"}, batch, net)
        said, held = live(batch), store.read(rows, view)
        torch.testing.assert_close(held["logits"], said.logits)
        torch.testing.assert_close(held["embedding"], said.embedding)
        torch.testing.assert_close(held["tap:body"], said.taps["body"])
        live.close()


@pytest.mark.parametrize("k", [1, 3])
def test_the_top_and_the_tail_are_the_whole_mass(tmp_path: Path, k: int):
    net, data = Net(), dataset()
    store = written(tmp_path / "s", net, data, top=k)
    held = store.read(np.arange(50))
    torch.testing.assert_close(held["top"].exp().sum(1) + held["top.tail"], torch.ones(50))
    with torch.no_grad():
        live = torch.log_softmax(net(data.batch(BatchKey(0, np.arange(50), 0, 50), 0)["input"]), 1)
    torch.testing.assert_close(held["top"], live.topk(k).values)
    torch.testing.assert_close(live.gather(1, held["top.indices"]), held["top"])


def test_as_many_top_classes_as_there_are_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="leave `top` out"):
        written(tmp_path / "s", top=CLASSES)


def test_the_crop_and_flip_that_are_kept_give_the_inputs_that_the_teacher_saw(tmp_path: Path):
    data = dataset()
    store = written(tmp_path / "s", data=data, views=2)
    padded = torch.nn.functional.pad(images(), (2, 2, 2, 2))
    rows = np.arange(50)
    for view in (0, 1):
        crop, flip = store.column("crop", rows, view), store.column("flip", rows, view)
        assert flip.any() and not flip.all() and len(np.unique(crop[:, 0])) > 1
        cut = [padded[i, :, t + 2 : t + 2 + h, w + 2 : w + 2 + b] for i, (t, w, h, b) in enumerate(crop.tolist())]
        mine = torch.stack([c.flip(-1) if f else c for c, f in zip(cut, flip)]).float().div(255).sub(0.5).div(0.25)
        torch.testing.assert_close(data.batch(BatchKey(view, rows, 0, 50), 0)["input"], mine)


def test_crops_and_flips_of_torchvision_transforms_are_kept_too():
    from torchvision.transforms import v2

    chain = v2.Compose([v2.RandomCrop(6), v2.RandomHorizontalFlip()])
    pixels = images()
    inputs = ItemInputs(lambda i: pixels[i], np.arange(50), chain, (3, 6, 6), (0.5,) * 3, (0.25,) * 3)
    x, drawn = inputs.recorded(np.arange(50), 1, 0)
    torch.testing.assert_close(x, inputs(np.arange(50), 1, 0))
    cut = [pixels[i, :, t : t + h, w : w + b] for i, (t, w, h, b) in enumerate(drawn["crop"].tolist())]
    mine = torch.stack([c.flip(-1) if f else c for c, f in zip(cut, drawn["flip"])]).float().div(255).sub(0.5).div(0.25)
    torch.testing.assert_close(x, mine)


def test_batches_replay_the_view_whatever_the_runs_seed_and_the_workers(tmp_path: Path):
    data = dataset()
    store = written(tmp_path / "s", data=data, views=3, seed=7)
    for workers in (0, 2):
        loader = Loader(StoredDataset(data, [store]), 10, seed=99, shuffle=True, workers=workers)
        for epoch in (1, 5):
            batch = next(loader.batches(epoch, 0, epoch + 1))
            rows = batch["index"].numpy()
            assert torch.equal(batch["input"], data.batch(BatchKey(epoch % 3, rows, 0, 10), 7)["input"])
            assert torch.equal(batch["stored"][store.id]["logits"], store.read(rows, epoch % 3)["logits"])


# ---- nothing lost, nothing made twice --------------------------------------------------------------------------------


def test_a_write_that_was_cut_off_makes_only_what_is_missing(tmp_path: Path):
    def die(call: int) -> None:
        if call == 6:  # the probe, two batches each of two shards, and the third's first
            raise KeyboardInterrupt

    net = Net()
    net.at_call = die
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "s", net)
    with pytest.raises(UserError, match="2 of 4 shards are missing"):
        Store(tmp_path / "s")
    again = Net()
    store = written(tmp_path / "s", again)
    assert again.seen == 2 + 18  # two samples to look at, then the third and the fourth shard
    assert torch.equal(store.read(np.arange(50))["logits"], written(tmp_path / "whole").read(np.arange(50))["logits"])


@pytest.mark.parametrize("how", ["torn", "corrupted", "missing", "no record", "damaged record"])
def test_a_damaged_shard_is_named_and_only_it_is_made_again(tmp_path: Path, how: str):
    before = written(tmp_path / "s").read(np.arange(50))["logits"]
    shard, record = tmp_path / "s/shards/000001.bin", tmp_path / "s/shards/000001.json"
    raw = bytearray(shard.read_bytes())
    if how == "torn":
        shard.write_bytes(raw[:100])
    elif how == "corrupted":
        raw[70] ^= 1
        shard.write_bytes(raw)
    elif how == "missing":
        shard.unlink()
    elif how == "no record":
        record.unlink()
    else:
        record.write_text("{")
    with pytest.raises(UserError, match=r"000001|first is 1"):
        Store(tmp_path / "s")
    net = Net()
    assert torch.equal(written(tmp_path / "s", net).read(np.arange(50))["logits"], before)
    assert net.seen == 2 + 16


def test_a_full_disk_is_said_and_what_was_written_stays(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(call: int) -> None:
        if call == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    net = Net()
    net.at_call = fill
    try:
        with pytest.raises(UserError, match="the disk is full"):
            written(tmp_path / "s", net)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "s/shards").iterdir()) == ["000000.bin", "000000.json"]
    again = Net()
    written(tmp_path / "s", again)
    assert again.seen == 2 + 34


def test_processes_write_their_shares_and_the_store_is_that_of_one(tmp_path: Path):
    with pytest.raises(UserError, match="not finished"):
        written(tmp_path / "two", rank=1, world=2)
    written(tmp_path / "two", rank=0, world=2)
    written(tmp_path / "one")
    for shard in (tmp_path / "one/shards").iterdir():
        assert shard.read_bytes() == (tmp_path / "two/shards" / shard.name).read_bytes()


def test_a_folder_of_another_store_or_of_other_files_is_refused(tmp_path: Path):
    written(tmp_path / "s")
    with pytest.raises(UserError, match=r"another store \(precision: \"fp32\" there, \"fp16\" here\)"):
        written(tmp_path / "s", precision="fp16")
    (tmp_path / "t").mkdir()
    (tmp_path / "t/notes").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a store"):
        written(tmp_path / "t")
    with pytest.raises(UserError, match="There is no store at"):
        Store(tmp_path / "nowhere")


# ---- the objective of a teacher that is known by its top k -----------------------------------------------------------


def scores(rows: int = 12, classes: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=g).mul(2), torch.randn(rows, classes, generator=g).mul(2)


def test_kd_of_all_but_one_class_is_kd():
    student, teacher = scores()
    for temperature in (1.0, 4.0):
        torch.testing.assert_close(
            kd_top_loss(student, TopK(*top_k(teacher, 8)), temperature), kd_loss(student, teacher, temperature)
        )


@pytest.mark.parametrize("k", [1, 3, 6])
def test_kd_of_the_top_is_never_above_kd_and_nothing_is_left_to_learn_at_the_teacher(k: int):
    student, teacher = scores()
    top = TopK(*top_k(teacher, k))
    assert 0 < kd_top_loss(student, top, 1.0) <= kd_loss(student, teacher, 1.0)
    at = teacher.clone().requires_grad_()
    kd_top_loss(at, top, 1.0).backward()
    torch.testing.assert_close(at.grad, torch.zeros_like(teacher), atol=1e-6, rtol=0)


def test_rows_of_which_less_is_known_count_for_what_is_known():
    student, teacher = scores(rows=2)
    values, indices, tail = top_k(teacher, 3)
    short = TopK(values.clone(), indices.clone(), tail.clone())
    short.log_probs[0, 2], short.indices[0, 2] = -math.inf, indices[0, 0]
    short.tail[0] = 1 - values[0, :2].exp().sum()
    expected = (
        kd_top_loss(student[:1], TopK(*top_k(teacher[:1], 2)), 2.0)
        + kd_top_loss(student[1:], TopK(*top_k(teacher[1:], 3)), 2.0)
    ) / 2
    unknown = TopK(*(torch.cat([a, b]) for a, b in zip((short.log_probs, short.indices, short.tail), nothing(3))))
    leaf = torch.cat([student, torch.randn(1, 9)]).requires_grad_()
    loss = kd_top_loss(leaf, unknown, 2.0)
    # at T = 2 the tail of a shorter row is spread over fewer classes: compared where that does not matter
    loss_1 = kd_top_loss(leaf, unknown, 1.0)
    expected_1 = (
        kd_top_loss(student[:1], TopK(*top_k(teacher[:1], 2)), 1.0)
        + kd_top_loss(student[1:], TopK(*top_k(teacher[1:], 3)), 1.0)
    ) / 2
    torch.testing.assert_close(loss_1, expected_1)
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.05)
    loss.backward()
    assert torch.isfinite(leaf.grad).all() and (leaf.grad[2] == 0).all()


def nothing(k: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((1, k), -math.inf), torch.zeros(1, k, dtype=torch.int64), torch.ones(1)


# ---- recipes ---------------------------------------------------------------------------------------------------------

RECIPE = """
data: {name: digits, size: 120, test_size: 100}
teacher: {model: "stillhouse:convnet3", options: {width: 4}, train: {epochs: 1, batch_size: 40}}
student: {model: "stillhouse:convnet3", options: {width: 4}}
objectives: [{name: ce, weight: 0.1}, {name: kd, weight: 0.9}]
train: {epochs: 3, batch_size: 40}
"""


def run(recipe: Path, out: Path, *sets: str) -> dict[str, Tensor]:
    execute(recipes.load(recipe, sets=sets), out, cpu=True)
    return load_product(out).module.state_dict()


def test_a_student_of_the_store_is_that_of_the_live_teacher_to_the_bit(recipe_file, tmp_path: Path):
    path = recipe_file(RECIPE)
    live = run(path, tmp_path / "live")
    stored = run(path, tmp_path / "stored", "teacher.store={views: 3}")
    assert all(torch.equal(live[k], stored[k]) for k in live)
    other = run(path, tmp_path / "fewer", "teacher.store={views: 1}")
    assert not all(torch.equal(live[k], other[k]) for k in live)


def test_the_command_writes_a_store_that_recipes_name(recipe_file, tmp_path: Path):
    path, store = recipe_file(RECIPE), tmp_path / "store"
    command = [
        sys.executable,
        "-m",
        "stillhouse",
        "cache",
        str(path),
        "--out",
        str(store),
        "--top",
        "3",
        "--precision",
        "int8",
        "--cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (
        "120 samples, 1 view: top 3 of 10 classes and the tail; int8" in done.stdout
        and "rounding of top: at most" in done.stdout
    )
    run(path, tmp_path / "run", f"teacher={{store: {store}}}")
    manifest = json.loads((store / "manifest.json").read_text())
    assert (
        manifest["teacher"]["weights"]
        and manifest["data"]["fingerprint"]
        and manifest["data"]["transform"]["augment"] == "standard"
    )


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and a store of its teacher's top 3."""
    from stillhouse.runs.caching import asked, make_for

    folder = tmp_path_factory.mktemp("held")
    (folder / "recipe.yaml").write_text(RECIPE)
    config = recipes.load(folder / "recipe.yaml")
    make_for(config, "teacher", asked(config, "teacher", {"top": 3}), folder / "store", cpu=True)
    return folder / "recipe.yaml", folder / "store"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.size=100", r"written over other data \(size: 120 there, 100 here\)"),
        ("data.augment=plain", r'other transforms \(data.augment: "standard" there, "plain" here\)'),
        ("data.image_size=12", "other transforms"),
        ("data.mixup=0.2", "data.mixup and data.cutmix mix a batch"),
        ("objectives=[dkd]", "'dkd' needs the teacher's logits, but the teacher 'teacher' gives only top; the store"),
        ("objectives=[rkd]", "'rkd' needs the teacher's embedding"),
        ("objectives=[at]", "'at' needs the teacher's tap"),
        ("objectives=[{name: kd, standardise: true}]", "needs the teacher's logits"),
    ],
)
def test_a_store_of_something_else_is_refused_at_start(held, tmp_path: Path, change: str, sentence: str):
    path, store = held
    with pytest.raises(UserError, match=sentence):
        execute(recipes.load(path, sets=[f"teacher={{store: {store}}}", change]), tmp_path / "run", cpu=True)


def test_inputs_that_can_no_longer_be_made_again_are_refused(tmp_path: Path):
    store = written(tmp_path / "s")
    facts = FACTS["data_facts"]
    store.check(facts, CLASSES, dataset())
    with pytest.raises(UserError, match="cannot be reproduced here"):
        store.check(facts, CLASSES, dataset(seed=1))
    with pytest.raises(UserError, match="scores 6 classes, but the data has 5"):
        store.check(facts, 5, dataset())


def test_a_teacher_that_learns_cannot_be_stored(recipe_file):
    with pytest.raises(UserError, match="momentum changes as the student learns"):
        recipes.load(recipe_file(RECIPE), sets=["teacher={momentum: 0.9, store: {views: 2}}"])


def test_a_taught_ensemble_and_two_stores_of_other_views(recipe_file, tmp_path: Path):
    one = "{model: 'stillhouse:convnet3', options: {width: 4}, train: {epochs: 1, batch_size: 40}"
    run(
        recipe_file(RECIPE),
        tmp_path / "ensemble",
        f"teacher={{ensemble: [{one}, seed: 1}}, {one}, seed: 2}}], store: {{views: 3}}}}",
    )
    two = f"teachers={{teacher: {one}, store: {{views: 2}}}}, other: {one}, store: {{views: 3}}}}}}"
    with pytest.raises(UserError, match="one view at a time"):
        run(recipe_file(RECIPE), tmp_path / "two", "teacher=null", two)


def test_embeddings_and_taps_teach_from_a_store(recipe_file, tmp_path: Path):
    path = recipe_file(RECIPE)
    keep = "teacher.store={logits: false, embedding: true, taps: ['stage:2'], precision: bf16}"
    run(
        path,
        tmp_path / "run",
        keep,
        "objectives=[ce, rkd, {name: at, teacher_layers: ['stage:2'], student_layers: ['stage:2']}]",
    )


# ---- several processes -----------------------------------------------------------------------------------------------

DYING = """
import os, signal, sys
from stillhouse.store import format
write = format.write_shard
def die(folder, number, arrays, facts):
    if number == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, number, arrays, facts)
format.write_shard = die
sys.argv = ["stillhouse", *sys.argv[1:]]
from stillhouse.cli import main
main()
"""


def started(recipe: Path, out: Path, *more: str, world: int = 1, die_at: int | None = None) -> list[int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, *(["-m", "stillhouse"] if die_at is None else ["-c", DYING])]
    command += ["cache", str(recipe), "--out", str(out), "--cpu", "--set", "teacher.store.shard_rows=16", *more]
    processes = []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIE_AT": str(die_at)}
        if world > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    return [p.wait(120) for p in processes]


def test_ranks_ray_workers_and_a_killed_pass_write_the_store_of_one_process(recipe_file, tmp_path: Path):
    path = recipe_file(RECIPE.replace("batch_size: 40}}", "batch_size: 40}, store: {views: 2}}"))
    assert started(path, tmp_path / "one") == [0]
    assert started(path, tmp_path / "killed", die_at=3) == [-signal.SIGKILL]
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed/shards").iterdir()}
    assert len(kept) == 6
    assert started(path, tmp_path / "killed") == [0]
    assert all((tmp_path / "killed/shards" / n).stat().st_mtime_ns == t for n, t in kept.items())
    assert started(path, tmp_path / "ranks", world=2) == [0, 0]
    for folder in ("killed", "ranks"):
        for shard in (tmp_path / "one/shards").iterdir():
            assert shard.read_bytes() == (tmp_path / folder / "shards" / shard.name).read_bytes()


def test_ray_workers_write_the_store_of_one_process(held, tmp_path: Path):
    pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
    path, _ = held
    assert started(path, tmp_path / "ray", "--engine", "ray", "--jobs", "2", "--top", "3") == [0]
    assert started(path, tmp_path / "one", "--top", "3") == [0]
    for shard in (tmp_path / "one/shards").iterdir():
        assert shard.read_bytes() == (tmp_path / "ray/shards" / shard.name).read_bytes()


# ---- rows of tokens --------------------------------------------------------------------------------------------------

LANGUAGE = """
data:
  name: "text:{file}"
  options: {{tokenizer: bytes, context: 48}}
teacher: {{model: "hf:config:gpt2", options: {{n_layer: 1, n_head: 2, n_embd: 16}}, 
  train: {{epochs: 1, batch_size: 8}}}}
student: {{model: "hf:config:gpt2", options: {{n_layer: 1, n_head: 2, n_embd: 8}}}}
objectives: [kd]
train: {{epochs: 2, batch_size: 8, optimizer: {{name: adamw, lr: 0.003}}}}
evaluate: [accuracy]
"""


def test_token_rows_of_different_lengths_teach_as_the_live_teacher_does(recipe_file, tmp_path: Path):
    lines = [{"prompt": f"say {'x' * (i % 5)}: ", "completion": "abc" * (1 + i % 7)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = recipe_file(LANGUAGE.format(file=tmp_path / "pairs.jsonl"))
    live = run(path, tmp_path / "live")
    full = run(path, tmp_path / "full", "teacher.store={views: 1, shard_rows: 10}")
    assert all(torch.allclose(live[k], full[k], atol=1e-5) for k in live)
    top = run(
        path,
        tmp_path / "top",
        "teacher.store={top: 32, precision: fp16, shard_rows: 10}",
        "objectives=[{name: kd, temperature: 1}]",
    )
    assert all(torch.isfinite(v).all() for v in top.values())


class Text:
    """20 samples of 1 to 5 tokens, each of which is its own label."""

    def __len__(self) -> int:
        return 20

    def batch(self, key: BatchKey, seed: int) -> dict[str, Any]:
        own = key.indices[key.start : key.stop]
        lengths = torch.from_numpy(own % 5 + 1)
        inside = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        ids = torch.where(inside, torch.from_numpy(own)[:, None] + torch.arange(inside.shape[1])[None], 0)
        input = {"input_ids": ids, "attention_mask": inside.long()}
        return {"input": input, "label": torch.where(inside, ids, -100), "index": torch.from_numpy(own)}


class Tagger(nn.Module):
    """Says of each token which it is."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(input_ids, 30).float() * 9 * attention_mask[..., None] + 1e-3 * torch.arange(
            30
        )


def test_a_sample_longer_than_the_teachers_context_is_named_and_what_was_written_stays(tmp_path: Path):
    model = Tagger()
    model.config = SimpleNamespace(max_position_embeddings=4)
    with pytest.raises(UserError, match="Sample 4 has 5 tokens, but the teacher reads at most 4"):
        cache(FrozenTeacher(model), Text(), tmp_path / "s", StoreSpec(shard_rows=4), batch_size=2, **FACTS)
    assert (tmp_path / "s/shards/000000.json").exists()
    model.config.max_position_embeddings = 5
    assert cache(FrozenTeacher(model), Text(), tmp_path / "s", StoreSpec(shard_rows=4), batch_size=2, **FACTS) == 4


def test_signals_of_tokens_lie_where_their_labels_are(tmp_path: Path):
    cache(FrozenTeacher(Tagger()), Text(), tmp_path / "s", StoreSpec(top=2, shard_rows=7), batch_size=4, **FACTS)
    store = Store(tmp_path / "s")
    assert store.tokens == sum(i % 5 + 1 for i in range(20))
    rows = np.array([19, 0, 8, 7, 13])
    batch = StoredDataset(Text(), [store]).batch(BatchKey(0, rows, 0, 5), 0)
    held, inside = batch["stored"][store.id], batch["label"] != -100
    assert torch.equal(held["top.indices"][..., 0][inside], batch["label"][inside])
    assert (held["top.tail"][~inside] == 1).all() and torch.isinf(held["top"][~inside]).all()
