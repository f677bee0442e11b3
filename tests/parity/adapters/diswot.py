"""DisWOT's metrics against the arrays of `diswot`, and its space S1 against the published table."""

from __future__ import annotations

import pytest
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.classification.diswot.search import Space, SpaceSpec, kendall_tau
from stillhouse.methods.classification.diswot.similarity import (
    channel_distance,
    relation_distance,
    semantic_distance,
    semantic_gradient,
)


def similarity(case: Case) -> None:
    relation = relation_distance(case.leaf("s_feat"), case["t_feat"])
    relation.backward()
    case.close("sp_distance", relation)
    case.close_grad("s_feat", rtol=1e-4)
    gradients = []
    for side in ("s", "t"):
        pooled = case[f"{side}_pooled"]
        gradients.append(semantic_gradient(pooled, F.linear(pooled, case[f"{side}_fc_weight"]), case["labels"]))
        case.close(f"{side}_fc_grad", gradients[-1])
    semantic = semantic_distance(*gradients)
    case.close("icc_distance", semantic)
    case.close("score_relation", -relation)
    case.close("score_semantic", -semantic)
    case.close("score", -relation - semantic)
    channels = channel_distance(case.leaf("map_s"), case["map_t"])
    channels.backward()
    case.close("icc_map_distance", channels)
    case.close_grad("map_s", rtol=1e-4)


def s1_reference_accuracies(case: Case) -> None:
    space = Space(SpaceSpec())
    ours = {tuple(space.model(e).options["depths"]) for e in space}
    assert ours == {tuple(d) for d in case["depths"].tolist()}
    assert kendall_tau(case["acc_kd"], case["acc_vanilla"]) == pytest.approx(0.836, abs=5e-4)


ADAPTERS = {"similarity": similarity, "s1_reference_accuracies": s1_reference_accuracies}
