"""FYI's hosts with mirror images, and its augmentation, against the arrays of `fyi`."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.adapters.dataset_distillation_common import convnet_of, seeded
from parity.case import Case
from stillhouse.functional.augmentation import all_of, apply, one_of
from stillhouse.functional.matching import (
    Flat,
    feature_mean_distance,
    gradient_distance,
    gradients,
    trajectory_distance_by_steps,
)
from stillhouse.methods.datasets.fyi import flip_first
from stillhouse.synthetic.config import AugmentSpec
from stillhouse.synthetic.synthesis import with_mirrors

OTHERS = ("color", "crop", "cutout", "scale", "rotate")


def draws(seed: int, size: tuple[int, int]):
    """A flip, then one of the others, as FYI's released augmentation draws them."""
    spec, stream = flip_first(AugmentSpec(groups="_".join(("flip", *OTHERS)))), seeded(seed)
    assert spec.always == "flip"
    return all_of(("flip",), 1, size, stream) + one_of(OTHERS, 1, size, stream)


def diffaug_always_flip(case: Case) -> None:
    for name in case.arrays:
        if name.startswith("y_seed"):
            seed = int(name.removeprefix("y_seed"))
            case.close(name, apply(case["x"], draws(seed, tuple(case["x"].shape[-2:]))))
    case.close("batch_aug", with_mirrors(case["x"], 1))
    labels = case["batch_aug_labels"]
    assert torch.equal(labels, labels[: len(case["x"])].repeat(2))


def dsa_match(case: Case) -> None:
    p, network, size = case.params, convnet_of(case), tuple(case["x_real"].shape[-2:])

    def loss(mirror: bool) -> tuple[Tensor, Tensor]:
        x = case["x_syn"].clone().requires_grad_()
        shown, real = with_mirrors(x, 1) if mirror else x, case["x_real"]
        if p["dsa_seed"] is not None:
            drawn = draws(p["dsa_seed"], size)
            shown, real = apply(shown, drawn), apply(real, drawn)
        if mirror:
            case.close("syn_batch_into_net", shown, rtol=1e-4)
            case.close("real_batch_into_net", real, rtol=1e-4)
        label = torch.tensor(p["cls"])
        real_gradients = gradients(network, real, label.expand(len(real)))
        metric = p.get("dis_metric", "ours").replace("ours", "units")
        value = gradient_distance(
            real_gradients, gradients(network, shown, label.expand(len(shown)), True), metric, p["eps"]
        )
        value.backward()
        return value, x

    _both(case, loss)


def dm_match(case: Case) -> None:
    network = convnet_of(case)

    def loss(mirror: bool) -> tuple[Tensor, Tensor]:
        x = case["x_syn"].clone().requires_grad_()
        value = feature_mean_distance(
            network.embed(case["x_real"]), network.embed(with_mirrors(x, 1) if mirror else x), 1
        )
        value.backward()
        return value, x

    _both(case, loss)


def _both(case: Case, loss) -> None:
    for mirror, suffix in ((False, "noflip"), (True, "fyi")):
        value, x = loss(mirror)
        case.close(f"loss_{suffix}", value, rtol=1e-4)
        case.close_grad("x_syn", x, array=f"grad:x_syn_{suffix}", rtol=1e-4)


def mtt_fyi(case: Case) -> None:
    flat, x = Flat(convnet_of(case)), case.leaf("x")
    lr = torch.tensor(case.params["syn_lr"], dtype=x.dtype, requires_grad=True)
    batches = [(with_mirrors(x[rows], 1), case["y"][rows].repeat(2)) for rows in (i[i >= 0] for i in case["idx"])]
    value = trajectory_distance_by_steps(flat.gradient, case["start"], case["target"], batches, lr)
    case.close("loss", value, rtol=1e-4)
    case.close_grad("x", rtol=1e-4)
    case.close_grad("syn_lr", lr, rtol=1e-4)


ADAPTERS = {
    "dsa_match": dsa_match,
    "dm_match": dm_match,
    "mtt_fyi": mtt_fyi,
    "diffaug_always_flip": diffaug_always_flip,
}
