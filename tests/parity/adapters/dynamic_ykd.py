"""Distillation of scores, boxes, masks, the first stage and maps, and the unbiased loss: the arrays of
`dynamic_ykd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.methods.dense.dynamic_ykd.losses import (
    box_loss,
    feature_loss,
    mask_loss,
    region_loss,
    score_loss,
    unbiased_cross_entropy,
)

TOLERANCE = 1e-4


def roi(case: Case) -> None:
    loss = score_loss(case.leaf("student_scores"), case["teacher_scores"], case.params["dist"])
    if "student_boxes" in case:
        loss = loss + box_loss(case.leaf("student_boxes"), case["teacher_boxes"])
    loss.backward()
    case.close("loss", loss, rtol=TOLERANCE)
    case.close_grad("student_scores", rtol=TOLERANCE)
    if "student_boxes" in case:
        case.close_grad("student_boxes", rtol=TOLERANCE)


def mask_kd(case: Case) -> None:
    loss = mask_loss(case.leaf("student_masks"), case["teacher_masks"])
    loss.backward()
    case.close("loss", loss, rtol=TOLERANCE)
    case.close_grad("student_masks", rtol=TOLERANCE)


def rpn_kd(case: Case) -> None:
    levels = range(sum(name.startswith("student_obj") for name in case.arrays))
    mine = [[case.leaf(f"student_{kind}{i}") for i in levels] for kind in ("obj", "box")]
    theirs = [[case[f"teacher_{kind}{i}"] for i in levels] for kind in ("obj", "box")]
    loss = region_loss(*mine, *theirs, case.params.get("threshold", 0.1))
    loss.backward()
    case.close("loss", loss, rtol=TOLERANCE)
    for i in levels:
        for kind in ("obj", "box"):
            case.close_grad(f"student_{kind}{i}", rtol=TOLERANCE)


def unbiased_ce(case: Case) -> None:
    loss = unbiased_cross_entropy(case.leaf("scores"), case["labels"].long(), case.params["n_old"])
    loss.backward()
    case.close("loss", loss, rtol=TOLERANCE)
    case.close_grad("scores", rtol=TOLERANCE)


def attentive_feature(case: Case) -> None:
    loss = feature_loss(case.leaf("feat_new"), case["feat_old"], case.params.get("temp", 0.5))
    loss.backward()
    case.close("loss", loss, rtol=TOLERANCE)
    case.close_grad("feat_new", rtol=TOLERANCE)


ADAPTERS = {
    "roi": roi,
    "mask_kd": mask_kd,
    "rpn_kd": rpn_kd,
    "unbiased_ce": unbiased_ce,
    "attentive_feature": attentive_feature,
}
