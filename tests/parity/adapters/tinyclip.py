"""Affinity mimicking, manual inheritance, learned masks, and the cutting of a masked network: the arrays of
`tinyclip`."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.image_text.tinyclip.inheritance import fold_image, folded_shape, inherit_encoder, teacher_layers
from stillhouse.methods.image_text.tinyclip.masks import (
    Ramp,
    expected_parameters,
    lagrangian,
    open_probability,
    sampled,
    settled,
)
from stillhouse.methods.image_text.tinyclip.method import affinity_losses, mimicking_loss
from stillhouse.models.clip import renamed_from_openai
from stillhouse.nn.clip import Encoder, EncoderShape, ImageEncoder, Masks
from stillhouse.objectives.contrastive import contrastive_loss

ACTS = {"gelu": "gelu", "quickgelu": "quick_gelu"}


def affinity(case: Case) -> None:
    p = case.params
    ours = [F.normalize(case.leaf(f"student_{n}_raw"), dim=-1) for n in ("image", "text")]
    theirs = [case[f"teacher_{n}_unit"] for n in ("image", "text")]
    scales = (p["student_scale"], p["teacher_scale"])
    to_text, to_image = affinity_losses(*ours, *theirs, *scales)
    found = mimicking_loss(*ours, *theirs, p["alpha"], *scales)
    found["loss"].backward()
    values = {"loss_i2t": to_text, "loss_t2i": to_image, "soft_loss": found["soft"], "total": found["loss"]}
    values["hard_loss"] = contrastive_loss(*ours, torch.tensor(p["student_scale"]))
    for name, value in values.items():
        if name in case:
            case.close(name, value, rtol=1e-4)
    for name in ("student_image_raw", "student_text_raw"):
        case.close_grad(name, rtol=1e-4)


def encoder(case: Case, prefix: str, width: int, layers: int, head_dim: int) -> Encoder:
    """The transformer of the file's weights, in OpenAI's names."""
    state = {f"visual.transformer.{k.removeprefix(prefix)}": v for k, v in case.weights.items() if k.startswith(prefix)}
    state = {k.removeprefix("image.encoder."): v for k, v in renamed_from_openai(state).items()}
    hidden = tuple(len(state[f"layers.{i}.fc1.bias"]) for i in range(layers))
    act = ACTS[case.params.get("act", "gelu")]
    net = Encoder(EncoderShape(width, (width // head_dim,) * layers, hidden, head_dim, act))
    net.load_state_dict(state)
    return net


def manual(case: Case) -> None:
    p = case.params
    head_dim = p["head_dim"]
    large = encoder(case, "teacher.", p["teacher_width"], p["teacher_layers"], head_dim)
    expected = encoder(case, "student.", p["student_width"], p["student_layers"], head_dim)
    small = Encoder(expected.shape)
    inherit_encoder(small, large)
    assert teacher_layers(p["teacher_layers"], p["student_layers"]) == p["depth_index"]
    for name, value in expected.state_dict().items():
        assert torch.equal(small.state_dict()[name], value), name
    case.close("student_out_lbd", small(case["x_lbd"].transpose(0, 1)).transpose(0, 1), rtol=1e-4)


def l0_masks(case: Case) -> None:
    p = case.params
    kinds = p["types"]
    logits = {k: case.leaf(f"loga_{k}") for k in kinds}

    def rows(x: Tensor) -> list[Tensor]:
        return list(x) if x.ndim > 1 else [x]

    for kind, x in logits.items():
        name, final = f"train_{kind}_z", f"eval_{kind}_z"
        if f"u_{kind}" in case and name in case:
            case.close(name, sampled(x, case[f"u_{kind}"]).reshape(case.arrays[name].shape), rtol=1e-4)
        if final in case:
            found = torch.stack([settled(r) for r in rows(x)])
            case.close(final, found.reshape(case.arrays[final].shape), rtol=1e-4)
    scores = {k: open_probability(x) for k, x in logits.items()}
    for kind, score in scores.items():
        case.close(f"score_{kind}", score, rtol=1e-4)
    width, layers, heads = p["hidden"], p["layers"], p["heads"]
    shape = EncoderShape(width, (heads,) * layers, (p["intermediate"],) * layers, width // heads)
    none = torch.zeros(1)
    parts = [rows(scores[k]) if k in scores else [none] for k in ("heads", "intermediate")]
    count = expected_parameters(scores.get("hidden"), *parts, shape)
    case.close("expected_params", count, rtol=1e-4)
    sparsity, ramp = 1 - count / p["prunable"], Ramp(p["start"], p["target"], p["warmup"])
    first, second = (torch.tensor(float(p[f"lambda{i}"]), requires_grad=True) for i in (1, 2))
    losses = [lagrangian(ramp.at(step), sparsity, first, second) for step in p["steps"]]
    case.close("lagrangian", torch.stack(losses), rtol=1e-4)
    case.close("expected_sparsity", sparsity.expand(len(losses)), rtol=1e-4)
    case.close("target_sparsity", torch.tensor([ramp.at(s) for s in p["steps"]]), rtol=1e-4)
    losses[-1].backward()
    for kind in kinds:
        case.close_grad(f"loga_{kind}", rtol=1e-4)
    for i, value in ((1, first), (2, second)):
        if f"grad:lambda_{i}" in case:
            case.close_grad(f"lambda_{i}", value, rtol=1e-4)


def masked_and_pruned(case: Case) -> None:
    p = case.params
    state = renamed_from_openai(
        {f"visual.{k}": v for k, v in case.weights.items() if not k.startswith(("pruned.", "visual."))}
    )
    state = {k.removeprefix("image."): v for k, v in state.items()}
    layers, width = p["layers"], p["width"]
    hidden = tuple(len(state[f"encoder.layers.{i}.fc1.bias"]) for i in range(layers))
    shape = EncoderShape(width, (p["heads"],) * layers, hidden, width // p["heads"], ACTS[p.get("act", "gelu")])
    net = ImageEncoder(shape, p["image"], p["patch"], p["out"], case["images"].shape[1])
    net.load_state_dict(state)
    masks = Masks(case["hidden_z"], list(case["heads_z"]), list(case["intermediate_z"]))
    case.close("features_masked", net(case["images"], masks), rtol=1e-4)
    for name, official in (("features_pruned", True), ("features_pruned_unscaled_proj", False)):
        small = ImageEncoder(folded_shape(shape, masks), p["image"], p["patch"], p["out"], case["images"].shape[1])
        fold_image(small, net, masks, official)
        if name in case:
            case.close(name, small(case["images"]), rtol=1e-4)
        if not official:
            continue
        pruned = {k.removeprefix("pruned."): v for k, v in case.weights.items() if k.startswith("pruned.")}
        expected = renamed_from_openai({f"visual.{k}": v for k, v in pruned.items()})
        own = small.state_dict()
        for key, value in expected.items():
            assert torch.allclose(own[re.sub(r"^image\.", "", key)], value, rtol=1e-4, atol=1e-6), key
    if "n_params" in case:
        counts = [sum(x.numel() for x in part.parameters()) for part in (net, small)]
        assert counts == case["n_params"].tolist()


ADAPTERS = {"affinity": affinity, "manual": manual, "l0_masks": l0_masks, "masked_and_pruned": masked_and_pruned}
