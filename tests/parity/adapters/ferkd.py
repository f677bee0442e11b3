"""FKD's label compression, crop replay and CutMix against the arrays of `ferkd`."""

from __future__ import annotations

import re

import torch

from parity.case import Case
from stillhouse.functional.divergences import soft_cross_entropy
from stillhouse.methods.classification.ferkd.labels import compress, cutmix, restore
from stillhouse.methods.classification.ferkd.regions import replay


def fkd(case: Case) -> None:
    p = case.params
    probs = torch.softmax(case["teacher_logits"] / p["teacher_temp"], dim=1)
    case.close("teacher_prob", probs)
    stored, _, top = p["quant_type"].partition("_k")
    kind = re.sub(r"_k\d+$", "", p["recover_type"])
    assert kind == stored
    values, classes = compress(probs, kind, int(top or 5))
    as_released = {"ori": values, "hard": classes[:, 0], "smoothing": torch.cat([classes, values], 1)}
    quantized = as_released.get(kind, torch.stack([classes.float(), values], 1))
    if "quantized" in case:
        case.close("quantized", quantized.reshape(case["quantized"].shape).to(case["quantized"].dtype))
    recovered = restore(values, classes, kind, p["num_classes"])
    case.close("recovered", recovered, atol=1e-7)
    value = soft_cross_entropy(case.leaf("student_logits") / p["student_temp"], recovered)
    value.backward()
    case.close("loss", value)
    case.close_grad("student_logits")


def crop_replay(case: Case) -> None:
    size = case.params["size"]
    image = case["image"].permute(2, 0, 1)[None]
    crops = replay(image, case["coords"][None], case["flip"][None], (size, size))[0].permute(0, 2, 3, 1)
    difference = (crops - case["crops"].float()).abs()
    assert difference.max() <= 1.5, (
        f"{case!r}: {difference.max()} grey levels"
    )  # PIL rounds after each of its two passes
    assert difference.mean() < 0.5


def mixed(case: Case) -> None:
    images, labels = cutmix(
        case["images"], case["soft_labels"], float(case["lam"]), tuple(case["center"].tolist()), case["perm"]
    )
    case.close("mixed_images", images)
    case.close("mixed_labels", labels)


ADAPTERS = {"fkd": fkd, "fkd_crop_replay": crop_replay, "fkd_cutmix": mixed}
