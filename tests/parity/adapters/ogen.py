"""The released training step, joint and in its warm-up: the arrays of `ogen`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.image_text.ogen import Classes, Generator, make_up, noisy_values, reconstruction, score_losses


def step(case: Case) -> None:
    p, weights, labels = case.params, case.weights, case["labels"].long()
    dim = case["image_feat_raw"].shape[1]
    generator = Generator(dim, p["heads"], p.get("mha_dropout", 0.0))
    names = {"in_proj_weight": "in_proj_weight", "in_proj_bias": "in_proj_bias"}
    names |= {f"out_proj_{k}": f"out_proj.{k}" for k in ("weight", "bias")}
    generator.attention.load_state_dict({new: weights[old] for old, new in names.items()})
    generator.ffn.load_state_dict({f"{2 * i}.{k}": weights[f"ffn{i}_{k}"] for i in (0, 1) for k in ("weight", "bias")})
    base_raw, new_raw = case.leaf("text_base_raw"), case.leaf("text_new_raw")
    base, new = F.normalize(base_raw, dim=-1), F.normalize(new_raw, dim=-1)
    features = F.normalize(case["image_feat_raw"], dim=-1)
    classes = Classes(case["features_mean_base"], case["features_std_base"], case["closest_classes_base"].long())
    values = noisy_values(classes, labels, case["noise_uniform"])
    made = make_up(generator, features, labels, base, new, classes, values, p["k"])
    scale = torch.tensor(p["logit_scale_exp"])
    loss = reconstruction(made, features, p.get("mse_factor", 512.0))
    if p["epoch"] >= 0.2 * p["max_epoch"]:
        loss = loss + sum(score_losses(made, features, labels, base, new, scale, p["k"]).values())
    else:
        loss = loss + 0 * (base_raw.sum() + new_raw.sum())
    loss.backward()
    assert made.new is not None
    values_by_name = {
        "loss": loss,
        "out_logits": scale * features @ base.T,
        "out_logits_base_unknown": scale * made.unknown @ base.T,
        "out_label_base_unknown": labels,
        "out_logits_base_known": scale * made.known @ base.T,
        "out_label_base_known": made.known_label,
        "out_logits_new": scale * made.new @ new.T,
        "out_label_new": made.new_label,
        "out_i_base_unknown_pred": made.unknown,
        "out_i_base_unknown": features,
        "out_i_base_known_pred": made.known,
        "out_i_base_known": made.known_target,
    }
    for name, value in values_by_name.items():
        if name in case:
            case.close(name, value, rtol=1e-4, atol=1e-5 if "logits" not in name else 1e-4)
    grads = {"text_base_raw": base_raw, "text_new_raw": new_raw, "in_proj_weight": generator.attention.in_proj_weight}
    grads |= {f"ffn{i}_{k}": generator.ffn[2 * i].get_parameter(k) for i in (0, 1) for k in ("weight", "bias")}
    for name, tensor in grads.items():
        if f"grad:{name}" in case:
            case.close_grad(name, tensor, rtol=1e-4)


ADAPTERS = {"joint_training_step": step, "warmup_generator_only": step}
