"""MI-alpha and its critic, the objectives of states and attention, layer pairs and optimal transport, against arrays of
`distiller`."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from parity.case import Case
from stillhouse.functional import token_features as f
from stillhouse.methods.language.distiller.information import FirstTokenCritic, log_mean_of_others, mi_alpha_bound
from stillhouse.methods.language.distiller.objectives import prediction_loss, transport, transport_loss

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def bound(case: Case) -> None:
    scores, baseline = case.leaf("scores"), case.leaf("log_baseline")
    case.close("log_loomean", log_mean_of_others(scores), **CLOSE)
    values, grads = [], []
    for alpha in case.params["alphas"]:
        value = mi_alpha_bound(scores, baseline, alpha)
        values.append(value.detach())
        both = torch.autograd.grad(value, [scores, baseline], allow_unused=True)
        grads.append([torch.zeros_like(x) if g is None else g for g, x in zip(both, (scores, baseline))])
    case.close("bound", torch.stack(values), **CLOSE)
    for at, name in enumerate(("scores", "log_baseline")):
        if f"grad:{name}" not in case:
            continue
        scale = float(np.abs(case.arrays[f"grad:{name}"]).max())
        case.close(f"grad:{name}", torch.stack([g[at] for g in grads]), rtol=1e-4, atol=1e-4 * scale)


def mlp(case: Case) -> None:
    w = case.weights
    hidden, student = w["critic._s.0.weight"].shape
    out, teacher = w["critic._t.4.weight"].shape[0], w["critic._t.0.weight"].shape[1]
    critic = FirstTokenCritic(student, teacher, hidden, out)
    theirs = {"student": "critic._s.", "teacher": "critic._t.", "baseline": "baseline._t."}
    for name, prefix in theirs.items():
        case.load(critic.get_submodule(name), prefix)
    s, t = case.leaf("state_S"), case["state_T"]
    scores, baseline = critic(s, t, torch.ones(s.shape[:2]))
    case.close("scores", scores, **CLOSE)
    case.close("log_baseline", baseline, **CLOSE)
    loss = -mi_alpha_bound(scores, baseline, case.params["alpha"])
    case.close("loss", loss, **CLOSE)
    loss.backward()
    tensors = {
        prefix + n: p for name, prefix in theirs.items() for n, p in critic.get_submodule(name).named_parameters()
    }
    tensors["state_S"] = s
    for name in case.under("grad"):
        scale = float(np.abs(case.arrays[f"grad:{name}"]).max())
        case.close_grad(name, tensors[name], rtol=1e-4, atol=1e-4 * scale)


def mask_of(case: Case, shape: tuple[int, ...]) -> torch.Tensor:
    return case["mask"] if "mask" in case else torch.ones(shape)


def objectives(case: Case) -> None:
    shape = next(
        case[n].shape[:1] + case[n].shape[at : at + 1] for n, at in (("state_S", 1), ("att_S", 2)) if n in case
    )
    mask, t = mask_of(case, shape), case.params.get("temperature", 1.0)
    values = {
        "hidden_mse": (f.hidden_mse, "state"),
        "hidden_ce": (f.hidden_ce, "state"),
        "cos": (f.hidden_cosine, "state"),
        "pkd": (f.first_token_distance, "state"),
        "attention_mse": (f.attention_mse, "att"),
        "attention_ce": (f.attention_ce, "att"),
        "kd_ce": (lambda a, b, m: prediction_loss(a, b, "ce", t), "logits"),
        "kd_mse": (lambda a, b, m: prediction_loss(a, b, "mse", t), "logits"),
    }
    for name, (loss, of) in values.items():
        if name not in case:
            continue
        leaf = case[f"{of}_S"].clone().requires_grad_()
        value = loss(leaf, case[f"{of}_T"], mask)
        case.close(name, value, **CLOSE)
        if f"grad:{name}" in case:
            value.backward()
            scale = float(np.abs(case.arrays[f"grad:{name}"]).max())
            case.close_grad(name, leaf, rtol=1e-4, atol=1e-4 * scale)


def layer_mapping(case: Case) -> None:
    for i, combo in enumerate(case.params["combos"]):
        pairs = f.attention_pairs if combo["feature"] == "attention" else f.hidden_pairs
        found = pairs(combo["teacher_layers"], combo["student_layers"], combo["strategy"])
        case.close(f"pairs_{i}", np.array(found))


def emd(case: Case) -> None:
    student, teacher = case.leaf("hidden_S"), case["hidden_T"]
    mask = mask_of(case, tuple(student.shape[1:3]))
    mapped = []
    for i, states in enumerate(student):
        prefix = f"proj{i}."
        layer = nn.Linear(states.shape[-1], teacher.shape[-1])
        mapped.append(case.load(layer, prefix)(states) if f"w:{prefix}weight" in case else states)
    cost = torch.stack([torch.stack([f.hidden_mse(s, t, mask) for t in teacher[1:]]) for s in mapped[1:]])
    case.close("cost", cost, **CLOSE)
    case.close("flow", transport(cost), **CLOSE)
    loss, embedding = transport_loss(cost), f.hidden_mse(mapped[0], teacher[0], mask)
    case.close("emd_loss", loss, **CLOSE)
    case.close("embedding_loss", embedding, **CLOSE)
    total = case.params.get("weight", 1.0) * (loss + embedding)
    case.close("total", total, **CLOSE)
    if "grad:hidden_S" in case:
        total.backward()
        scale = float(np.abs(case.arrays["grad:hidden_S"]).max())
        case.close_grad("hidden_S", rtol=1e-4, atol=1e-4 * scale)


ADAPTERS = {
    "mi_alpha_bound": bound,
    "mi_loss_mlp": mlp,
    "objectives": objectives,
    "layer_mapping": layer_mapping,
    "emd": emd,
}
