"""Accuracy of a classifier on test images that were changed: rotated, blurred, tinted, corrupted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from stillhouse.evaluation.classification import evaluate_classifier

if TYPE_CHECKING:
    from stillhouse.config.specs import DataSpec
    from stillhouse.runs.run import Run

Shifts = dict[str, list[str | dict[str, Any]]]
"""Name -> torchvision.transforms.v2 classes by name with their arguments, as `data.augment` takes them."""


def shifted_accuracy(
    model: nn.Module, run: Run, data: DataSpec, shifts: Mapping[str, list[str | dict[str, Any]]]
) -> dict[str, float]:
    """`accuracy_NAME` for every shift, on the test split; the change of an image is a function of its index, the same
    for every seed and model.

    Args:
        model: any classifier, on the run's device.
        run: gives the data.
        data: the data set; its own augmentation is not used.
        shifts: what is done to the images, by name.
    """
    from stillhouse.data import Loader

    out = {}
    for name, transforms in shifts.items():
        spec = data.model_copy(update={"augment": transforms, "mixup": 0.0, "cutmix": 0.0})
        loader = Loader(run.data(spec).dataset("test", train=True), 256, seed=0)
        out[f"accuracy_{name}"] = evaluate_classifier(model, loader, run.device, ["accuracy"])["accuracy"]
    return out
