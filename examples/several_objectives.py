"""Weigh several objectives, give them options, and let a weight change over training.

`stillhouse methods` lists the names, `stillhouse methods nkd` shows the options of one.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stillhouse

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
train_images, test_images, train_labels, test_labels = parts
loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=64, shuffle=True)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def accuracy(model: nn.Module) -> float:
    with torch.inference_mode():
        return (model.cpu()(test_images).argmax(1) == test_labels).float().mean().item()


train = {"epochs": 10, "optimizer": {"name": "adamw", "lr": 5e-3}}
teacher = stillhouse.distill(None, mlp(256), loader, ["ce"], train=train)
objectives = [
    "ce",  # by name, with its published weight
    {"name": "kd", "temperature": 2.0, "weight": 0.5},  # options and weight
    {"name": "dist", "weight": {"kind": "linear", "start": 1.0, "end": 0.1}},  # a weight that falls over training
    {"name": "rkd"},  # relations between the embeddings of a batch
]
student = stillhouse.distill(teacher, mlp(8), loader, objectives, train=train, folder="runs/several")

print(f"accuracy: teacher {accuracy(teacher):.3f}, student {accuracy(student):.3f}")
print("each objective's loss by step: runs/several/metrics.csv")
