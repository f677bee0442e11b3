"""Which patches are read, the residual token, distillation over captions, and token merging: the arrays of
`residualvit`."""

from __future__ import annotations

from torch.nn import functional as F

from parity.case import Case
from stillhouse.functional.token_merging import merge_tokens
from stillhouse.methods.image_text.residualvit.encoder import Reduction, VideoEncoder
from stillhouse.methods.image_text.residualvit.losses import caption_loss, feature_distance
from stillhouse.methods.image_text.residualvit.reduction import (
    centre_patches,
    kept_count,
    moving_patches,
    random_patches,
    take,
    uniform_patches,
)
from stillhouse.models.clip import Clip, renamed_from_openai

ACTS = {"gelu": "gelu", "quickgelu": "quick_gelu"}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODES = {"center": "centre", "residuals": "residual", "resize": "resolution", "tome": "merge"}


def token_reduction(case: Case) -> None:
    p, tokens = case.params, case["tokens"]
    patches, size = tokens.shape[1] - 1, len(tokens)
    count = kept_count(patches, p["prob"])
    if "train_noise" in case:
        case.close("kept_train", random_patches(case["train_noise"], kept_count(patches, p["prob"], training=True)))
    found = {
        "uniform": uniform_patches(patches, count).expand(size, -1),
        "center": centre_patches(p["grid"], count).expand(size, -1),
    }
    if "motion" in case:
        found["motion"] = found["residuals"] = moving_patches(case["motion"], p["patch"], count)
    for name, kept in found.items():
        case.close(f"kept_{name}", kept)
        case.close(f"out_{name}", take(tokens, kept), **CLOSE)


def residual(case: Case) -> None:
    p, weights = case.params, case.weights
    side, channels = p["image"], case["frame_i"].shape[1]
    hidden = len(weights["resblocks.0.mlp.c_fc.bias"])
    vision = {
        "width": p["width"],
        "layers": p["layers"],
        "heads": p["heads"],
        "hidden": hidden,
        "patch": p["patch"],
        "activation": ACTS[p.get("act", "quickgelu")],
    }
    clip = Clip(vision, {"width": 4, "layers": 1, "heads": 1}, p["out"], 10, 8, input_shape=(channels, side, side))
    state = {
        f"visual.{'transformer.' if k.startswith('resblocks') else ''}{k}": v
        for k, v in weights.items()
        if not k.startswith("projection_residual")
    }
    loaded = clip.load_state_dict(renamed_from_openai(state), strict=False)
    assert not loaded.unexpected_keys and all(k.startswith(("text.", "logit_scale")) for k in loaded.missing_keys)
    mode = MODES.get(p["mode"], p["mode"])
    net = VideoEncoder(clip, Reduction(mode=mode, drop=p["prob"], layers=p.get("residual_layers", 1)))
    name = "projection_residual_feature."
    net.residual.load_state_dict({k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})
    whole = net.get_image_features(case["frame_i"])
    case.close("i_feature_raw", whole, **CLOSE)
    unit = F.normalize(whole, dim=-1)
    case.close("i_feature_unit", unit, **CLOSE)
    frames = case["frame_p"]
    case.close("p_feature_full", net.get_image_features(frames), **CLOSE)
    change = next((case[name] for name in ("motion", "residuals") if name in case), None)
    found = net.partial(frames, unit, net.kept(frames, None, change, None))
    case.close("p_feature", found, **CLOSE)
    if "cotangent" in case:
        (found * case["cotangent"]).sum().backward()
        for key, parameter in net.residual.named_parameters():
            case.close_grad(f"{name}{key}", parameter, rtol=1e-4)


def distill_loss(case: Case) -> None:
    p, frames = case.params, case.params["num_frames"] - 1
    teacher, text = case["teacher_image_unit"].unflatten(0, (-1, frames)), case["text_unit"]
    scale = text.new_tensor(p["logit_scale_exp"])
    directions = "v" if p.get("vision_only", True) else "both"
    for name in ("ce", "mse"):
        student = case["student_image_raw"].clone().requires_grad_()
        clips = student.unflatten(0, (-1, frames))
        if name == "ce":
            loss = caption_loss(clips, teacher, text, scale, directions)
        else:
            loss = feature_distance(clips, teacher)
        loss.backward()
        case.close(f"loss_{name}", loss, **CLOSE)
        case.close_grad(f"student_{name}", student, rtol=1e-4)


def token_merging(case: Case) -> None:
    p = case.params
    protected = 2 if p.get("residual_token", False) else 1
    x, metric = case["x_lbc"].transpose(0, 1), case["metric_btc"]
    out, size = merge_tokens(x, metric, p["r"], None, protected)
    case.close("out", out.transpose(0, 1), **CLOSE)
    case.close("size", size, **CLOSE)
    if "metric2" in case:
        out, size = merge_tokens(out, case["metric2"], p["r"], size, protected)
        case.close("out2", out.transpose(0, 1), **CLOSE)
        case.close("size2", size, **CLOSE)


ADAPTERS = {
    "token_reduction": token_reduction,
    "residual": residual,
    "distill_loss": distill_loss,
    "token_merging": token_merging,
}
