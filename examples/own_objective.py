"""Write an objective of your own, and use it with those that are here.

Its options are the arguments of `__init__`; `needs` names the signals that it reads. As a file of its own with a
card, it also works in recipes: docs/adding-a-method.md.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stillhouse
from stillhouse import Batch, Progress, Signals


class ConfidentKD(stillhouse.Objective):
    """KL divergence, on the samples of which the teacher is sure."""

    name = "confident_kd"
    needs = frozenset({"student.logits", "teacher.logits"})

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        target = teacher.log_probs().detach()
        sure = (target.exp().amax(-1) > self.threshold).float()
        divergence = nn.functional.kl_div(student.log_probs(), target, reduction="none", log_target=True).sum(-1)
        return {"loss": (sure * divergence).mean(), "log:sure": sure.mean()}  # stays on the device: no .item()


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
train_images, test_images, train_labels, test_labels = parts
loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=64, shuffle=True)
train = {"epochs": 20, "optimizer": {"name": "adamw", "lr": 5e-3}}
teacher = stillhouse.distill(None, mlp(256), loader, ["ce"], train=train)
student = stillhouse.distill(teacher, mlp(8), loader, ["ce", (ConfidentKD(threshold=0.9), 0.5)], train=train)

with torch.inference_mode():
    right = student.cpu()(test_images).argmax(1) == test_labels
print(f"accuracy: student {right.float().mean():.3f}")
