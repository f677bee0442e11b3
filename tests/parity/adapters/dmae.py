"""DMAE's alignment, pixel loss and a whole step, against the arrays of `dmae`."""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from parity.case import Case
from stillhouse.functional.masking import masked_pixel_loss, patchify, random_masking
from stillhouse.methods.pretraining.dmae import align_loss, projection_head
from stillhouse.nn.masked_vit import MaskedDecoder, encode

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def encoder(case: Case, role: str) -> VisionTransformer:
    """The encoder whose weights are `w:ROLE.*`, in timm's names, and whose sizes are the options."""
    p = case.params
    vit = VisionTransformer(
        img_size=p["img"],
        patch_size=p["patch"],
        in_chans=case["imgs"].shape[1],
        num_classes=0,
        embed_dim=p[f"{role}_dim"],
        depth=p[f"{role}_depth"],
        num_heads=p[f"{role}_heads"],
        mlp_ratio=p["mlp_ratio"],
    )
    weights = {k.removeprefix(f"{role}."): v for k, v in case.weights.items()}
    vit.load_state_dict({k: v for k, v in weights.items() if k in vit.state_dict()})
    return vit.to(case["imgs"].dtype)


def decoder(case: Case, role: str, sizes: dict[str, Any], outputs: int | None) -> MaskedDecoder:
    """The decoder whose weights are `w:ROLE.decoder_*` and `w:ROLE.mask_token`."""
    side = case.params["img"] // case.params["patch"]
    made = MaskedDecoder(grid=(side, side), outputs=outputs, mlp_ratio=case.params["mlp_ratio"], **sizes)
    pattern = re.compile(rf"{role}\.(?:decoder_(?=(?:embed|pos_embed|blocks|norm|pred)\b)|(?=mask_token))")
    weights = {pattern.sub("", k): v for k, v in case.weights.items() if pattern.match(k)}
    made.load_state_dict(weights)
    return made.to(case["imgs"].dtype)


def align(case: Case) -> None:
    p, total = case.params, torch.zeros(())
    count = sum(name.startswith("student_feat_") for name in case.arrays)
    for i in range(count):
        mine, theirs = case[f"student_feat_{i}"], case[f"teacher_feat_{i}"]
        head = None
        if p["normalize"]:
            kind = "linear" if p["projection"].startswith("fc") else "mlp"
            head = case.load(projection_head(mine.shape[-1], theirs.shape[-1], kind), f"heads.{i}.")
        loss = align_loss(case.leaf(f"student_feat_{i}"), case[f"teacher_feat_{i}"], head, p["func"].lower())
        case.close(f"loss_{i}", loss, **CLOSE)
        total = total + loss
        loss.backward()
        case.close_grad(f"student_feat_{i}", atol=1e-6, rtol=1e-4)
        for name, parameter in head.named_parameters() if head is not None else ():
            if f"grad:heads.{i}.{name}" in case:
                case.close_grad(name, parameter, array=f"grad:heads.{i}.{name}", atol=1e-6, rtol=1e-4)
    case.close("total", total, **CLOSE)


def pixel_loss(case: Case) -> None:
    p = case.params
    patches = patchify(case["imgs"], p["patch"])
    loss = masked_pixel_loss(case.leaf("pred"), patches, case["mask"], p["norm_pix_loss"])
    loss.backward()
    case.close("patches", patches, **CLOSE)
    case.close("loss", loss, **CLOSE)
    case.close_grad("pred", atol=1e-6, rtol=1e-4)


def tiny_end_to_end(case: Case) -> None:
    p, images = case.params, case["imgs"]
    student, teacher = encoder(case, "student"), encoder(case, "teacher")
    sizes = {
        "inputs": p["student_dim"],
        "width": p["decoder_dim"],
        "depth": p["decoder_depth"],
        "heads": p["decoder_heads"],
    }
    rebuild = decoder(case, "student", sizes, p["patch"] ** 2 * images.shape[1])
    masking = random_masking(case["noise"], p["mask_ratio"])
    for name in ("ids_keep", "ids_restore", "mask"):
        case.close(name, getattr(masking, name))
    with torch.no_grad():
        targets = encode(teacher, images, masking.ids_keep, p["teacher_blocks"], stop=True).blocks
    mine = encode(student, images, masking.ids_keep, p["student_blocks"])
    predicted = rebuild(mine.tokens, masking.ids_restore)
    case.close("pred", predicted, **CLOSE)
    total = masked_pixel_loss(predicted, patchify(images, p["patch"]), masking.mask, p["norm_pix_loss"])
    case.close("recon_loss", total, **CLOSE)
    for i, (ours, theirs) in enumerate(zip(mine.blocks, targets)):
        head = projection_head(ours.shape[-1], theirs.shape[-1], "linear")
        head = case.load(head, f"student.aligned_feature_projection_heads.{i}.")
        loss = align_loss(ours, theirs, head, p["func"].lower())
        case.close(f"teacher_latent_{i}", theirs, **CLOSE)
        case.close(f"align_loss_{i}", loss, **CLOSE)
        total = total + loss
    case.close("total", total, **CLOSE)
    total.backward()
    case.close_grad(
        "patch_embed",
        student.patch_embed.proj.weight,
        array="grad:student.patch_embed.proj.weight",
        atol=1e-6,
        rtol=1e-4,
    )
    case.close_grad("decoder_pred", rebuild.pred.weight, array="grad:student.decoder_pred.weight", atol=1e-6, rtol=1e-4)


ADAPTERS = {"align": align, "pixel_loss": pixel_loss, "tiny_end_to_end": tiny_end_to_end}
