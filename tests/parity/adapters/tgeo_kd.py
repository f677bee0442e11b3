"""TGeo-KD against the arrays of `tgeo_kd`: what the released fusion networks read, the ratio, and the fused loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.case import Case
from stillhouse.objectives.tgeo_kd import (
    FusionNetwork,
    class_means,
    fused_loss,
    geometry_parts,
    geometry_state,
    sample_losses,
)


def state(case: Case, mean: Tensor, edges: str) -> Tensor:
    vertices = (
        case["logit_s"].softmax(1),
        case["logit_t"].softmax(1),
        mean,
        F.one_hot(case["labels"], case.params["C"]).float(),
    )
    found = geometry_state(*vertices, edges)
    parts = geometry_parts(*vertices, edges)
    ordered = torch.cat([parts[name] for name in case.params["order"].split(",")], dim=1)
    assert torch.equal(found, ordered)
    case.close("out:state", found)
    return found


def state_controller(case: Case) -> None:
    mean = class_means(case["logit_t"].softmax(1), case["labels"], case.params["C"])[case["labels"]]
    read = state(case, mean, case.params["edges"])
    layers = sorted({name.split(".")[0] for name in case.weights})
    network = FusionNetwork(read.shape[1], [len(case[f"w:{layer}.bias"]) for layer in layers[:-1]], slope=0.01)
    network.to(read.dtype).load_state_dict(
        {f"{2 * i}.{kind}": case[f"w:{layer}.{kind}"] for i, layer in enumerate(layers) for kind in ("weight", "bias")}
    )
    case.close("out:alpha", network(read))


def state_products(case: Case) -> None:
    state(case, case["tbar"], case.params.get("edges", "products"))


def inner_loss(case: Case) -> None:
    p, z, labels = case.params, case.leaf("logit_s"), case["labels"]
    kd, ce = sample_losses(z, F.log_softmax(case["logit_t"] / p["tau"], dim=1), labels, p["tau"])
    if p["ce_on"] != "logits":  # the attack-detection script's slip: probabilities where logits belong
        ce = sample_losses(z.softmax(1), case["logit_t"], labels)[1]
    case.close("out:kd_per_sample", kd)
    case.close("out:ce_per_sample", ce)
    loss = fused_loss(case.leaf("alpha"), (p["tau"] ** 2 if p["tau2_factor"] else 1.0) * kd, ce)
    loss.backward()
    case.close("out:loss", loss)
    case.close_grad("logit_s")
    case.close_grad("alpha")


ADAPTERS = {"state_controller": state_controller, "state_products_cifar": state_products, "inner_loss": inner_loss}
