"""DMJD's disjoint masks, HOG targets, two branches and joint loss, against the arrays of `dmjd`."""

from __future__ import annotations

import math
import re

from parity.case import Case
from stillhouse.functional.hog import hog, hog_targets
from stillhouse.methods.pretraining.dmjd import VisibleHead, block_masks, disjoint_masks, hidden_loss, visible_loss
from stillhouse.nn.masked_vit import MaskedDecoder

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def disjoint(case: Case) -> None:
    p = case.params
    made = disjoint_masks(case["noise"], p["mask_ratio"], p["pred_ratio"], case["perm_visible"], case["perm_masked"])
    if p["kind"] == "block":
        made = block_masks(made, math.isqrt(p["L"]))
    for name in ("ids_keep", "mask", "ids_restore"):
        case.close(name, getattr(made, name))


def hog_target(case: Case) -> None:
    p, pixels = case.params, case["images_uint8_nhwc"].permute(0, 3, 1, 2).float()
    case.close("hog", hog(pixels, p["cell"], p["orientations"]), **CLOSE)
    case.close("target", hog_targets(pixels, p["patch"], p["cells_per_patch"], p["orientations"], p["ln_eps"]), **CLOSE)


def joint(case: Case) -> None:
    p, mask = case.params, case["mask"]
    ids_keep = (mask == 0).nonzero()[:, 1].view(len(mask), -1)
    kinds, beta = (p["mim_loss_type"], p["vis_loss_type"]), p["smooth_l1_beta"]
    masked = hidden_loss(case.leaf("pred"), case["target"], mask, kinds[0], beta)
    loss = masked + p["theta"] * visible_loss(case.leaf("pred_vis"), case["target"], ids_keep, kinds[1], beta)
    loss.backward()
    case.close("loss", loss, **CLOSE)
    case.close("loss_mim", masked, **CLOSE)
    for name in ("pred", "pred_vis"):
        case.close_grad(name, rtol=1e-4, atol=1e-5)


def decoder_two_branches(case: Case) -> None:
    p, latent = case.params, case.leaf("latent")
    side = math.isqrt(p["L"])
    decoder = MaskedDecoder(
        p["enc_dim"],
        p["dec_dim"],
        p["dec_depth"],
        p["dec_heads"],
        (side, side),
        p["pred_dim"],
        prefix=0,
        mlp_ratio=p["mlp_ratio"],
    )
    mine = re.compile(r"decoder_(?=embed|pos_embed|blocks|norm|pred)")
    names = {k: mine.sub("", k) for k in case.weights}
    decoder.load_state_dict({v: case.weights[k] for k, v in names.items() if v in decoder.state_dict()})
    head = VisibleHead(p["enc_dim"], p["dec_dim"], p["pred_dim"])
    rest = {k.replace("proj_embed.", "layers.").replace("predictor.0", "predictor"): v for k, v in case.weights.items()}
    head.load_state_dict({k: v for k, v in rest.items() if k in head.state_dict()})
    decoder, head = decoder.to(latent.dtype), head.to(latent.dtype)
    predicted, visible = decoder(latent, case["ids_restore"]), head(latent)
    case.close("pred", predicted, **CLOSE)
    case.close("pred_vis", visible, **CLOSE)
    (predicted.sum() + visible.square().sum()).backward()
    case.close_grad("latent", rtol=1e-4, atol=1e-5)


ADAPTERS = {
    "disjoint": disjoint,
    "hog_target": hog_target,
    "joint_loss": joint,
    "decoder_two_branches": decoder_two_branches,
}
