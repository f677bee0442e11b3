"""Blocks, whole networks, the four crops, published weights and figures: the arrays of `imdn`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.config.specs import ModelSpec
from stillhouse.functional.images import luma, psnr, shaved, ssim, whole_levels
from stillhouse.functional.tiling import any_size, four_crops
from stillhouse.models import build, load_weights
from stillhouse.models.imdn import ContrastAttention, DistillationBlock, three_quarter_steps
from stillhouse.models.weights import load_state
from stillhouse.objectives.l1 import l1_loss


def _loaded(case: Case, module: nn.Module) -> nn.Module:
    load_state(module, case.weights, Path(case.path))
    return module


def _through(case: Case, module: nn.Module) -> None:
    out = _loaded(case, module)(case.leaf("x"))
    case.close("y", out)
    if "cotangent" in case:
        (out * case["cotangent"]).sum().backward()
        case.close_grad("x")


def cca(case: Case) -> None:
    _through(case, ContrastAttention(case.params["channels"], case.params["reduction"]))


def imdb(case: Case) -> None:
    p = case.params
    width, done = p["channels"], int(p["channels"] * p["distillation_rate"])
    steps = three_quarter_steps(width, done)
    attention = ContrastAttention(4 * done, p["reduction"])
    _through(case, DistillationBlock(width, done, steps, attention, nn.LeakyReLU(p["negative_slope"])))


def imdn(case: Case) -> None:
    p = case.params
    options = {"width": p["nf"], "blocks": p["num_modules"]}
    name = "imdn_as" if p["kind"] == "IMDN_AS" else "imdn"
    if name == "imdn":
        options["scale"] = p["upscale"]
    out = _loaded(case, build(ModelSpec(model=f"stillhouse:{name}", options=options)))(case.leaf("x"))
    case.close("y", out)
    if "target" in case:
        loss = l1_loss(out, case["target"])
        loss.backward()
        case.close("loss_l1", loss)
        case.close_grad("x")


def _toy(x: Tensor) -> Tensor:
    """The network that the file's options state."""
    coarse = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="nearest")
    return x + 0.5 * coarse + x.mean((2, 3), keepdim=True)


def acs_toy(case: Case) -> None:
    x, crop = case["x"], (case.params["h_size"], case.params["w_size"])
    seen: list[tuple[int, ...]] = []

    def network(crops: Tensor) -> Tensor:
        seen.append(tuple(crops.shape[-2:]))
        return _toy(crops)

    case.close("y", any_size(network, x, shave=case.params["shave"]))
    assert set(seen) == {crop}, f"crops of {seen}, not {crop}"
    case.close("y", torch.cat([four_crops(_toy, image[None], shave=case.params["shave"], chunk=1) for image in x]))


def _official(case: Case, name: str, scale: int | None, image: Tensor) -> Tensor:
    data = os.environ.get("STILLHOUSE_DATA")
    if not data:
        pytest.skip("STILLHOUSE_DATA is not set: no published weights here")
    model = build(ModelSpec(model=f"stillhouse:{name}", options={} if scale is None else {"scale": scale}))
    load_weights(model, Path(data) / "imdn_weights" / case.params["weights"])
    with torch.no_grad():
        out: Tensor = model(image.permute(2, 0, 1)[None].float() / 255)
    case.close("y", out, rtol=0, atol=1e-4)
    levels = whole_levels(out)[0].permute(1, 2, 0)
    apart = (levels - case["y_uint8"].double()).abs()
    assert apart.max() <= 1 and (apart > 0).double().mean() <= 1e-3, f"{case!r}: y_uint8"
    return out


def official(case: Case) -> None:
    found = re.search(r"_x(\d)", case.params["weights"])
    assert found, case.params["weights"]
    _official(case, "imdn", case.params.get("scale", int(found[1])), case["lr_uint8"])


def official_as_acs(case: Case) -> None:
    _official(case, "imdn_as", None, case["image_uint8"])


def metrics(case: Case) -> None:
    mine, true = (shaved(case[name].permute(2, 0, 1)[None], case.params["shave"]) for name in ("sr", "hr"))
    y, true_y = luma(mine), luma(true)
    case.close("y_sr", y[0].round().to(torch.uint8))
    case.close("y_hr", true_y[0].round().to(torch.uint8))
    figures: dict[str, Callable[[], Tensor]] = {
        "psnr_y": lambda: psnr(y.round(), true_y.round()),
        "ssim_y": lambda: ssim(y.round(), true_y.round()),
        "psnr_y_unrounded": lambda: psnr(y, true_y),
        "psnr_rgb": lambda: psnr(mine, true),
        "ssim_rgb": lambda: ssim(mine, true),
    }
    for name, figure in figures.items():
        if name in case:
            case.close(name, figure()[0], rtol=1e-8, atol=1e-6)


ADAPTERS = {
    "cca": cca,
    "imdb": imdb,
    "imdn": imdn,
    "acs_toy": acs_toy,
    "official": official,
    "official_as_acs": official_as_acs,
    "metrics": metrics,
}
