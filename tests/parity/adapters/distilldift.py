"""Similarity maps, losses of points, adapters of qkv layers and correspondences: the arrays of `distilldift`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.correspondence.distilldift.adapters import QueryValueAdapter
from stillhouse.methods.correspondence.distilldift.losses import (
    blur_loss,
    blurred,
    cells,
    correspondences,
    distillation_loss,
    nearest_cells,
    point_similarity,
    similarity,
    soft_argmax,
    soft_argmax_loss,
    within,
)


def distill_softmax(case: Case) -> None:
    tau, student, teacher = case.params["temperature"], case.leaf("student"), case["teacher"]
    tolerance = 1e-4 if tau <= 0.01 else 1e-5
    ours, theirs = student.chunk(2), teacher.chunk(2)
    same = F.interpolate(teacher, student.shape[-2:], mode="bilinear", align_corners=False).chunk(2)
    s, t = similarity(*ours), similarity(*same)
    case.close("student_similarity", s, rtol=1e-5, atol=1e-6)
    case.close("teacher_similarity", t, rtol=1e-5, atol=1e-6)
    case.close("prediction", (s / tau).softmax(-1), rtol=1e-3, atol=1e-5)
    case.close("target", (t / tau).softmax(-1), rtol=1e-3, atol=1e-5)
    form = "sce" if case.params.get("criterion") == "sce" else "official"
    loss = distillation_loss(ours, theirs, tau, form)
    case.close("loss", loss)
    (grad,) = torch.autograd.grad(loss, student)
    if "grad:student" in case:
        case.close("grad:student", grad, rtol=tolerance, atol=tolerance * float(grad.abs().max()))
    student = case.leaf("student")
    loss = distillation_loss(student.chunk(2), theirs, tau, "paper")
    case.close("row_cross_entropy", loss)
    (grad,) = torch.autograd.grad(loss, student)
    if "grad_row:student" in case:
        case.close("grad_row:student", grad, rtol=tolerance, atol=tolerance * float(grad.abs().max()))


def _points(case: Case):
    features = case.leaf("features")
    source, target = features.chunk(2)
    image, grid = tuple(case.params["image"]), (features.shape[2], features.shape[3])
    index = nearest_cells(cells(case["source_points"], image, grid), grid)
    wanted = cells(case["target_points"], image, grid)
    case.close("source_idx", index)
    case.close("target_idx", nearest_cells(wanted, grid))
    return source, target, index, wanted, grid


def supervised_softargmax(case: Case) -> None:
    beta = case.params["beta"]
    source, target, index, wanted, grid = _points(case)
    places = wanted + case["jitter"] if "jitter" in case else wanted
    case.close("target", places, rtol=1e-5, atol=1e-5)
    case.close("prediction", soft_argmax(point_similarity(source, target, index), grid, beta), rtol=1e-4, atol=1e-4)
    loss = soft_argmax_loss(source, target, index, places, beta)
    case.close("loss", loss, rtol=1e-4)
    loss.backward()
    if "grad:features" in case:
        scale = float(abs(case.arrays["grad:features"]).max())
        case.close_grad("features", rtol=1e-3, atol=1e-3 * scale)


def supervised_softmax_blur(case: Case) -> None:
    tau, kernel = case.params["temperature"], case.params["blur_kernel"]
    source, target, index, wanted, grid = _points(case)
    place = nearest_cells(wanted, grid)
    case.close("target", blurred(place, grid, kernel), rtol=1e-4, atol=1e-6)
    found = (point_similarity(source, target, index) / tau).softmax(-1).unflatten(-1, grid)
    case.close("prediction", found, rtol=1e-4, atol=1e-6)
    loss = blur_loss(source, target, index, place, tau, kernel, official=True)
    case.close("loss", loss)
    loss.backward()
    if "grad:features" in case:
        scale = float(abs(case.arrays["grad:features"]).max())
        case.close_grad("features", rtol=1e-4, atol=1e-4 * scale)


def lora_qv(case: Case) -> None:
    width, rank = case.params["dim"], case.params["rank"]
    layer = QueryValueAdapter(nn.Linear(width, 3 * width, bias="w:qkv.bias" in case), rank)
    case.load(layer)
    x = case.leaf("x")
    y = layer(x)
    case.close("y", y)
    torch.testing.assert_close(layer.merged()(x), y, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    if "grad:x" in case:
        case.close_grad("x")


def correspondence(case: Case) -> None:
    p = case.params
    sizes = tuple(tuple(reversed(p[f"{which}_size_wh"])) for which in ("source", "target"))
    found = correspondences(case["source"], case["target"], case["points"], sizes)
    case.close("pred", found)
    if "gt" in case:
        reach = p["pck_img_threshold"] * max(sizes[1])
        case.close("pck_img_count", within(found, case["gt"], reach).sum(1))
        if "bbox_yxhw" in case:
            reach = p["pck_bbox_threshold"] * float(case["bbox_yxhw"][2:].max())
            case.close("pck_bbox_count", within(found, case["gt"], reach).sum(1))
    if "soft_argmax_input" in case:
        scores = case["soft_argmax_input"]
        beta = float(case["soft_argmax_beta"]) if "soft_argmax_beta" in case else 5.0
        case.close("soft_argmax", soft_argmax(scores.flatten(2), scores.shape[-2:], beta), rtol=1e-4, atol=1e-5)


ADAPTERS = {
    "distill_softmax": distill_softmax,
    "supervised_softargmax": supervised_softargmax,
    "supervised_softmax_blur": supervised_softmax_blur,
    "lora_qv": lora_qv,
    "correspondence": correspondence,
}
