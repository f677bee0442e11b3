"""CV-DD's votes, its recovery by a committee and its batch-specific soft labels against the arrays of `cv_dd`."""

from __future__ import annotations

import torch
from torch import nn

from parity.adapters.dataset_distillation_common import Descent, batch_norm_net
from parity.case import Case
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels
from stillhouse.methods.datasets.cv_dd.committee import batch_labels, committee_loss, vote_weights
from stillhouse.synthetic.real import unnormalised


def members(case: Case, channels: int) -> list[nn.Module]:
    """The networks whose weights are `w:NUMBER:*`."""
    numbers = sorted({int(name.partition(":")[0]) for name in case.weights})
    return [
        batch_norm_net({k.partition(":")[2]: v for k, v in case.weights.items() if k.startswith(f"{n}:")}, channels)
        for n in numbers
    ]


def voter_weights(case: Case) -> None:
    for name in case.arrays:
        if name.startswith("prior"):
            case.close(
                name.replace("prior", "weight"),
                vote_weights(case[name].tolist(), case.params["temperature"]),
                rtol=1e-12,
            )


def committee_recover(case: Case) -> None:
    p, x = case.params, case.leaf("x0")
    networks = members(case, x.shape[1])
    if p["voter"] == "prior":
        weights = vote_weights([p["prior"][name] for name in p["names"]], p["weight_temperature"])
        case.close("weights:f64", weights, rtol=1e-12)
    weights = case["weights:f64"] if "weights:f64" in case else torch.as_tensor(weights)
    statistics, descent = [BatchNormStatistics(network) for network in networks], Descent(x, p, p["iteration"])
    for t, shift in enumerate(case["rolls"].tolist()):
        rolled = torch.roll(x, shift, (2, 3))
        loss = committee_loss(
            networks, statistics, weights.tolist(), rolled, case["y"], p["r_bn"], p["first_bn_multiplier"]
        )["loss"]
        descent.step(loss)
        if t == 0:
            case.close_grad("x0", array="grad_step0", rtol=1e-4)
        clamp_to_pixels(x, p["mean"], p["std"])
    case.close_grad("x0", array="grad_last", rtol=1e-4, atol=1e-5)
    case.close(
        "x_final_denorm", unnormalised(x.detach(), p["mean"], p["std"]), rtol=1e-4, atol=1e-4, where=descent.clear
    )


def bssl_labels(case: Case) -> None:
    p, x = case.params, case["x"].clone()
    networks = members(case, x.shape[1])
    weights = [1 / len(networks)] * len(networks)
    if p["model_weight"]:
        weights = vote_weights([float(w) for w in p["model_weight"]], p["label_temperature"]).tolist()
        case.close("weights:f64", torch.tensor(weights, dtype=torch.float64), rtol=1e-12)
    if "bbox" in case:
        top, left, bottom, right = case["bbox"].tolist()
        x[:, :, top:bottom, left:right] = case["x"][case["mix_index"], :, top:bottom, left:right]
    case.close("soft_label", batch_labels(networks, weights, x), rtol=1e-4, atol=1e-5)


ADAPTERS = {
    "voter_weights": voter_weights,
    "committee_recover": committee_recover,
    "bssl_labels": bssl_labels,
    "bssl_labels_cutmix": bssl_labels,
}
