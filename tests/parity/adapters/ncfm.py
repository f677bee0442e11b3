"""NCFM's distance, sampler, tiles and per-class steps against the arrays of `ncfm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.datasets.ncfm import SCALE, SamplingNetwork, between, characteristic_distance, match_loss
from stillhouse.models.convnet import ConvNet
from stillhouse.synthetic.initial import decode, mixed
from stillhouse.synthetic.real import RealImages


def cf_loss(case: Case) -> None:
    p = case.params
    value = characteristic_distance(
        case["feat_real"],
        case.leaf("feat_syn"),
        case.leaf("t"),
        p["alpha"],
        p["beta"],
        unit_features=p["l2_normalised_features"],
    )
    value.backward()
    case.close("loss", value)
    case.close("loss300", SCALE * value)
    # the phase is a difference of numbers near 1, and of the size of the distance squared
    rounding = max(1e-5, 4 * torch.finfo(torch.float32).eps / float(value.detach()) ** 2)
    for name in ("feat_syn", "t"):
        case.close_grad(name, atol=max(rounding * float(case[name].grad.abs().max()), 1e-9))


def convnet_of(case: Case) -> nn.Module:
    """The case's ConvNet for its images; its depth is how many convolutions the file holds."""
    p, weights = case.params, case.weights
    depth = sum(k.startswith("layers.conv.") and k.endswith("weight") for k in weights)
    act, pool = (
        p.get("act", "relu").replace("leakyrelu", "leaky_relu"),
        p.get("pool", "avgpooling").removesuffix("pooling"),
    )
    width, classes = len(weights["layers.conv.0.weight"]), len(weights["classifier.weight"])
    network = ConvNet(width, depth, p.get("norm", "instance"), act, pool, classes, tuple(case["x_real"].shape[-3:]))
    named = {}
    for k, v in weights.items():
        kind, *rest = k.removeprefix("layers.").split(".")
        named["fc." + rest[0] if kind == "classifier" else f"layer{int(rest[0]) + 1}.{kind}.{rest[1]}"] = v
    network.load_state_dict(named)
    return network.to(case["x_real"].dtype)


THROUGH_NETWORK = 1e-3
"""Of the largest entry of a gradient: in float32 the published arrays themselves are off by half of it, where a
frequency's phase is nearly 0."""


def match_and_calib(case: Case) -> None:
    p, network = case.params, convnet_of(case)
    x = case["x_syn"].clone().requires_grad_()
    loss = match_loss(network, case["x_real"], x, case["t"], p["alpha"], p["beta"])
    loss.backward()
    case.close("match_loss", loss, rtol=1e-4)
    case.close_grad("x_syn", x, array="grad:x_syn_match", rtol=1e-4, atol=THROUGH_NETWORK * float(x.grad.abs().max()))
    y = case["x_syn"].clone().requires_grad_()
    calibration = F.cross_entropy(network(y), case["y_syn"])
    calibration.backward()
    case.close("calib_loss", calibration, rtol=1e-4)
    case.close_grad("x_syn", y, array="grad:x_syn_calib", rtol=1e-4)


def sampler_of(weights: dict[str, Tensor]) -> SamplingNetwork:
    found = {k.removeprefix("t_layers_list."): v for k, v in weights.items()}
    sampler = SamplingNetwork(len(found["0.weight"]))
    sampler.to(found["0.weight"].dtype).load_state_dict(found)
    return sampler


def sampling_net(case: Case) -> None:
    p, sampler = case.params, sampler_of(case.weights).train(case.params["train"])
    t = sampler(case["noise"] * p["t_var"] ** 0.5)
    case.close("t", t.repeat(p["t_batchsize"] // len(t), 1))


def steps(case: Case) -> None:
    """One iteration: classes in order, AdamW over all images after each. The released sampler does not move, so it is
    not stepped here."""
    p, count = case.params, case.params["ipc"]
    network, sampler = convnet_of(case), None
    if p["sampling_net"]:
        sampler = sampler_of(case.under("s"))
    images = nn.Parameter(case["x_syn0"].clone())
    optimizer = torch.optim.AdamW([images], p["lr_img"], weight_decay=5e-4)
    total, clear = 0.0, torch.ones_like(images, dtype=torch.bool)
    for c in range(p["classes"]):
        t = case[f"t{c}"] if sampler is None else sampler(case[f"noise{c}"])
        loss = match_loss(
            network, case["x_real"][c], images[c * count : (c + 1) * count], t, p.get("alpha", 0.5), p.get("beta", 0.5)
        )
        optimizer.zero_grad()
        loss.backward()
        if sampler is not None and c == 0:
            case.close("loss_class0", loss, rtol=1e-4)
            # a bias before batch norm has no gradient but rounding
            top = max(float(weight.grad.abs().max()) for weight in sampler.parameters())
            for name, weight in sampler.named_parameters():
                array = f"grad_neg_loss:t_layers_list.{name}"
                case.close(
                    array, -weight.grad, rtol=1e-4, atol=THROUGH_NETWORK * float(weight.grad.abs().max()) + 1e-6 * top
                )
        own = images.grad[c * count : (c + 1) * count].abs()
        clear[c * count : (c + 1) * count] = (
            own > THROUGH_NETWORK * own.max()
        )  # AdamW divides a gradient by its size, also one of rounding alone
        optimizer.step()
        total += loss.item()
    case.close("loss_total", torch.tensor(total), rtol=1e-4)
    case.close("x_syn1", images, rtol=1e-4, atol=1e-5, where=clear)
    if sampler is not None:
        for name, value in sampler.state_dict().items():
            case.close(f"s_after:t_layers_list.{name}", value, rtol=1e-4)


def tiles(case: Case) -> None:
    factor, x, y = case.params["factor"], case["x"], case["y"]

    def cut(images: Tensor, labels: Tensor, by: int) -> tuple[Tensor, Tensor]:
        return decode(images, by), labels.repeat(by**2)

    def compare(name: str, parts: list[tuple[Tensor, Tensor]]) -> None:
        case.close(name, torch.cat([images for images, _ in parts]), rtol=1e-6)
        case.close(f"{name}_y", torch.cat([labels for _, labels in parts]))

    compare("single", [cut(x, y, factor)])
    # the released code's other two ways are made of these: `multi` of every factor, `bound` of the largest that keeps
    # all in a number of images
    compare("multi", [cut(x, y, by) for by in range(1, factor + 1)])
    bounded, left, room = [], len(x), case.params["bound"] - len(x)
    for by in range(factor, 0, -1):
        at, count = len(x) - left, min(room // by**2, left) if by > 1 else left
        bounded.append(cut(x[at : at + count], y[at : at + count], by))
        left -= count
        room = case.params["bound"] - sum(len(images) for images, _ in bounded) - left
        if not left:
            break
    compare("bound", bounded)


def mix_init(case: Case) -> None:
    p, samples = case.params, case["samples"]
    made = mixed_of(samples, p["ipc"], p["factor"])
    case.close("data", made, rtol=1e-6)
    case.close("targets", torch.arange(p["classes"]).repeat_interleave(p["ipc"]))


def mixed_of(samples: Tensor, ipc: int, factor: int) -> Tensor:
    """`mixed` of these samples (classes, ipc * factor^2, …), in their order."""
    classes = len(samples)
    labels = torch.arange(classes).repeat_interleave(samples.shape[1])
    channels = samples.shape[2]
    real = RealImages(
        samples.flatten(0, 1), labels, [str(c) for c in range(classes)], (0.0,) * channels, (1.0,) * channels
    )
    real.draw = lambda *_: samples.flatten(0, 1)
    return mixed(real, ipc, factor, torch.Generator())


def feature_extractor_mix(case: Case) -> None:
    case.close("mid", between(case["init"], case["final"], case["l"]), rtol=1e-6)


ADAPTERS = {
    "cf_loss": cf_loss,
    "match_and_calib": match_and_calib,
    "sampling_net": sampling_net,
    "minmax_step": steps,
    "random_freq_step": steps,
    "decode": tiles,
    "mix_init": mix_init,
    "feature_extractor_mix": feature_extractor_mix,
}
