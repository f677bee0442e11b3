"""The whole step, the terms of image and region, and the masks of CutMix: the arrays of `mgd_ssss`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.dense.mgd_ssss import (
    Outputs,
    Rules,
    affinity,
    box_masks,
    image_loss,
    mixed,
    region_loss,
    supervised_loss,
    terms_of,
)

NAMES = {"student": "net1", "wide": "net2", "deep": "net3"}


def full_step(case: Case) -> None:
    p, weights = case.params, {k: v.requires_grad_() for k, v in case.weights.items()}
    mask, labels = case["mask"], case["gts"]
    both = mixed(case["unsup0"], case["unsup1"], mask)

    def network(name: str, images: Tensor) -> tuple[Tensor, Tensor]:
        features = F.conv2d(images, weights[f"{name}.f.weight"], weights[f"{name}.f.bias"], 2, 1).relu()
        maps = F.conv2d(features, weights[f"{name}.c.weight"], weights[f"{name}.c.bias"])
        return features, F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=True)

    outputs = {}
    for who, name in NAMES.items():
        features, maps = network(name, both)
        first, second = (network(name, case[x])[1] for x in ("unsup0", "unsup1"))
        outputs[who] = Outputs(network(name, case["imgs"])[1], maps, features, first, second)
        number = name.removeprefix("net")
        case.close(f"mixed_feat{number}", features, rtol=1e-4)
        case.close(f"mixed_logits{number}", maps, rtol=1e-4)
        case.close(f"pseudo{number}", outputs[who].pseudo(mask))
    rules = Rules(p["lambda_1"], p["lambda_2"], grid=p["pool"], ignore_index=p["ignore_index"], symmetric=True)
    teachers = {n: outputs[n] for n in ("wide", "deep")}
    terms = terms_of(outputs["student"], teachers, labels, mask, rules)
    # the file's teachers are not frozen, and some of its sums hold them
    case.close("loss_sup", terms["supervised"], rtol=1e-4)
    case.close("loss_sup_t1", terms["supervised_wide"], rtol=1e-4)
    case.close("loss_sup_t2", terms["supervised_deep"], rtol=1e-4)
    case.close("consist_u", terms["pixel_mixed"], rtol=1e-4)
    case.close("consist_s", terms["pixel_labelled"], rtol=1e-4)
    case.close("consist_loss", terms["pixel_mixed"] + terms["pixel_labelled"], rtol=1e-4)
    case.close("sem_loss", terms["image"], rtol=1e-4)
    case.close("content_loss", terms["region"], rtol=1e-4)
    total = torch.stack(list(terms.values())).sum()
    case.close("loss", total, rtol=1e-4)
    case.close("loss_sup_again", supervised_loss(outputs["student"].labelled, labels, rules))
    total.backward()
    for name, weight in weights.items():
        if name.startswith("net1."):
            case.close_grad(name, weight, rtol=1e-4)


def image_region(case: Case) -> None:
    p = case.params
    student, features = case.leaf("student_logits"), case.leaf("student_feat")
    image = p["lambda_1"] * image_loss(student, case["teacher_logits"])
    region = p["lambda_2"] * region_loss(features, case["teacher_feat"])
    case.close("sem_loss", image, rtol=1e-4)
    case.close("content_loss", region, rtol=1e-4)
    case.close("sim_student", affinity(features), rtol=1e-4)
    case.close("sim_teacher", affinity(case["teacher_feat"]), rtol=1e-4)
    (image + region).backward()
    case.close_grad("student_logits", rtol=1e-4)
    case.close_grad("student_feat", rtol=1e-4)


def cutmix_masks(case: Case) -> None:
    p = case.params
    masks = box_masks(case["u_prop"], case["u_aspect"], case["u_pos"], tuple(p["hw"]), tuple(p["prop_range"]))
    case.close("masks", masks.to(torch.uint8))


ADAPTERS = {"full_step": full_step, "image_region": image_region, "cutmix_masks": cutmix_masks}
