"""Distil under Lightning: its Trainer, callbacks and checkpoints as you know them.

Needs: pip install 'stillhouse[lightning]'.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stillhouse.integrations.lightning import DistillationModule

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
train_images, test_images, train_labels, test_labels = parts
loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=64, shuffle=True)
val_loader = DataLoader(TensorDataset(test_images, test_labels), batch_size=360)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def fit(student: nn.Module, teacher: nn.Module | None, objectives: list) -> float:
    module = DistillationModule(student, teacher, objectives, optimizer={"name": "adamw", "lr": 5e-3})
    trainer = pl.Trainer(
        max_epochs=15,
        accelerator="cpu",  # leave this out where you have a GPU
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, val_loader)
    return trainer.callback_metrics["val/accuracy"].item()


teacher, student = mlp(256), mlp(8)
alone = fit(teacher, None, ["ce"])
distilled = fit(student, teacher, ["ce", "kd"])

print(f"accuracy: teacher {alone:.3f}, student {distilled:.3f}")
