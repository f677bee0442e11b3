"""Half-precision checkpoints: students train in float32, frozen teachers stay as they are and teach students of any
precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillhouse
from stillhouse.errors import UserError
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.tasks.tokens import Tokens

HALF = [torch.bfloat16, torch.float16]
ADAMW = {"name": "adamw", "lr": 1e-5}
IMAGES = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in range(3)]


class Conv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Share of the weights that training changed."""
    pairs = [(v.float(), after[k].float()) for k, v in before.items() if v.is_floating_point() and k in after]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_a_half_precision_teacher_teaches_by_logits_and_features(half: torch.dtype, precision: str) -> None:
    teacher, student = Conv(8).to(half), Conv(4)
    objectives = ["ce", "kd", "nd", {"name": "fitnet"}, {"name": "rkd"}]
    stillhouse.distill(
        teacher, student, IMAGES, objectives, train={"epochs": 1, "precision": precision}, progress=False
    )
    assert {p.dtype for p in teacher.parameters()} == {half}
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in student.parameters())


@pytest.mark.parametrize("half", HALF, ids=str)
def test_a_half_precision_student_is_trained_in_float32(half: torch.dtype) -> None:
    torch.manual_seed(0)
    student = Conv(4).to(half)
    before = copy.deepcopy(student.state_dict())
    stillhouse.distill(Conv(8), student, IMAGES, ["ce", "kd"], train={"epochs": 2, "optimizer": ADAMW}, progress=False)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert moved(before, student.state_dict()) > 0.95


def test_a_student_stays_in_half_precision_where_asked() -> None:
    student = Conv(4).to(torch.bfloat16)
    train = {"epochs": 1, "optimizer": {"lr": 0.1}}
    stillhouse.distill(Conv(8), student, IMAGES, ["ce", "kd", "nd"], train=train, progress=False, half_weights=True)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


def test_inputs_of_another_precision_are_read(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float64):
        data = [(x.to(dtype), y) for x, y in IMAGES]
        stillhouse.distill(Conv(8), Conv(4), data, ["ce", "kd"], val_loader=data, train={"epochs": 1}, progress=False)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=HALF, ids=str)
def saved(request: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A transformers folder and a state dict as timm and torch save it, both in half precision, of networks for the
    digits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 4,
        "image_size": 8,
    }
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_channels=1, num_labels=10)).to(
        request.param
    )
    vit.save_pretrained(tmp_path / "folder")
    mlp = stillhouse.models.build(
        stillhouse.config.specs.ModelSpec(model="stillhouse:mlp", options={"widths": [12]}), 10, (1, 8, 8)
    )
    torch.save({"state_dict": mlp.to(request.param).state_dict()}, tmp_path / "weights.pt")
    return tmp_path / "folder", tmp_path / "weights.pt"


def run(folder: Path, **tree: Any) -> Any:
    train = {"epochs": 1, "batch_size": 32, "optimizer": ADAMW}
    config = recipe.validate(
        {
            "data": {"name": "digits", "size": 128},
            "objectives": ["ce", "kd", "nd"],
            "evaluate": ["accuracy"],
            "train": train,
            **tree,
        }
    )
    execute(config, folder, cpu=True)
    return load_product(folder).module


def test_saved_students_train_in_float32_and_saved_teachers_teach(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, weights = saved
    of_torch = {"model": "stillhouse:mlp", "options": {"widths": [12]}, "checkpoint": str(weights)}
    of_transformers = {"model": f"hf:{folder}", "pretrained": True}
    for number, (teacher, student) in enumerate([(of_torch, of_transformers), (of_transformers, of_torch)]):
        product = run(tmp_path / str(number), teacher=teacher, student=student)
        assert {p.dtype for p in product.parameters()} == {torch.float32}
        before = torch.load(weights)["state_dict"] if student is of_torch else _state(folder)
        assert moved(before, product.state_dict()) > 0.95


def test_a_recipe_may_ask_for_a_students_precision(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, weights = saved
    teacher = {"model": "stillhouse:mlp", "options": {"widths": [12]}, "checkpoint": str(weights)}
    product = run(
        tmp_path / "run", teacher=teacher, student={"model": f"hf:{folder}", "options": {"dtype": "bfloat16"}}
    )
    assert {p.dtype for p in product.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match=r"options\.dtype 'bfloat'.*did you mean 'bfloat16'"):
        run(tmp_path / "other", teacher=teacher, student={"model": f"hf:{folder}", "options": {"dtype": "bfloat"}})


def _state(folder: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder).state_dict()


# ---- language models and other trainers ------------------------------------------------------------------------------


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_half_precision_language_model_teaches(half: torch.dtype, chunked: bool) -> None:
    transformers = pytest.importorskip("transformers")

    def gpt(width: int) -> nn.Module:
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_embd=width, n_layer=1, n_head=2, n_positions=32)
        )

    ids = torch.randint(50, (4, 9))
    batch = {"input": {"input_ids": ids[:, :-1]}, "label": ids[:, 1:]}
    student, teacher = gpt(8), gpt(16).to(half)
    module = stillhouse.Distillation(
        student, teacher, ["ce", {"name": "gkd", "weight": 1.0}], task=Tokens("causal", 50), chunked=chunked
    ).build(batch)
    terms = module.train()(batch, stillhouse.Progress())
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    module.close()


def test_other_trainers_train_half_precision_students_in_float32(tmp_path: Path) -> None:
    lightning, transformers = pytest.importorskip("lightning.pytorch"), pytest.importorskip("transformers")
    from stillhouse.integrations.lightning import DistillationModule
    from stillhouse.integrations.transformers import DistillationTrainer

    class Named(Conv):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": super().forward(pixel_values)}

    student = Named(4).to(torch.bfloat16)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    loader = torch.utils.data.DataLoader(IMAGES, batch_size=None)
    module = DistillationModule(student, Conv(8).to(torch.bfloat16), optimizer={"lr": 1e-5})
    lightning.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=str(tmp_path), **quiet).fit(module, loader)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    student = Named(4).to(torch.float16)
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", num_train_epochs=1
    )
    rows = [{"pixel_values": x, "labels": int(y)} for batch in IMAGES for x, y in zip(*batch)]
    DistillationTrainer(student, arguments, train_dataset=rows, teachers=Named(8).to(torch.float16)).train()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in student.parameters())
