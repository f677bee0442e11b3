"""Asymmetric loss, the three losses of embeddings, crops with masks, blocks, the object token, blended scores: the
arrays of `oadp`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.case import Case
from stillhouse.functional.regions import blended
from stillhouse.methods.dense.oadp.losses import asymmetric_loss, embedding_loss, relation_loss, whole_loss
from stillhouse.methods.dense.oadp.oake import block_boxes, object_token, outside, windows
from stillhouse.nn.clip import Encoder, EncoderShape

RTOL = 1e-4


def asymmetric(case: Case) -> None:
    p = case.params
    loss = asymmetric_loss(
        case.leaf("logits"), case["targets"], p["gamma_neg"], p["gamma_pos"], p["clip"], p.get("eps", 1e-8)
    )
    loss.backward()
    case.close("loss", loss, rtol=RTOL)
    if "grad:logits" in case:
        case.close_grad("logits", rtol=RTOL)


def embedding_losses(case: Case) -> None:
    x, weight = case.leaf("x"), case.leaf("w:weight")
    bias = case.weights.get("bias")
    student = F.normalize(F.linear(x, weight, bias), dim=-1)
    teacher = case["teacher"]
    terms = {
        "l1": embedding_loss(student, teacher),
        "rkd": relation_loss(student, teacher),
        "mse_sum": whole_loss(student, teacher),
    }
    total = 256 * terms["l1"] + 8 * terms["rkd"] + 0.5 * terms["mse_sum"]
    total.backward()
    case.close("student_embedding", student, rtol=RTOL)
    for name, value in {**terms, "total": total}.items():
        if name in case:
            case.close(name, value, rtol=RTOL)
    case.close_grad("x", rtol=RTOL)
    if "grad:weight" in case and weight.grad is not None:
        case.close("grad:weight", weight.grad, rtol=RTOL)


def crop_mask(case: Case) -> None:
    p = case.params
    width, height = p["image_wh"]
    crops = windows(case["proposals"], (width, height), p.get("area_ratio", 8))
    case.close("crops", crops, rtol=RTOL, atol=2e-3)
    case.close("masks", outside(case["proposals"], case["crops"], p["grid"]), rtol=0, atol=0)


def blocks(case: Case) -> None:
    p, rows = case.params, case["blocks"]
    found = []
    for width, height in dict.fromkeys((int(w), int(h)) for w, h in rows[:, :2].tolist()):
        boxes = block_boxes(width, height, p["block"], p["max_stride"], p["rescale"])
        found.append(torch.cat([torch.tensor([[width, height]]).expand(len(boxes), 2), boxes], 1))
    case.close("blocks", torch.cat(found).to(rows.dtype), rtol=0, atol=1e-6)


def masked_token(case: Case) -> None:
    weights, tokens = case.weights, case["tokens"].transpose(0, 1)
    width, layers = tokens.shape[-1], case.params["layers"]
    hidden = len(weights["0.mlp.0.bias"])
    heads = case.params["heads"]
    encoder = Encoder(EncoderShape(width, (heads,) * layers, (hidden,) * layers, width // heads))
    encoder.load_state_dict(_ours(weights))
    mask = case["mask"].flatten(1)
    with torch.no_grad():
        own, others = object_token(list(encoder.layers), tokens, mask)
    case.close("object_token", own[None], rtol=RTOL)
    if "plain_tokens" in case:
        case.close("plain_tokens", others.transpose(0, 1), rtol=RTOL)


def _ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"ln_1": "norm1", "ln_2": "norm2", "mlp.0": "fc1", "mlp.2": "fc2", "attn.out_proj": "attention.out"}
    out = {}
    for name, value in weights.items():
        number, _, rest = name.partition(".")
        if ".in_proj_" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                out[f"layers.{number}.attention.{part}.{name.rpartition('_')[2]}"] = rows
            continue
        module, _, kind = rest.rpartition(".")
        out[f"layers.{number}.{names[module]}.{kind}"] = value
    return out


def ensemble(case: Case) -> None:
    base, new = case.params["num_base"], case.params["num_novel"]
    known = torch.arange(base + new) < base
    case.close("scores", blended(case["bbox_logits"], case["object_logits"], known), rtol=RTOL)


ADAPTERS = {
    "asymmetric": asymmetric,
    "embedding_losses": embedding_losses,
    "crop_mask": crop_mask,
    "blocks": blocks,
    "masked_token": masked_token,
    "ensemble": ensemble,
}
