"""G2SD's generic stage, and its specific losses for classes, maps and detectors, against the arrays of `g2sd`."""

from __future__ import annotations

import torch

from parity.adapters.dmae import decoder, encoder
from parity.case import Case
from stillhouse.functional.channelwise import channelwise_cross_entropy
from stillhouse.functional.masking import random_masking
from stillhouse.methods.pretraining.g2sd import (
    feature_head,
    generic_loss,
    generic_target,
    imitation_losses,
    specific_loss,
)
from stillhouse.nn.masked_vit import encode

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def generic(case: Case) -> None:
    target = generic_target(case["teacher_hidden"])
    loss = generic_loss(case.leaf("student_pred"), target, beta=case.params["beta"])
    loss.backward()
    case.close("target", target, **CLOSE)
    case.close("loss", loss, **CLOSE)
    case.close_grad("student_pred", rtol=1e-4, atol=1e-5)


def generic_tiny(case: Case) -> None:
    p, images = case.params, case["imgs"]
    masking = random_masking(case["noise"], p["mask_ratio"])
    case.close("mask", masking.mask)
    hidden, networks = {}, {}
    for role, blocks in (("teacher", p["teacher_layer"]), ("student", None)):
        net = encoder(case, role)
        depth = 1 + max(int(k.split(".")[2]) for k in case.weights if k.startswith(f"{role}.decoder_blocks."))
        sizes = {
            "inputs": p[f"{role}_dim"],
            "width": p[f"{role}_dec_dim"],
            "depth": depth,
            "heads": p["dec_heads"],
        }
        made = decoder(case, role, sizes, None)
        latent = encode(net, images, masking.ids_keep).tokens
        hidden[role], networks[role] = made.hidden(latent, masking.ids_restore, blocks), net
    names = {"fc1.": "0.", "fc2.": "2."}
    prefix = "student.decoderfeature_pred."
    head = feature_head(p["student_dec_dim"], p["teacher_dec_dim"]).to(images.dtype)
    weights = {k.removeprefix(prefix): v for k, v in case.weights.items() if k.startswith(prefix)}
    head.load_state_dict({names[k[:4]] + k[4:]: v for k, v in weights.items()})
    predicted, target = head(hidden["student"]), generic_target(hidden["teacher"])
    loss = generic_loss(predicted, target, None if p["supervise_all"] else masking.mask, p["beta"])
    for name, value in (
        ("student_pred", predicted),
        ("teacher_hidden", hidden["teacher"]),
        ("target", target),
        ("loss", loss),
    ):
        case.close(name, value, **CLOSE)
    loss.backward()
    for name, parameter in (
        ("decoderfeature_pred.fc2.weight", head[2].weight),
        ("patch_embed.proj.weight", networks["student"].patch_embed.proj.weight),
    ):
        case.close_grad(name, parameter, array=f"grad:student.{name}", rtol=1e-4, atol=1e-5)


def specific_hard(case: Case) -> None:
    own, token = case.leaf("cls_logits"), case.leaf("dist_logits")
    terms = specific_loss(own, token, case["teacher_logits"], case["targets"])
    loss = (terms["labels"] + terms["teacher"]) / 2
    loss.backward()
    case.close("loss_gt", terms["labels"], **CLOSE)
    case.close("loss_dis", terms["teacher"], **CLOSE)
    case.close("loss", loss, **CLOSE)
    case.close_grad("cls_logits", rtol=1e-4, atol=1e-5)
    case.close_grad("dist_logits", rtol=1e-4, atol=1e-5)


def specific_seg_cwd(case: Case) -> None:
    p = case.params
    loss = p["weight"] * channelwise_cross_entropy(case.leaf("student"), case["teacher"], p["tau"])
    loss.backward()
    case.close("loss", loss, **CLOSE)
    case.close_grad("student", rtol=1e-4, atol=1e-5)


def specific_det(case: Case) -> None:
    p = case.params
    student = [(case.leaf(f"student_feat_{i}"), case.leaf(f"student_obj_{i}")) for i in range(p["levels"])]
    teacher = [(case[f"teacher_feat_{i}"], case[f"teacher_obj_{i}"]) for i in range(p["levels"])]
    weights = p["feat_weight"], p["cls_weight"]
    terms = imitation_losses(student, teacher, p["iteration"], weights, p["warm_steps"])
    torch.stack(list(terms.values())).sum().backward()
    case.close("loss_feat", terms["features"], **CLOSE)
    case.close("loss_cls", terms["objectness"], **CLOSE)
    for i in range(p["levels"]):
        case.close_grad(f"student_feat_{i}", rtol=1e-4, atol=1e-5)
        case.close_grad(f"student_obj_{i}", rtol=1e-4, atol=1e-5)


ADAPTERS = {
    "generic_loss": generic,
    "generic_tiny": generic_tiny,
    "specific_hard": specific_hard,
    "specific_seg_cwd": specific_seg_cwd,
    "specific_det": specific_det,
}
