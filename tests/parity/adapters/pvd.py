"""Fields, encodings, the losses of the three phases and compositing: the arrays of `pvd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.case import Case
from stillhouse.methods.scenes.pvd.losses import Rates, phase_loss
from stillhouse.nn.radiance_fields import (
    FieldPoints,
    MLPField,
    PlenoxelField,
    RadianceField,
    VMField,
    hash_encoding,
    positional_encoding,
    spherical_harmonics,
    truncated_exp,
)
from stillhouse.nn.rays import composite as composited


def _field(case: Case, field: RadianceField) -> None:
    field.load_state_dict(case.weights, strict=False)
    found = field(case["x"], case["d"])
    sigma = truncated_exp(found.log_density)
    case.close("sigma", sigma)
    case.close("color", found.color)
    case.close("sigma_pre", found.log_density)
    if "feature" in case:
        assert found.features is not None
        case.close("feature", found.features)
    scalar = (sigma + 1e-3).log().sum() + found.color.sum()
    case.close("scalar", scalar)
    scalar.backward()
    for name, parameter in field.named_parameters():
        if f"grad:{name}" in case:
            case.close_grad(name, parameter)


def vm(case: Case) -> None:
    mat, color = case["w:sigma_mat.0"], case["w:color_mat.0"]
    _field(case, VMField(mat.shape[2], mat.shape[1], color.shape[1], case.params["bound"]))


def tensors(case: Case) -> None:
    volume = case["w:tensor_volume.0"]
    _field(case, PlenoxelField(volume.shape[2], case.params["plenoxel_degree"], case.params["bound"]))


def mlp(case: Case) -> None:
    p = case.params
    encoded = case[f"w:nerf_mlp.{p['nerf_layer_num'] - 1}.weight"].shape[0]
    options = {"skip": p["skip"], "frequencies": p["PE"], "encoded": encoded, "bound": p["bound"]}
    _field(case, MLPField(p["nerf_layer_wide"], p["nerf_layer_num"], **options))


def encodings(case: Case) -> None:
    case.close("sh", spherical_harmonics(case["d"], case.params["sh_degree"]))
    case.close("pe", positional_encoding(case["x"], case.params["frequencies"]), atol=1e-4)


def hashed(case: Case) -> None:
    p = case.params
    y = hash_encoding(case["x"], case["table"], case["offsets"], p["base_resolution"], p["per_level_scale"], p["bound"])
    case.close("y", y)


def loss(case: Case) -> None:
    p = case.params

    def points(side: str, leaves: bool) -> FieldPoints:
        read = case.leaf if leaves else case.__getitem__
        names = [f"{what}_{side}" for what in ("sigma_pre", "color", "feature")]
        values: list[Any] = [read(name) if name in case else None for name in names]
        return FieldPoints(*values)

    rates = Rates(p["rate_rgb"], p["rate_feature_used"], p["rate_color"], p["rate_sigma"], p["l1_reg_weight"])
    sparsity: Tensor | None = None
    if "dens_mat" in case:
        sparsity = case["dens_mat"].abs().mean() + case["dens_vec"].abs().mean()
    terms = phase_loss(
        p["stage"],
        points("student", True),
        points("teacher", False),
        (case.leaf("rgb_student"), case["rgb_teacher"]),
        rates,
        p["loss_type"],
        sparsity,
    )
    total = torch.stack(list(terms.values())).sum()
    case.close("loss", total)
    total.backward()
    for name in (n.removeprefix("grad:") for n in case.arrays if n.startswith("grad:")):
        case.close_grad(name)


def composite(case: Case) -> None:
    seen = composited(case.leaf("sigma"), case.leaf("rgb"), case["delta"], case["background"])
    case.close("image", seen.image)
    case.close("weights_sum", seen.weights_sum)
    case.close("depth_sum", seen.depth_sum)
    seen.image.sum().backward()
    case.close_grad("sigma")
    case.close_grad("rgb")


ADAPTERS = {
    "vm": vm,
    "vm_res8": vm,
    "tensors": tensors,
    "mlp": mlp,
    "encodings": encodings,
    "hash_encoding": hashed,
    "loss_stage1": loss,
    "loss_stage2": loss,
    "loss_stage3": loss,
    "composite": composite,
}
