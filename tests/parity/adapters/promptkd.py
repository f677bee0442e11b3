"""The loss with its projector, and deep prompts in both halves: the arrays of `promptkd`."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.image_text.promptkd import projector, prompt_distillation_loss
from stillhouse.models.clip import renamed_from_openai
from stillhouse.nn.clip import EncoderShape, ImageEncoder, TextEncoder

ACTS = {"gelu": "gelu", "quickgelu": "quick_gelu"}


def loss(case: Case) -> None:
    p, weights = case.params, {k.removeprefix("conv1."): v for k, v in case.weights.items()}
    dim, width = weights["0.weight"].shape[:2]
    net = projector(width, dim)
    net.load_state_dict({k: v.flatten(1) if v.ndim == 4 else v for k, v in weights.items()})
    net.train(p.get("bn_training", True))
    features, vectors = case.leaf("student_image_feat"), case["teacher_text_feat_unit"]
    unit = F.normalize(net(features), dim=-1)
    logits = p["logit_scale_exp"] * unit @ vectors.T
    value = prompt_distillation_loss(logits, case["teacher_logits"], p["kd_weight"], p["temperature"])
    value.backward()
    for name, found in (("student_proj_unit", unit), ("student_logits", logits), ("loss", value)):
        case.close(name, found, rtol=1e-4, atol=1e-5)
    if "grad:student_image_feat" in case:
        largest = float(case["grad:student_image_feat"].abs().max())
        case.close_grad("student_image_feat", rtol=1e-4, atol=1e-4 * largest)
    grads = [k for k in case.arrays if k.startswith("grad:conv1.")]
    rounding = 1e-5 * max((float(case[k].abs().max()) for k in grads), default=0.0)  # a bias before batch norm has none
    for name, parameter in net.named_parameters():
        if f"grad:conv1.{name}" in grads:
            assert parameter.grad is not None
            expected = f"grad:conv1.{name}"
            case.close(expected, parameter.grad.reshape(case.arrays[expected].shape), rtol=1e-4, atol=rounding)


def _shape(state: dict[str, object], case: Case, prefix: str) -> EncoderShape:
    p = case.params
    hidden = tuple(len(state[f"{prefix}layers.{i}.fc1.bias"]) for i in range(p["layers"]))  # type: ignore[arg-type]
    act = ACTS[p.get("act", "quickgelu")]
    return EncoderShape(p["width"], (p["heads"],) * p["layers"], hidden, p["width"] // p["heads"], act)


def _deep(case: Case, prefix: str) -> list[nn.Parameter]:
    layers = range(1, case.params["layers"])
    names = [f"w:{prefix}resblocks.{i}.VPT_shallow" for i in layers]
    return [nn.Parameter(case[n]) for n in names if n in case]


def visual(case: Case) -> None:
    p = case.params
    given = {f"visual.{k}": v for k, v in case.weights.items() if "VPT" not in k}
    state = {k.removeprefix("image."): v for k, v in renamed_from_openai(given).items()}
    net = ImageEncoder(_shape(state, case, "encoder."), p["image"], p["patch"], p["out"], case["images"].shape[1])
    net.load_state_dict(state)
    prompts = [nn.Parameter(case["w:VPT"]), *_deep(case, "transformer.")]
    features = net(case["images"], prompts=prompts)
    case.close("features", features, rtol=1e-4)
    (features * case["cotangent"]).sum().backward()
    names = ["VPT", *(f"transformer.resblocks.{i}.VPT_shallow" for i in range(1, len(prompts)))]
    for name, prompt in zip(names, prompts):
        if f"grad:{name}" in case:
            case.close_grad(name, prompt, rtol=1e-4)


def text(case: Case) -> None:
    weights = {k: v for k, v in case.weights.items() if "VPT" not in k}
    names = {"ln_final_weight": "ln_final.weight", "ln_final_bias": "ln_final.bias"}
    given = {names.get(k, f"transformer.{k}" if k.startswith("resblocks") else k): v for k, v in weights.items()}
    state = {k.removeprefix("text."): v for k, v in renamed_from_openai(given).items()}
    embedded = case["token_embeddings"]
    dim, context = state["projection.weight"].shape[0], len(state["positions"])
    net = TextEncoder(_shape(state, case, "encoder."), 1, context, dim)
    net.load_state_dict({"tokens.weight": net.tokens.weight.detach(), **state})
    ctx, deep = nn.Parameter(case["ctx"]), _deep(case, "")
    ends = case["token_ids"].argmax(-1)
    features = net.from_embedded(embedded, ends, prompts=[ctx, *deep])
    case.close("text_features", features, rtol=1e-4)
    features.square().sum().backward()
    for name, prompt in (("ctx", ctx), *((f"resblocks.{i}.VPT_shallow", d) for i, d in enumerate(deep, 1))):
        if f"grad:{name}" in case:
            case.close_grad(name, prompt, rtol=1e-4)


ADAPTERS = {"loss": loss, "deep_visual_prompts": visual, "deep_text_prompts": text}
