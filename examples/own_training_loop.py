"""Keep your training loop: `Distillation` is an `nn.Module` that computes the loss.

Each network runs once a batch, whatever the number of objectives.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stillhouse import Distillation, Progress

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
train_images, test_images, train_labels, test_labels = parts
loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=64, shuffle=True, drop_last=True)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def accuracy(model: nn.Module) -> float:
    with torch.inference_mode():
        return (model(test_images).argmax(1) == test_labels).float().mean().item()


def fit(module: Distillation, epochs: int = 20) -> None:
    module.build({"input": train_images[:2], "label": train_labels[:2]})  # hooks, and the layers that objectives own
    optimizer = torch.optim.AdamW(module.param_groups(), lr=5e-3)
    for epoch in range(epochs):
        for number, (x, y) in enumerate(loader):
            step = epoch * len(loader) + number
            progress = Progress(step, epoch, number, steps_per_epoch=len(loader), epochs=epochs)
            terms = module({"input": x, "label": y}, progress)
            terms["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    module.close()  # leaves no hook on any model


teacher, student = mlp(256), mlp(8)
fit(Distillation(teacher, None, ["ce"]))
fit(Distillation(student, teacher, ["ce", {"name": "kd", "temperature": 2.0}, "rkd"]))

print(f"accuracy: teacher {accuracy(teacher):.3f}, student {accuracy(student):.3f}")
