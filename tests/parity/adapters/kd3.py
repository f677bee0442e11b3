"""KD^3's parts against the arrays of `kd3`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.classification.kd3.alignment import (
    aligned,
    contrast,
    disagreement_weights,
    mix_distribution,
    select,
    share_map,
    teacher_share,
    transfer_block,
)


def mixed(case: Case) -> None:
    case.close("out", mix_distribution(case["x"], case["lam"], case["perm"], case.params["eps"]))


def feature_align(case: Case) -> None:
    p = case.params
    channels = case["feat_t"].shape[1]
    transfer = transfer_block(case["feat_s"].shape[1], channels, p["factor"]).to(case["feat_s"].dtype)
    given = {k.removeprefix("transfer."): v for k, v in case.weights.items() if k.startswith("transfer.")}
    missing = transfer.load_state_dict(given, strict=False)
    assert not missing.unexpected_keys and all(
        "num_batches" in k or not p["train"] or "running" in k for k in missing.missing_keys
    )
    transfer.train(p["train"])
    assert all(m.eps == p["bn_eps"] for m in transfer if isinstance(m, nn.BatchNorm2d))
    student, teacher = share_map(case.leaf("feat_s"), case["feat_t"], transfer)
    logits = F.linear(student.mean((2, 3)), case["w:cls.weight"], case["w:cls.bias"])
    distance, weights = disagreement_weights(logits, case["logit_t"], p["pairwise_eps"])
    value = aligned(student, teacher, weights)
    value.backward()
    case.close("out:trans_feat_s", student)
    case.close("out:trans_feat_t", teacher)
    case.close("out:logit_s", logits)
    case.close("out:dist", distance)
    case.close("out:weights", weights)
    case.close("out:loss_feat", value)
    case.close_grad("feat_s", rtol=1e-4)


def contrastive(case: Case) -> None:
    embed = case.load(nn.Linear(case["feat"].shape[1], case["w:linear.weight"].shape[0]), prefix="linear.")
    first, second = (F.normalize(embed(case.leaf(name)), dim=1) for name in ("feat", "feat_aug"))
    value = contrast(first, second, case.params["tau"])
    value.backward()
    case.close("out:emb", first)
    case.close("out:emb_aug", second)
    case.close("out:loss", value)
    case.close_grad("feat", rtol=1e-4)
    case.close_grad("feat_aug", rtol=1e-4)


def selection(case: Case) -> None:
    chosen, _, _ = select(case["logit_t"], case["logit_s"], case.params["alpha"], case.params["p_cutoff"])
    case.close("out:selected", chosen.nonzero()[:, 0])


def schedule(case: Case) -> None:
    p = case.params
    values = [teacher_share(e, p["max_epoch"], p["c"], p["denom"]) for e in case["epoch"].tolist()]
    case.close("out:alpha", torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)


ADAPTERS = {
    "mixdistribution": mixed,
    "feature_align": feature_align,
    "contrastive": contrastive,
    "selection": selection,
    "alpha_schedule": schedule,
}
