"""Attention by groups with the heads' scores and boxes, the pull on scales, masks by group and of shortcuts: the arrays
of `group_prune_sad`."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.case import Case
from stillhouse.methods.dense.group_prune_sad.distilling import attention, attention_loss, box_loss, class_loss
from stillhouse.methods.dense.group_prune_sad.pruning import kept_channels, largest, majority, pulled, threshold

RTOL = 1e-4


def _layers(case: Case) -> tuple[list[int], list[Tensor], list[Tensor], list[float]]:
    layers = case.params["layers"]
    groups = {int(i): beta for names, beta in case.params["group_beta"].items() for i in names.split(",")}
    students = [case.leaf(f"student_{i}") for i in layers]
    return layers, students, [case[f"teacher_{i}"] for i in layers], [groups[i] for i in layers]


def _close(case: Case, layers: list[int]) -> None:
    for i in layers:
        if f"attmap_t_{i}" in case:
            case.close(f"attmap_t_{i}", attention(case[f"teacher_{i}"]), rtol=RTOL)
        if f"grad:student_{i}" in case:
            case.close_grad(f"student_{i}", rtol=RTOL)


def group_at(case: Case) -> None:
    layers, students, teachers, betas = _layers(case)
    loss = attention_loss(students, teachers, betas)
    loss.backward()
    if "loss_group" in case:
        case.close("loss_group", loss, rtol=RTOL)
    single = attention_loss(students, teachers, [case.params["beta_single"]] * len(layers))
    if "loss_single_beta" in case:
        case.close("loss_single_beta", single, rtol=RTOL)
    _close(case, layers)


def group_at_kd(case: Case) -> None:
    layers, students, teachers, betas = _layers(case)
    heads = [i for i in range(len(case.arrays)) if f"pred_s{i}" in case]
    ours, theirs = [case.leaf(f"pred_s{i}") for i in heads], [case[f"pred_t{i}"] for i in heads]
    boxes = torch.zeros(())
    for i, student, teacher in zip(heads, ours, theirs):
        rows = case[f"idx{i}"].long()
        rows = rows if len(rows) == 4 else rows.T
        places = tuple(rows)
        boxes = boxes + box_loss(student[places], teacher[places], case[f"anchor{i}"])
    scores = class_loss(ours, theirs, case.params["T"])
    loss = attention_loss(students, teachers, betas)
    loss = loss + case.params["lambda_cls"] * scores + case.params["lambda_box"] * boxes
    loss.backward()
    case.close("loss_total", loss.reshape(case["loss_total"].shape), rtol=RTOL)
    _close(case, layers)
    for i in heads:
        if f"grad:pred_s{i}" in case:
            case.close_grad(f"pred_s{i}", rtol=RTOL)


def _numbered(case: Case, name: str) -> list[int]:
    return sorted(int(k[len(name) :]) for k in case.arrays if k.startswith(name) and k[len(name) :].isdigit())


def sparse(case: Case) -> None:
    numbers, p = _numbered(case, "gamma"), case.params
    gammas = [case[f"gamma{i}"] for i in numbers]
    protected: list[Tensor | None] = [None] * len(gammas)
    if p.get("late_phase"):
        protected = [*largest(gammas, p["percent"])]
    for i, gamma, kept in zip(numbers, gammas, protected):
        if f"keep{i}" in case and kept is not None:
            case.close(f"keep{i}", kept.to(case[f"keep{i}"].dtype))
        case.close(f"grad_out{i}", pulled(case[f"grad_in{i}"], gamma, p["s"], kept, p["relief"]), rtol=RTOL)


def group_masks(case: Case) -> None:
    numbers, p = _numbered(case, "gamma"), case.params
    cuts, able = p["cuts"], set(p["prunable"])
    group = {i: next(g for g, cut in enumerate(cuts) if i < cut) for i in numbers}
    above = [
        threshold([case[f"gamma{i}"] for i in numbers if i in able and group[i] == g], ratio)
        for g, ratio in enumerate(p["percent"])
    ]
    if "thresholds" in case:
        case.close("thresholds", torch.stack(above), rtol=RTOL)
    masks = {}
    for i in numbers:
        gamma = case[f"gamma{i}"]
        masks[i] = kept_channels(gamma, above[group[i]], p["layer_keep"]) if i in able else torch.ones(len(gamma)) > 0
        if f"mask{i}" in case:
            case.close(f"mask{i}", masks[i].to(case[f"mask{i}"].dtype))
    counts = torch.stack([masks[i].sum() for i in numbers])
    if "num_filters" in case:
        case.close("num_filters", counts.to(case["num_filters"].dtype))


def shortcut_merge(case: Case) -> None:
    numbers = _numbered(case, "before")
    shared = majority([case[f"before{i}"].bool() for i in numbers])
    for i in numbers:
        if f"after{i}" in case:
            case.close(f"after{i}", shared.to(case[f"after{i}"].dtype))


ADAPTERS = {
    "group_at": group_at,
    "group_at_kd": group_at_kd,
    "sparse_early": sparse,
    "sparse_late": sparse,
    "group_masks": group_masks,
    "shortcut_merge": shortcut_merge,
}
