"""Masks, the bound of the information and the losses of both stages against the arrays of `mrdd`."""

from __future__ import annotations

import torch

from parity.case import Case
from stillhouse.methods.pretraining.mrdd.losses import (
    Estimator,
    estimator_loss,
    full_bound,
    mask_image,
    sample_code,
    sampled_bound,
    variational_loss,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def mask(case: Case) -> None:
    p = case.params
    masked, visible = mask_image(case["x"], case["scores"], p["patch_size"], p["mask_ratio"])
    case.close("masked", masked, **CLOSE)
    case.close("visible", visible, **CLOSE)


def club(case: Case) -> None:
    p, v, c = case.params, case.leaf("v"), case["c"]
    q = case.load(Estimator(p["v_dim"], p["c_dim"], p["hidden_size"]))
    mu, logvar = q(v)
    case.close("mu", mu, **CLOSE)
    case.close("logvar", logvar, **CLOSE)
    learning, sampled = estimator_loss(mu, logvar, c), sampled_bound(mu, logvar, c, case["perm"])
    case.close("learning_loss", learning, **CLOSE)
    case.close("club_sample", sampled, **CLOSE)
    case.close("club_full", full_bound(mu, logvar, c), **CLOSE)
    case.close("grad:v_learning_loss", torch.autograd.grad(learning, v, retain_graph=True)[0], **CLOSE)
    case.close("grad:v_club_sample", torch.autograd.grad(sampled, v)[0], **CLOSE)


def consistency(case: Case) -> None:
    p = case.params
    views = list(case["Xs"])
    masked = [mask_image(x, s, p["patch"], p["mask_ratio"])[0] for x, s in zip(views, case["scores"])]
    case.close("masked", torch.stack(masked), **CLOSE)
    mean, log_variance = case.leaf("stat").chunk(2, -1)
    z = sample_code(mean, log_variance, case["eps"])
    case.close("z", z, **CLOSE)
    rebuilt = [(z @ w).view_as(x) for x, w in zip(views, case["proj"])]
    terms = variational_loss(views, rebuilt, mean, log_variance, p["alpha"], p["kld_weight"])
    loss = terms["reconstruction"] + terms["kl"]
    loss.backward()
    case.close("recon_loss", terms["reconstruction"] / p["alpha"], **CLOSE)
    case.close("kld_loss", terms["kl"], **CLOSE)
    case.close("loss", loss, **CLOSE)
    case.close_grad("stat", rtol=1e-4)


def view_specific_loss(case: Case) -> None:
    x = case["x"]
    mean, log_variance = case.leaf("stat").chunk(2, -1)
    code = torch.cat([sample_code(mean, log_variance, case["eps"]), case["c"]], -1)
    terms = variational_loss(
        [x], [(code @ case["proj"]).view_as(x)], mean, log_variance, kl_weight=case.params["kld_weight"]
    )
    (terms["reconstruction"] + terms["kl"]).backward()
    case.close("recon", terms["reconstruction"], **CLOSE)
    case.close("kld", terms["kl"], **CLOSE)
    case.close_grad("stat", rtol=1e-4)


ADAPTERS = {"mask_image": mask, "club": club, "consistency": consistency, "view_specific_loss": view_specific_loss}
