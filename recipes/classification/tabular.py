"""A table as data for recipes: scikit-learn's breast-cancer measurements, 30 features scaled to [0, 1] by the training
samples, two classes."""

from __future__ import annotations

import torch
from torch import Tensor


class Table:
    """Rows of features with their labels."""

    classes = ["malignant", "benign"]

    def __init__(self, rows: Tensor, labels: list[int]) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.rows[i], self.labels[i]


def tumours(split: str) -> Table | None:
    """`train` (399 samples) or `test` (170); a fixed, stratified split."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    if split == "val":
        return None
    rows, labels = load_breast_cancer(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        rows, labels, test_size=170, stratify=labels, random_state=0
    )
    low, high = train.min(0), train.max(0)
    chosen, chosen_labels = (train, train_labels) if split == "train" else (test, test_labels)
    return Table(torch.from_numpy((chosen - low) / (high - low)).float(), [int(y) for y in chosen_labels])
