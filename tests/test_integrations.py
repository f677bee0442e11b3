"""The same objectives in somebody else's loop: Lightning's Trainer, the transformers Trainer, and a plain loop."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stillhouse import Distillation, Ensemble, FrozenTeacher, Momentum, PastSelf, Progress
from stillhouse.config.specs import ModelSpec
from stillhouse.errors import MissingExtra, UserError
from stillhouse.models import build
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.objectives.kd import KD, kd_loss
from stillhouse.objectives.nkd_uskd import USKD

CLASSES = 4


def images(n: int = 48) -> tuple[Tensor, Tensor]:
    """Small images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % CLASSES
    for i, c in enumerate(y.tolist()):
        x[i, 0, 4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 2
    return x, y


def net(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(ModelSpec(model="stillhouse:mlp", options={"widths": [width, width]}), CLASSES, (1, 8, 8))


def taught(width: int, seed: int) -> nn.Module:
    """A teacher that knows its classes."""
    (x, y), model = images(), net(width, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.requires_grad_(False)


def hooks(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def all_close(a: nn.Module, b: nn.Module, tolerance: float = 1e-6) -> bool:
    ours, theirs = state(a), state(b)
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[k], theirs[k], atol=tolerance) for k in ours)


# ---- a loop of your own ----------------------------------------------------------------------------------------------


def test_a_plain_loop_uses_one_loss_as_a_function() -> None:
    (x, y), teacher, student = images(), taught(24, 0).eval(), net(8, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.2)
    losses = []
    for _ in range(20):
        with torch.no_grad():
            teacher_logits = teacher(x)
        logits = student(x)
        loss = 0.1 * F.cross_entropy(logits, y) + 0.9 * kd_loss(logits, teacher_logits, temperature=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_plain_loop_uses_a_distillation() -> None:
    (x, y), teacher, student = images(), taught(24, 0), net(8, 1)
    before = state(teacher)
    distillation = Distillation(student, teacher, [CrossEntropy(), KD(), USKD(student_layer="layer1")])
    batch = {"input": x, "label": y}
    distillation.build(batch)
    optimizer = torch.optim.SGD(distillation.param_groups(), lr=0.2)
    weak = state(distillation.objectives[2])
    progress, losses = Progress(steps_per_epoch=1, epochs=20), []
    for progress.epoch in range(20):
        terms = distillation(batch, progress)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < 0.8 * losses[0] and {"ce", "kd", "uskd.weak"} <= terms.keys()
    assert same(before, state(teacher)) and not [k for k in distillation.state_dict() if "teacher" in k]
    assert not torch.equal(weak["weak.weight"], distillation.objectives[2].weak.weight)
    assert hooks(student) == 1
    distillation.close()
    assert hooks(student, teacher) == 0


# ---- Lightning -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Any:
    """Lightning, without its advice about workers and shuffling."""
    module = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield module


def lightning_trainer(
    lightning: Any, folder: Path, rows: list[tuple[int, dict[str, float]]] | None = None, **options: Any
) -> Any:
    class Rows(lightning.loggers.logger.DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if rows is not None:
                rows.append((step or 0, metrics))

    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": Rows(),
        "default_root_dir": str(folder),
    }
    return lightning.Trainer(**{**quiet, **options})


def lightning_module(teacher: nn.Module, student: nn.Module, objectives: Any, lr: float = 0.05, **options: Any) -> Any:
    from stillhouse.integrations.lightning import DistillationModule

    return DistillationModule(
        student, teacher, objectives, optimizer=lambda groups: torch.optim.SGD(groups, lr=lr), **options
    )


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images()), batch_size=16, shuffle=shuffle)


def test_lightning_trains_the_student_and_leaves_the_teacher_alone(lightning: Any, tmp_path: Path) -> None:
    teacher, student, rows = taught(24, 0), net(8, 1).eval(), []
    before = state(teacher)
    module = lightning_module(teacher, student, ["ce", "kd", {"name": "nd", "adapter_dropout": 0.0}])
    lightning_trainer(lightning, tmp_path, rows, max_epochs=10, log_every_n_steps=5).fit(
        module, loader(), loader(shuffle=False)
    )
    logged = [(step, r) for step, r in rows if "train/loss" in r]
    assert [step for step, _ in logged] == [4, 9, 14, 19, 24, 29]
    assert {"train/ce", "train/kd", "train/nd", "train/nd.norm_ratio"} <= logged[0][1].keys()
    assert logged[-1][1]["train/loss"] < 0.8 * logged[0][1]["train/loss"]
    validated = [r["val/accuracy"] for _, r in rows if "val/accuracy" in r]
    assert validated[-1] > max(validated[0], 0.5)
    assert same(before, state(teacher)) and hooks(teacher, student) == 0
    (path,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert {k.split(".")[1] for k in saved["state_dict"]} == {"student", "objectives"}
    adapter = saved["state_dict"]["distillation.objectives.2.adapter.2.bias"]
    assert adapter.abs().max() > 0, "the adapter's bias starts at zero, so it was not trained"


def test_lightning_gives_what_a_plain_loop_gives(lightning: Any, tmp_path: Path) -> None:
    (x, y), teacher = images(), net(24, 0)
    module = lightning_module(teacher, net(8, 1), ["ce", "kd", {"name": "uskd", "student_layer": "layer1"}], seed=3)
    trainer = lightning_trainer(
        lightning, tmp_path, max_epochs=2, enable_checkpointing=False, accumulate_grad_batches=3
    )
    trainer.fit(module, loader(shuffle=False))
    plain = Distillation(net(8, 1), teacher, [CrossEntropy(), KD(), USKD(student_layer="layer1")], seed=3)
    plain.build({"input": x, "label": y})
    optimizer = torch.optim.SGD(plain.param_groups(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        for i in range(0, 48, 16):
            (plain({"input": x[i : i + 16], "label": y[i : i + 16]}, Progress())["loss"] / 3).backward()
        optimizer.step()
    plain.close()
    assert all_close(module.student, plain.student) and all_close(module.distillation.objectives, plain.objectives)


@pytest.mark.parametrize("kind", ["samples", "tokens"])
def test_accumulated_batches_of_unequal_size_are_one_batch_in_lightning(
    lightning: Any, tmp_path: Path, kind: str
) -> None:
    def trained(*batches: Any) -> Tensor:
        torch.manual_seed(0)
        student = nn.Linear(5, 3) if kind == "samples" else nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
        module = lightning_module(copy.deepcopy(student), student, ["ce"], lr=1.0)
        options = {
            "max_epochs": 1,
            "accumulate_grad_batches": 4,
            "gradient_clip_val": 0.1,
            "enable_checkpointing": False,
        }
        lightning_trainer(lightning, tmp_path, **options).fit(module, DataLoader(batches, batch_size=None))
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    torch.manual_seed(1)
    if kind == "samples":
        x, y = torch.randn(9, 5), torch.arange(9) % 3
        few = [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])]  # and fewer of them than are accumulated
    else:
        x, y = (torch.randint(9, (4, 12)) for _ in range(2))
        y = y.masked_fill(torch.arange(12) >= torch.tensor([[3], [12], [7], [1]]), -100)
        few = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(trained(*few), trained((x, y)), atol=1e-6, rtol=0)


def test_a_lightning_fit_resumes_with_what_objectives_and_teachers_learned(lightning: Any, tmp_path: Path) -> None:
    def fit(folder: Path, epochs: int, checkpoint: str | None = None) -> Any:
        module = lightning_module(
            {"teacher": net(24, 0), "own": Momentum(0.5)},
            net(8, 1),
            [CrossEntropy(), USKD(student_layer="layer1"), _own_kd()],
        )
        keep = lightning.callbacks.ModelCheckpoint(dirpath=folder, save_last=True)
        lightning_trainer(lightning, folder, max_epochs=epochs, callbacks=[keep]).fit(
            module, loader(shuffle=False), ckpt_path=checkpoint
        )
        return module

    unbroken = fit(tmp_path / "whole", 4)
    fit(tmp_path / "part", 2)
    resumed = fit(tmp_path / "part", 4, str(tmp_path / "part" / "last.ckpt"))
    assert same(state(unbroken), state(resumed))


def _own_kd() -> KD:
    objective = KD(temperature=2.0)
    objective.teacher = objective.name = "own"
    return objective


def test_a_lightning_checkpoint_loads_for_use_without_objectives(lightning: Any, tmp_path: Path) -> None:
    from stillhouse.integrations.lightning import DistillationModule

    module = lightning_module(net(24, 0), net(8, 1), ["ce", "kd", "nd"])
    lightning_trainer(lightning, tmp_path, max_epochs=1).fit(module, loader())
    (path,) = tmp_path.rglob("*.ckpt")
    fresh = DistillationModule.load_from_checkpoint(
        path, student=net(8, 5), teachers=net(24, 0), objectives=["ce", "kd", "nd"], optimizer={"lr": 0.1}
    )
    assert same(state(fresh.student), state(module.student))
    again = lightning_module(net(24, 0), net(8, 6), ["ce", "kd", "nd"])
    logits = lightning_trainer(lightning, tmp_path).predict(again, loader(shuffle=False), ckpt_path=path)
    assert torch.allclose(torch.cat(logits), module.student.eval()(images()[0]), atol=1e-6)


def test_a_lightning_fit_that_fails_leaves_no_hooks(lightning: Any, tmp_path: Path) -> None:
    class Fails(lightning.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise OSError("the disk is gone")

    teacher, student = net(24, 0), net(8, 1)
    module = lightning_module(teacher, student, ["ce", {"name": "nd"}])
    with pytest.raises(OSError, match="the disk is gone"):
        lightning_trainer(lightning, tmp_path, max_epochs=1, callbacks=[Fails()]).fit(module, loader())
    assert hooks(teacher, student) == 0


def test_a_lightning_training_without_an_end_is_refused(lightning: Any, tmp_path: Path) -> None:
    module = lightning_module(net(24, 0), net(8, 1), ["ce", "kd"])
    with pytest.raises(UserError, match="give the Trainer max_epochs and a loader with a length, or max_steps"):
        lightning_trainer(lightning, tmp_path, max_epochs=-1).fit(module, loader())


@pytest.mark.parametrize(
    ("module", "blocked", "extra"),
    [
        ("lightning", ["lightning.pytorch", "pytorch_lightning"], "lightning"),
        ("transformers", ["transformers"], "text"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    module: str, blocked: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in blocked:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"stillhouse.integrations.{module}", raising=False)
    with pytest.raises(MissingExtra, match=rf"pip install 'stillhouse\[{extra}\]'"):
        importlib.import_module(f"stillhouse.integrations.{module}")


# ---- transformers ----------------------------------------------------------------------------------------------------


class Examples(Dataset[dict[str, Any]]):
    """What an image processor leaves for a Trainer."""

    def __init__(self, n: int = 48) -> None:
        self.x, self.targets = images(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.x[i], "labels": int(self.targets[i]), "index": i}


@pytest.fixture
def transformers() -> Iterator[Any]:
    """transformers, saying little."""
    module = pytest.importorskip("transformers", reason="transformers is not installed")
    module.logging.disable_progress_bar()
    yield module


def vit(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": width,
        "patch_size": 4,
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return build(ModelSpec(model="hf:config:vit", options={**sizes, **dropout}), CLASSES, (1, 8, 8))


def hf_trainer(
    folder: Path,
    student: nn.Module,
    teachers: Any,
    objectives: Any,
    data: Any = None,
    evaluated: Any = None,
    **options: Any,
) -> Any:
    from transformers import TrainingArguments

    from stillhouse.integrations.transformers import DistillationTrainer

    quiet = {
        "output_dir": str(folder),
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "seed": 3,
    }
    plain = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 16,
    }
    arguments = TrainingArguments(**{**quiet, **plain, **options})
    return DistillationTrainer(
        student,
        arguments,
        train_dataset=data or Examples(),
        eval_dataset=evaluated,
        teachers=teachers,
        objectives=objectives,
    )


def test_the_transformers_trainer_trains_the_student_and_leaves_the_teacher_alone(
    transformers: Any, tmp_path: Path
) -> None:
    teacher, student = vit(16, 0), vit(8, 1)
    before = state(teacher)
    options = {
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "num_train_epochs": 10,
        "logging_steps": 5,
        "save_strategy": "epoch",
        "save_total_limit": 1,
    }
    objectives = ["ce", "kd", {"name": "nd", "adapter_dropout": 0.0}]
    trainer = hf_trainer(tmp_path, student, teacher, objectives, evaluated=Examples(), eval_strategy="epoch", **options)
    trainer.train()
    logged = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["step"] for r in logged] == [5, 10, 15, 20, 25, 30]
    assert {"ce", "kd", "nd", "nd.norm_ratio"} <= logged[0].keys()
    assert logged[-1]["loss"] < 0.8 * logged[0]["loss"]
    assert abs(logged[0]["ce"] + 0.9 * logged[0]["kd"] + logged[0]["nd"] - logged[0]["loss"]) < 1e-3
    judged = [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r]
    assert judged[-1] < judged[0]
    assert same(before, state(teacher)) and hooks(teacher, student) == 0
    trainer.save_model(str(tmp_path / "out"))
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == len(student.state_dict())
    loaded = type(student).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(images()[0]).logits, student.eval()(images()[0]).logits)
    saved = torch.load(tmp_path / "checkpoint-30" / "distillation.pt", weights_only=True)
    assert saved["objectives.2.adapter.2.bias"].abs().max() > 0 and all(k.startswith("objectives.") for k in saved)


@pytest.mark.parametrize(("n", "size"), [(48, 16), (40, 16)], ids=["equal batches", "a smaller last batch"])
def test_accumulated_batches_train_as_one_batch_and_as_a_plain_loop(
    transformers: Any, tmp_path: Path, n: int, size: int
) -> None:
    """One optimiser step is over all samples, so their order in it does not matter; the objective's own layer counts
    too, through four steps."""
    objectives = ["ce", "kd", {"name": "uskd", "student_layer": "vit.layers.0"}]
    teacher = vit(16, 0)
    trained = []
    for batch, accumulate in [(n, 1), (size, 3)]:
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
            "num_train_epochs": 4,
        }
        trainer = hf_trainer(tmp_path, vit(8, 1), teacher, copy.deepcopy(objectives), Examples(n), **options)
        trainer.train()
        trained.append(trainer)
    x, y = images(n)
    plain = Distillation(vit(8, 1), teacher, [CrossEntropy(), KD(), USKD(student_layer="vit.layers.0")], seed=3)
    plain.build({"input": {"pixel_values": x}, "label": y})
    optimizer = torch.optim.SGD(plain.param_groups(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        plain({"input": {"pixel_values": x}, "label": y}, Progress())["loss"].backward()
        optimizer.step()
    plain.close()
    for trainer in trained:
        assert all_close(trainer.model, plain.student, 1e-5) and all_close(
            trainer.distillation.objectives, plain.objectives, 1e-5
        )


def test_a_transformers_run_resumes_with_what_objectives_and_teachers_learned(
    transformers: Any, tmp_path: Path
) -> None:
    def train(folder: Path, steps: int, resume: bool = False) -> Any:
        teachers = {"teacher": vit(16, 0), "own": Momentum(0.5)}
        objectives = [CrossEntropy(), KD(), USKD(student_layer="vit.layers.0"), (_own_kd(), 0.5)]
        trainer = hf_trainer(
            folder,
            vit(8, 1),
            teachers,
            objectives,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    unbroken = train(tmp_path / "whole", 5)
    train(tmp_path / "part", 2)
    resumed = train(tmp_path / "part", 5, resume=True)
    assert same(state(unbroken.distillation), state(resumed.distillation))
    (tmp_path / "part" / "checkpoint-2" / "distillation.pt").unlink()
    with pytest.raises(UserError, match=r"holds no distillation\.pt"):
        trainer = hf_trainer(
            tmp_path / "part", vit(8, 1), vit(16, 0), [USKD(student_layer="vit.layers.0")], max_steps=5
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))


def test_a_text_classifier_learns_from_an_ensemble_and_its_past_self(transformers: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def bert(width: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": width,
            "vocab_size": 32,
        }
        return build(ModelSpec(model="hf:config:bert", options={"task": "text", **sizes}), 2, None)

    torch.manual_seed(0)
    ids = torch.randint(2, 32, (32, 6))
    labels = (ids[:, 0] > 16).long()
    rows = {
        "input_ids": ids.tolist(),
        "attention_mask": torch.ones_like(ids).tolist(),
        "label": labels.tolist(),
        "index": list(range(32)),
        "text": ["…"] * 32,
    }
    data = datasets.Dataset.from_dict(rows)
    past = PastSelf()
    past.start(labels, 2)
    from_past = KD(temperature=1.0)
    from_past.teacher, from_past.name = "past", "from_past"
    student = bert(8, 2)
    teachers = {"teacher": Ensemble([FrozenTeacher(bert(16, 0)), FrozenTeacher(bert(16, 1))]), "past": past}
    trainer = hf_trainer(
        tmp_path,
        student,
        teachers,
        [CrossEntropy(), KD(), (from_past, 0.3)],
        data,
        data,
        num_train_epochs=2,
        logging_steps=1,
    )
    trainer.train()
    assert past.table is not None and past.table.max() < 1, "it starts as one-hot labels, so no prediction was written"
    assert trainer.predict(data.remove_columns("label")).predictions.shape == (32, 2)
    assert "eval_loss" in trainer.evaluate()


def test_the_transformers_trainer_refuses_what_it_would_ignore(transformers: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="instead of label_smoothing_factor"):
        hf_trainer(tmp_path, vit(8, 1), vit(16, 0), ["ce", "kd"], label_smoothing_factor=0.1)


def test_a_second_train_starts_objectives_and_optimizer_anew(transformers: Any, tmp_path: Path) -> None:
    trainer = hf_trainer(
        tmp_path, vit(8, 1), vit(16, 0), [CrossEntropy(), USKD(student_layer="vit.layers.0")], num_train_epochs=1
    )
    trainer.train()
    first = trainer.optimizer
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trainer.optimizer is not first and all(id(p) in held for p in trainer.distillation.parameters())
    assert hooks(trainer.model) == 0
