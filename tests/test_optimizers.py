"""Optimiser groups, schedules of the learning rate, memory layout, and the hook before an update."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillhouse
from stillhouse.config.specs import TrainSpec
from stillhouse.distillation.objective import Objective
from stillhouse.errors import UserError
from stillhouse.models.anatomy import depths_of
from stillhouse.training.optimizers import make_optimizer, rate_factor

DATA = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in range(3)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def optimizer(student: nn.Module, extra: list[dict[str, Any]] | None = None, **options: Any) -> torch.optim.Optimizer:
    spec = TrainSpec.model_validate({"optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.05, **options}})
    return make_optimizer([{"params": list(student.parameters())}, *(extra or [])], spec, student)


def settings(made: torch.optim.Optimizer, student: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(p): n for n, p in student.named_parameters()}
    return {
        names[id(p)]: (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"] if id(p) in names
    }


def test_decay_of_matrices_leaves_norms_biases_and_positions_out() -> None:
    timm = pytest.importorskip("timm")
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, num_classes=3)
    own = nn.Linear(4, 4)
    made = optimizer(student, [{"params": list(own.parameters()), "weight_decay": 0.5}], decay="matrices")
    decay = {n: d for n, (_, d) in settings(made, student).items()}
    assert decay["blocks.0.attn.qkv.weight"] == 0.05 and decay["head.weight"] == 0.05
    assert (
        decay["blocks.0.attn.qkv.bias"]
        == decay["blocks.0.norm1.weight"]
        == decay["pos_embed"]
        == decay["cls_token"]
        == 0
    )
    assert {g["weight_decay"] for g in made.param_groups for p in g["params"] if p is own.weight} == {0.5}
    assert {g["weight_decay"] for g in made.param_groups for p in g["params"] if p is own.bias} == {0}
    assert len(optimizer(student).param_groups) == 1, "as it is unless asked for"


def networks() -> dict[str, tuple[nn.Module, list[str]]]:
    """Networks with parameters from the input to the output, each one layer deeper than the last."""
    timm, transformers, vision = (pytest.importorskip(n) for n in ("timm", "transformers", "torchvision"))
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=9))
    return {
        "stages": (Net(), ["stem.weight", "layer1.0.weight", "layer2.0.weight", "head.weight"]),
        "timm": (
            timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2),
            ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "head.weight"],
        ),
        "transformers": (
            bert,
            [
                "bert.embeddings.word_embeddings.weight",
                "bert.encoder.layer.0.output.dense.weight",
                "bert.encoder.layer.1.output.dense.weight",
                "classifier.weight",
            ],
        ),
        "torchvision": (vision.models.resnet18(), ["conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight"]),
    }


@pytest.mark.parametrize("kind", ["stages", "timm", "transformers", "torchvision"])
def test_layer_decay_lowers_the_rate_towards_the_input(kind: str) -> None:
    student, path = networks()[kind]
    depth = depths_of(student)
    assert [depth[n] for n in path] == list(range(len(path))) and set(depth) == {
        n for n, _ in student.named_parameters()
    }
    rates = {n: r for n, (r, _) in settings(optimizer(student, layer_decay=0.5), student).items()}
    deepest = max(depth.values())
    assert all(rates[n] == pytest.approx(0.1 * 0.5 ** (deepest - depth[n])) for n in depth)
    assert rates[list(rates)[-1]] == pytest.approx(0.1)


def test_divided_groups_train_as_the_plain_ones_where_they_say_the_same() -> None:
    def trained(**options: Any) -> Tensor:
        torch.manual_seed(0)
        student = Net()
        train = {"epochs": 2, "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0, **options}}
        stillhouse.distill(None, student, DATA, ["ce"], train=train, progress=False)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    assert torch.equal(trained(), trained(decay="matrices")) and torch.equal(trained(), trained(layer_decay=1.0))
    assert not torch.equal(trained(), trained(layer_decay=0.5))


def spec(**schedule: Any) -> TrainSpec:
    return TrainSpec.model_validate({"epochs": 10, "optimizer": {"lr": 0.5}, "schedule": schedule})


def test_schedules_have_their_published_forms() -> None:
    assert rate_factor(spec(name="poly"), 5) == pytest.approx(0.5**0.9)
    assert rate_factor(spec(name="poly", power=2, min_lr=0.05), 5) == pytest.approx(0.1 + 0.9 * 0.25)
    assert [rate_factor(spec(name="exponential", gamma=0.5), e) for e in (0, 0.9, 1, 3.5)] == [1, 1, 0.5, 0.125]
    assert rate_factor(spec(name="exponential", gamma=0.5, min_lr=0.1, warmup_epochs=1), 9) == pytest.approx(0.2)


def test_one_cycle_is_that_of_torch() -> None:
    steps = 100
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(made, max_lr=0.5, total_steps=steps + 1)
    ours = spec(name="onecycle")
    for i in range(steps + 1):
        at = i / steps  # torch's peak lies at step 0.3 * (steps + 1) - 1
        peak = (0.3 * (steps + 1) - 1) / steps
        moved = at / peak * 0.3 if at < peak else 0.3 + (at - peak) / (1 - peak) * 0.7
        assert 0.5 * rate_factor(ours, 10 * moved) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.step() if i < steps else None


def test_what_is_stored_of_a_training_stays_valid_with_later_options() -> None:
    assert "decay" not in TrainSpec().identity()["optimizer"] and "power" not in TrainSpec().identity()["schedule"]
    changed = TrainSpec.model_validate({"optimizer": {"decay": "matrices", "layer_decay": 0.5}})
    assert {k: changed.identity()["optimizer"][k] for k in ("decay", "layer_decay")} == {
        "decay": "matrices",
        "layer_decay": 0.5,
    }


def test_channels_last_trains_to_the_same_weights() -> None:
    def trained(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        student, teacher = Net(), Net()
        seen: list[bool] = []
        student.stem.register_forward_pre_hook(
            lambda m, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last))
        )
        stillhouse.distill(teacher, student, DATA, ["ce", "kd"], train={"epochs": 1, **options}, progress=False)
        assert all(seen[-3:]) == ("channels_last" in options)
        return student

    plain, other = trained(), trained(channels_last=True)
    for a, b in zip(plain.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert all(p.is_contiguous() for p in other.parameters())


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_gradient_checkpointing_trains_to_the_same_weights(library: str) -> None:
    source = pytest.importorskip(library)

    def network() -> tuple[nn.Module, nn.Module]:
        """A network, and a layer inside a block."""
        if library == "timm":
            made = source.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_classes=4)
            return made, made.blocks[0].norm1
        config = source.GPT2Config(vocab_size=32, n_layer=2, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0)
        made = source.GPT2LMHeadModel(config)
        return made, made.transformer.h[0].ln_1

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32, (2, 8), generator=draw)
    images = (torch.randn(4, 3, 32, 32, generator=draw), torch.tensor([0, 1, 2, 3]))
    data: Any = [images if library == "timm" else {"input_ids": ids, "labels": ids}] * 3

    def trained(**options: Any) -> tuple[nn.Module, int]:
        """The network, and how often a layer of it ran while gradients were kept."""
        torch.manual_seed(0)
        (student, layer), (teacher, _) = network(), network()
        runs: list[bool] = []
        layer.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
        given = {"epochs": 1, "optimizer": {"name": "adamw", "lr": 1e-3}, **options}
        stillhouse.distill(teacher, student, data, ["ce", "kd"], train=given, progress=False)
        return student, sum(runs)

    (plain, once), (other, twice) = trained(), trained(gradient_checkpointing=True)
    assert twice >= once + 3, "in each step the layer runs again"
    for a, b in zip(plain.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert not any(
        getattr(m, n, False) for m in other.modules() for n in ("gradient_checkpointing", "grad_checkpointing")
    )


def test_gradient_checkpointing_of_a_network_that_cannot_is_refused() -> None:
    with pytest.raises(UserError, match=r"gradient_checkpointing: a Net cannot"):
        stillhouse.distill(Net(), Net(), DATA, ["ce"], train={"gradient_checkpointing": True}, progress=False)


# ---- before_update ---------------------------------------------------------------------------------------------------


class Watching(Objective):
    """Records the gradient's norm before each update, and stops the student's head from learning."""

    name = "watching"

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def forward(self, student: Any, teacher: Any, batch: Any, progress: Any) -> dict[str, Tensor]:
        return {"loss": student.logits.square().sum() * 100}

    def before_update(self, ctx: Any) -> None:
        gradients = [p.grad for p in ctx.student.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        for p in ctx.student.head.parameters():
            assert p.grad is not None
            p.grad.zero_()


class Named(Net):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": super().forward(pixel_values)}


@pytest.mark.parametrize("trainer", ["distill", "lightning", "transformers"])
def test_gradients_are_seen_and_changed_before_clipping_once_an_update(trainer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, objective = Named(), Watching()
    head, stem = student.head.weight.clone(), student.stem.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if trainer == "distill":
            train = {"epochs": 2, "accumulate": 3, "clip": 0.1, "optimizer": {"lr": 0.1}}
            stillhouse.distill(None, student, DATA, [objective], train=train, progress=False)
        elif trainer == "lightning":
            lightning = pytest.importorskip("lightning.pytorch")
            from stillhouse.integrations.lightning import DistillationModule

            quiet = {
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
            }
            module = DistillationModule(student, None, [objective], optimizer={"lr": 0.1})
            fitted = lightning.Trainer(
                accelerator="cpu",
                max_epochs=2,
                accumulate_grad_batches=3,
                gradient_clip_val=0.1,
                default_root_dir=str(tmp_path),
                **quiet,
            )
            fitted.fit(module, torch.utils.data.DataLoader(DATA, batch_size=None))
        else:
            transformers = pytest.importorskip("transformers")
            from stillhouse.integrations.transformers import DistillationTrainer

            options = {
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                "save_strategy": "no",
                "max_grad_norm": 0.1,
                "weight_decay": 0,
            }
            sizes = {
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 3,
                "num_train_epochs": 2,
                "learning_rate": 0.1,
            }
            arguments = transformers.TrainingArguments(str(tmp_path), **options, **sizes)
            rows = [{"pixel_values": x, "labels": int(y)} for batch in DATA for x, y in zip(*batch)]
            DistillationTrainer(student, arguments, train_dataset=rows, teachers=None, objectives=[objective]).train()
    assert len(objective.norms) == 2 and min(objective.norms) > 0.5, "not clipped"
    assert not torch.equal(student.stem.weight, stem)
    torch.testing.assert_close(student.head.weight, head, atol=2e-4, rtol=0.01)  # but for weight decay
