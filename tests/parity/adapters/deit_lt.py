"""DeiT-LT's class weights, losses and student, against the arrays of `deit_lt`."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.classification.deit_lt import (
    base_loss,
    effective_number_weights,
    hard_loss,
    soft_loss,
    two_logits,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def class_weights(case: Case) -> None:
    case.close("weights", effective_number_weights(case["counts"], case.params["beta"]))


def loss(case: Case) -> None:
    p = case.params
    weights = case["class_weights"] if p["weighted"] else None
    own, token = case.leaf("cls_logits"), case.leaf("dist_logits")
    base = base_loss(own, case["labels"], weights=case["class_weights"] if p["reweighted_base"] else None)
    if p["distillation_type"] == "hard":
        distilled = hard_loss(token, case["teacher_logits"].argmax(-1), weights)
    elif p["distillation_type"] == "soft":
        distilled = soft_loss(token, case["teacher_logits"], p["tau"])
    else:
        distilled = base_loss(token, case["labels"], weights=weights)
    terms = {"base_term": (1 - p["alpha"]) * base, "dist_term": p["alpha"] * distilled}
    total = terms["base_term"] + terms["dist_term"]
    total.backward()
    for name, value in {**terms, "loss": total}.items():
        if name in case:
            case.close(name, value, **CLOSE)
    case.close_grad("cls_logits", **CLOSE)
    case.close_grad("dist_logits", **CLOSE)


def student_forward(case: Case) -> None:
    p, images = case.params, case["imgs"]
    student = VisionTransformerDistilled(
        img_size=tuple(images.shape[-2:]),
        patch_size=p["patch"],
        in_chans=images.shape[1],
        num_classes=p["classes"],
        embed_dim=p["dim"],
        depth=p["depth"],
        num_heads=p["heads"],
        mlp_ratio=p["mlp_ratio"],
        norm_layer=partial(nn.LayerNorm, eps=p["ln_eps"]),
    )
    case.load(student)
    student.eval()
    with torch.no_grad():
        tokens = student.forward_features(images)
        own, token = two_logits(student, tokens)
        case.close("cls_logits", own, **CLOSE)
        case.close("dist_logits", token, **CLOSE)
        case.close("average", student(images), **CLOSE)
    case.close("cos_cls_dist", F.cosine_similarity(tokens[:, 0], tokens[:, 1], eps=1e-6), **CLOSE)


ADAPTERS = {"class_weights": class_weights, "hard": loss, "soft": loss, "student_forward": student_forward}
