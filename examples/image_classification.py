"""Distil one timm network into another: any two names of `timm.list_models()` will do.

The two here are timm's small test networks, so that the script takes seconds. Take yours, such as "resnet50" and
"mobilenetv3_small_100", and your own `DataLoader` of (images, labels).
"""

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

import stillhouse

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images = interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, size=16)
parts = train_test_split(images, torch.tensor(labels), test_size=360, random_state=0, stratify=labels)
train_images, test_images, train_labels, test_labels = parts
loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=64, shuffle=True)


def network(name: str) -> torch.nn.Module:
    return timm.create_model(name, num_classes=10, in_chans=1)


def accuracy(model: torch.nn.Module) -> float:
    with torch.inference_mode():
        return (model.cpu()(test_images).argmax(1) == test_labels).float().mean().item()


train = {"epochs": 4, "optimizer": {"name": "adamw", "lr": 5e-3}}
teacher = stillhouse.distill(None, network("test_resnet"), loader, ["ce"], train=train)
student = stillhouse.distill(teacher, network("test_efficientnet"), loader, ["ce", "kd"], train=train)

print(f"accuracy: teacher {accuracy(teacher):.3f}, student {accuracy(student):.3f}")
torch.save(student.state_dict(), "student.pt")  # an ordinary timm network: timm.create_model(...) loads it
