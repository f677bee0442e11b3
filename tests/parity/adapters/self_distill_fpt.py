"""Self-distilled further pre-training: its distance, and a step of a tiny masked autoencoder, against the arrays of
`self_distill_fpt`."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from parity.case import Case
from stillhouse.functional.masking import masked_pixel_loss, patchify, random_masking
from stillhouse.methods.pretraining.self_distill_fpt import distillation_loss, feature_of
from stillhouse.nn.masked_vit import MaskedDecoder, encode

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm.": "norm.",
    "decoder_layers.": "blocks.",
    "layers.": "blocks.",
    "decoder_pos_embed": "pos_embed",
    "decoder_": "",
}


def ours(case: Case, prefix: str) -> dict[str, Tensor]:
    """Weights in transformers' names as ours, with query, key and value in one."""
    given = {k.removeprefix(prefix): v for k, v in case.weights.items() if k.startswith(prefix)}
    out: dict[str, Tensor] = {}
    for name, value in given.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([given[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        for old, new in NAMES.items():
            name = name.replace(old, new)
        out[name] = value
    return out


def encoder(case: Case, prefix: str) -> VisionTransformer:
    p, images = case.params, case["imgs"]
    vit = VisionTransformer(
        img_size=tuple(images.shape[-2:]),
        patch_size=p["patch"],
        in_chans=images.shape[1],
        num_classes=0,
        embed_dim=p["dim"],
        depth=p["depth"],
        num_heads=p["heads"],
        mlp_ratio=p["intermediate"] / p["dim"],
        norm_layer=partial(nn.LayerNorm, eps=p["ln_eps"]),
    )
    vit.load_state_dict(ours(case, prefix))
    return vit.to(images.dtype)


def tiny_vitmae(case: Case) -> None:
    p, images = case.params, case["imgs"]
    student, teacher = encoder(case, "student.vit."), encoder(case, "teacher.")
    grid = tuple(side // p["patch"] for side in images.shape[-2:])
    decoder = MaskedDecoder(
        p["dim"],
        p["decoder_dim"],
        p["decoder_depth"],
        p["decoder_heads"],
        (grid[0], grid[1]),
        p["patch"] ** 2 * images.shape[1],
        mlp_ratio=p["decoder_intermediate"] / p["decoder_dim"],
    )
    for module in decoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = p["ln_eps"]
    decoder.load_state_dict(ours(case, "student.decoder."))
    decoder.to(images.dtype)
    masking = random_masking(case["noise"], p["mask_ratio"])
    predicted = decoder(encode(student, images, masking.ids_keep).tokens, masking.ids_restore)
    pixel = masked_pixel_loss(predicted, patchify(images, p["patch"]), masking.mask, p["norm_pix_loss"])
    pixel.backward()
    case.close("mask", masking.mask)
    case.close("mae_loss", pixel, **CLOSE)
    projection = student.patch_embed.proj.weight
    case.close_grad("projection", projection, array="grad:mae_only.patch_projection", **CLOSE)
    mine = feature_of(student, images)
    with torch.no_grad():
        theirs = feature_of(teacher, images)
    distance = distillation_loss(mine, theirs)
    distance.backward()
    for name, value in {"student_cls": mine, "teacher_cls": theirs, "distill_loss": distance}.items():
        case.close(name, value, **CLOSE)
    case.close_grad("projection", projection, array="grad:total.patch_projection", **CLOSE)
    case.close_grad("norm", student.norm.weight, array="grad:total.layernorm", **CLOSE)


def distance(case: Case) -> None:
    loss = distillation_loss(case.leaf("student_cls"), case["teacher_cls"])
    loss.backward()
    case.close("distill_loss", loss, **CLOSE)
    case.close_grad("student_cls", **CLOSE)


ADAPTERS = {"tiny_vitmae": tiny_vitmae, "distill_loss": distance}
