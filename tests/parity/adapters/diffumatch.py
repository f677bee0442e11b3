"""Spectra, functional maps, the distilled mask, point maps and denoisers: the arrays of `diffumatch`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from parity.case import Case
from stillhouse.data.meshes import Mesh, laplacian, spectrum
from stillhouse.functional.functional_maps import (
    heat_kernel_signature,
    laplacian_mask,
    nearest_rows,
    point_map,
    resolvent_mask,
    soft_point_map,
    solved_map,
    wave_kernel_signature,
    zoomed_out,
)
from stillhouse.functional.score_masks import distilled_mask, guidance
from stillhouse.nn.denoisers import (
    edm_denoised,
    edm_loss,
    iddpm_denoised,
    iddpm_levels,
    vp_loss,
    vp_sigma,
)


def laplacian_descriptors(case: Case) -> None:
    p = case.params
    weak, mass = laplacian(Mesh(case["V"].numpy(), case["F"].numpy()))
    case.close("mass", mass, rtol=1e-6)
    given = np.zeros(weak.shape)
    given[case["L_row"].numpy(), case["L_col"].numpy()] = case["L_val"].numpy()
    np.testing.assert_allclose(weak.toarray(), given, rtol=1e-6, atol=1e-9)
    values, vectors = spectrum(weak, mass, p["k"])
    case.close("evals", values, rtol=1e-5, atol=1e-6)
    evals, basis, weights = (torch.from_numpy(np.ascontiguousarray(v)) for v in (values, vectors, mass))
    for name, signature in (("hks", heat_kernel_signature), ("wks", wave_kernel_signature)):
        case.close(name, signature(evals, basis, p["n_descr"], weights).float(), rtol=1e-3, atol=1e-4)


def _template(case: Case):
    template = case["denoiser_template"]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.square()[:, None, None, None]
        return (s * template + 0.25 * x) / (s + 0.25)

    return denoise


def fmap(case: Case) -> None:
    p = case.params
    one, two = (case[f"evecs_trans{i}"] @ case.leaf(f"feat{i}") for i in (1, 2))
    evals1, evals2 = case["evals1"], case["evals2"]

    def mask(a: Tensor, b: Tensor, e1: Tensor, e2: Tensor, side: str) -> Tensor:
        if p["kind"] == "laplacian":
            return laplacian_mask(e1, e2)
        if p["kind"] == "resolvent":
            return resolvent_mask(e1, e2, p["resolvent_gamma"])
        raw = solved_map(a, b).detach()
        if f"C{side}_raw" in case:
            case.close(f"C{side}_raw", raw[None], rtol=1e-3, atol=1e-3 * float(raw.abs().max()))
        found = distilled_mask(raw, _template(case), case[f"noise{side}"], p["diffusion_scale"], p["normalize"])
        if f"mask{side}" in case:
            case.close(f"mask{side}", found.view_as(case[f"mask{side}"]), rtol=1e-3, atol=1e-4)
        return found

    maps = {
        "C12": solved_map(one, two, mask(one, two, evals1, evals2, "12"), p["lambda_"]),
        "C21": solved_map(two, one, mask(two, one, evals2, evals1, "21"), p["lambda_"]),
    }
    for name, value in maps.items():
        case.close(name, value[None], rtol=1e-3, atol=1e-4)
    if "G" in case:
        weights = case["G"][0]
        ((maps["C12"] * weights).sum() + (maps["C21"] * weights.T).sum()).backward()
        for i in (i for i in (1, 2) if f"grad:feat{i}" in case):
            scale = float(abs(case.arrays[f"grad:feat{i}"]).max())
            case.close_grad(f"feat{i}", rtol=1e-3, atol=2e-3 * scale)


def pointmap_zoomout(case: Case) -> None:
    p, one, two, mass = case.params, case["evecs1"], case["evecs2"], case["mass2"]
    k = p["k0"]
    case.close("p2p_2to1", point_map(case["C0"], one, two))
    if "p2p_1to2" in case:
        case.close("p2p_1to2", nearest_rows(two[:, :k], one[:, :k] @ case["C0"].T))
    if "soft" in case:
        case.close("soft", soft_point_map(case["C0"], one[:, :k], two[:, :k]).float(), rtol=1e-4)
    functional, points = zoomed_out(case["C0"], one, two, mass, p["K"], p["step"])
    case.close("C_zoomout", functional, rtol=1e-6, atol=1e-8)
    case.close("p2p_2to1_zoomout", points)


def denoiser_training(case: Case) -> None:
    p, x, noise = case.params, case["x"], case["noise"]

    def raw(z: Tensor, level: Tensor) -> Tensor:
        return torch.tanh(z @ case["W"]) + 0.1 * level.view(-1, 1, 1, 1)

    vp, edm = p["vp"], p["edm"]
    sigma = vp_sigma(case["uniform"], vp["beta_d"], vp["beta_min"], vp["epsilon_t"])
    case.close("sigma_vp", sigma, rtol=1e-4)
    levels = iddpm_levels(p["iddpm"]["M"], p["iddpm"]["C1"], p["iddpm"]["C2"])
    sigma = case["sigma_vp"]
    denoised = iddpm_denoised(raw, x + noise * sigma.view(-1, 1, 1, 1), sigma, levels)
    case.close("iddpm_D", denoised, rtol=1e-3, atol=1e-3)
    case.close("vp_loss", vp_loss(denoised, x, sigma), rtol=1e-3)
    sigma = case["sigma_edm"]
    denoised = edm_denoised(raw, x + noise * sigma.view(-1, 1, 1, 1), sigma, edm["sigma_data"])
    case.close("edm_D", denoised, rtol=1e-4)
    case.close("edm_loss", edm_loss(denoised, x, sigma, edm["sigma_data"]), rtol=1e-4)


def sds_guidance(case: Case) -> None:
    scale = case.params["scale_noise"]
    found = guidance(case["C_abs"], _template(case), case["uniform"], case["noise"], scale)
    case.close("guidance", found, rtol=1e-3, atol=1e-6)
    if "denoised" in case:
        levels = 0.01 + scale * case["uniform"]
        noisy = case["C_abs"] + levels[:, None, None] * case["noise"]
        denoised = _template(case)(noisy[:, None], levels)[:, 0]
        case.close("denoised", denoised[: len(case["denoised"])], rtol=1e-3, atol=1e-6)


ADAPTERS = {
    "laplacian_descriptors": laplacian_descriptors,
    "fmap": fmap,
    "fmap_diffusion": fmap,
    "pointmap_zoomout": pointmap_zoomout,
    "denoiser_training": denoiser_training,
    "sds_guidance": sds_guidance,
}
