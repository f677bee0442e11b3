"""Splatting, the terms of a view, normals and points of depth maps, and the normal of a Gaussian: the arrays of
`gaussian_grasper`."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from parity.case import Case
from stillhouse.methods.scenes.gaussian_grasper.gaussians import Gaussians, lifting
from stillhouse.methods.scenes.gaussian_grasper.losses import (
    Drawn,
    color_change,
    color_loss,
    contrastive_loss,
    depth_loss,
    elongation,
    lifted_loss,
    normal_loss,
    visible_ids,
)
from stillhouse.methods.scenes.gaussian_grasper.views import back_projected, depth_normals
from stillhouse.nn.splatting import Camera, project, splat


def _numbers(pixels: Tensor, width: int) -> Tensor:
    return pixels[:, 0] * width + pixels[:, 1]


def _drawn(case: Case, width: int) -> Drawn:
    """The pixels that the file names, padded to as many pairs of each mask."""
    names = sorted((n[:-2] for n in case.arrays if re.fullmatch(r"pair\d+_a", n)), key=lambda n: int(n[4:]))
    sides = [[_numbers(case[f"{n}_{side}"], width) for n in names] for side in "ab"]
    most = max((len(x) for x in sides[0]), default=0)
    first, second = (
        torch.stack([torch.nn.functional.pad(x, (0, most - len(x))) for x in side])
        if side
        else torch.zeros(0, most, dtype=torch.int64)
        for side in sides
    )
    paired = torch.tensor([[i < len(x) for i in range(most)] for x in sides[0]], dtype=torch.bool).view(
        len(names), most
    )
    lifted = _numbers(case["points"], width) if "points" in case else torch.zeros(0, dtype=torch.int64)
    return Drawn(first, second, paired, lifted, torch.ones_like(lifted, dtype=torch.bool))


def losses(case: Case) -> None:
    p = case.params
    valid = case["valid"].bool().view(case["segmentation"].shape)
    case.close("segmentation_used", visible_ids(case["segmentation"], valid))
    feature, drawn = case.leaf("feature"), _drawn(case, valid.shape[1])
    lift = lifting(p["feature_dim"], p["hidden"], p["clip_dim"])
    lift.load_state_dict({k.removeprefix("layers."): v for k, v in case.weights.items()})
    target = case["depth_target"].view(valid.shape)
    terms = {
        "main_loss": color_loss(case.leaf("rgb"), case["image"], valid, p["ssim_lambda"]),
        "feature_loss": contrastive_loss(feature, drawn),
        "up_loss": lifted_loss(feature, case["clip_target"].flatten(0, 1)[drawn.lifted], drawn, lift),
        "depth_loss": depth_loss(case.leaf("depth").view(valid.shape), target, valid),
        "normal_loss": normal_loss(case.leaf("normal"), case["normal_target"], target, valid),
    }
    if p["step"] % 10 == 0:
        terms["sh_reg"] = color_change(case.leaf("sh"))
        terms["scale_reg"] = 0.1 * elongation(case.leaf("log_scales"), p["max_ratio"])
    for name, term in terms.items():
        case.close(f"loss_{name}", term)
    total = torch.stack(list(terms.values())).sum()
    case.close("total", total)
    total.backward()
    for name in (n.removeprefix("grad:") for n in case.arrays if n.startswith("grad:") and "layers" not in n):
        leaf = case.leaf(name)
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # a step without its penalty
        case.close_grad(name)
    for name, parameter in lift.named_parameters():
        case.close_grad(f"layers.{name}", parameter)


def smallest_axis(case: Case) -> None:
    gaussians = Gaussians(len(case["quats"]), 0, 1)
    gaussians.quats.data, gaussians.log_scales.data = case["quats"], case["log_scales"]
    case.close("normals", gaussians.normals())


def geometry(case: Case) -> None:
    p, depth = case.params, case["depth"]
    case.close("normals", depth_normals(depth, case["camera_to_base"], p["fx_normals"], p["fy_normals"]))
    shift = re.search(r"z translation (-?[\d.]+)", str(p.get("cloud_transform", "")))
    transform = torch.eye(4, dtype=depth.dtype)
    transform[2, 3] = float(shift[1]) if shift else 0.0
    camera = (p["fx"], p["fy"], p["cx"], p["cy"])
    mask = case["mask"] if "mask" in case else None  # noqa: SIM401  (a case has no get)
    points, kept = back_projected(depth, camera, transform, mask, tuple(p["depth_range"]), tuple(p["keep_z"]), centre=0)
    case.close("points", torch.cat([points, case["color"][kept].to(points)], 1))


def splatted(case: Case) -> None:
    p = case.params
    camera = Camera(case["viewmat"], p["fx"], p["fy"], p["cx"], p["cy"], p["W"], p["H"])
    means, scales, quats = (case.leaf(n) for n in ("means", "log_scales", "quats"))
    found = project(means, scales, quats, camera, p["blur"])
    opacity = case.leaf("opacity_logits").sigmoid()
    seen = splat(found, opacity, case.leaf("features"), camera.width, camera.height)
    depth = splat(found, opacity, found.depth[:, None], camera.width, camera.height).image[..., 0]
    ahead = found.depth > 0.01
    case.close("uv", found.uv, rtol=1e-4, where=ahead[:, None].expand(-1, 2))
    case.close("cov2d", found.cov, rtol=1e-4, where=ahead[:, None, None].expand(-1, 2, 2))
    case.close("depth_z", found.depth, rtol=1e-4)
    near = 1e-5 * max(1.0, math.sqrt(camera.width * camera.height) / 16)
    case.close("image", seen.image, rtol=1e-4, atol=near)
    case.close("transmittance", seen.transmittance, rtol=1e-4, atol=near)
    case.close("depth_image", depth, rtol=1e-4, atol=near)
    if "cotangent" not in case:
        return
    (seen.image * case["cotangent"]).sum().backward()
    for name in ("means", "log_scales", "quats", "opacity_logits", "features"):
        scale = float(case[f"grad:{name}"].abs().max()) if f"grad:{name}" in case else 1.0
        case.close_grad(name, rtol=1e-3, atol=1e-4 * scale)


ADAPTERS = {
    "losses": losses,
    "smallest_axis": smallest_axis,
    "geometry": geometry,
    "splat": splatted,
}
