"""The relations of queries, keys and values, and their divergence, against the arrays of `hybrid_distill`."""

from __future__ import annotations

import torch
from torch import nn

from parity.case import Case
from stillhouse.functional.relations import relation_heads, relation_kl, relation_scores
from stillhouse.methods.pretraining.hybrid_distill.losses import relations_loss

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def relation(case: Case) -> None:
    heads, parts = case.params["heads"], {}
    for role in ("teacher", "student"):
        x = case.leaf("student_x") if role == "student" else case["teacher_x"]
        width = x.shape[-1]
        qkv = case.load(nn.Linear(width, case[f"w:{role}.qkv.weight"].shape[0]), f"{role}.qkv.")(x)
        q, k, v = (relation_heads(part, heads) for part in qkv.chunk(3, -1))
        case.close(f"{role}_qk", relation_scores(q, k).softmax(-1), **CLOSE)
        case.close(f"{role}_vv", relation_scores(v, v).softmax(-1), **CLOSE)
        parts[role] = qkv, q, k, v
    (mine, q, k, v), (theirs, *other) = parts["student"], parts["teacher"]
    qk, vv = relation_kl((q, k), (other[0], other[1])), relation_kl((v, v), (other[2], other[2]))
    case.close("loss_qk", qk, **CLOSE)
    case.close("loss_vv", vv, **CLOSE)
    (qk + vv).backward()
    case.close_grad("student_x", rtol=1e-4, atol=1e-6)
    every = torch.arange(mine.shape[1] - 1).expand(len(mine), -1)
    terms = relations_loss(mine.detach(), theirs, every, heads)
    case.close("loss_qk", terms["qk"], **CLOSE)


ADAPTERS = {"relation_kl": relation}
