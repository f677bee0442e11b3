"""Match inner layers: an objective names a *tap*, the path of a submodule of either network, and no network is edited.

A path is what `model.named_modules()` lists; `stage:2` is the second stage of a timm, torchvision or transformers
model.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stillhouse

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
train_images, test_images, train_labels, test_labels = parts
loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=64, shuffle=True)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def accuracy(model: nn.Module) -> float:
    with torch.inference_mode():
        return (model.cpu()(test_images).argmax(1) == test_labels).float().mean().item()


train = {"epochs": 10, "optimizer": {"name": "adamw", "lr": 1e-2}}
teacher = stillhouse.distill(None, Net(32), loader, ["ce"], train=train)
objectives = [
    "ce",
    {"name": "fitnet", "student_layer": "body.1", "teacher_layer": "body.1", "weight": 1},  # 16 channels learn 64
    # attention maps, of any widths
    {"name": "at", "weight": 100, "student_layers": ["body.0"], "teacher_layers": ["body.0"]},
]
student = stillhouse.distill(teacher, Net(8), loader, objectives, train=train)

print(f"accuracy: teacher {accuracy(teacher):.3f}, student {accuracy(student):.3f}")
