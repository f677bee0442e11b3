"""The enhanced loss, and the whole objective with branches of maps and of tokens, against the arrays of `ofa_kd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.ce import cross_entropy
from stillhouse.objectives.ofa_kd import map_branch, ofa_loss, token_branch


def loss(case: Case) -> None:
    value = ofa_loss(case.leaf("s_logits"), case["t_logits"], case["labels"], **case.params)
    value.backward()
    case.close("loss", value)
    case.close_grad("s_logits")


def full(case: Case) -> None:
    p = case.params
    temperature, labels, t_logits = p["temperature"], case["labels"], case["t_logits"]
    eps = p["eps"] if len(p["eps"]) > 1 else p["eps"] * (len(p["stages"]) + 1)
    own, teacher = p["student_feature_dim"], p["teacher_feature_dim"]
    total_ofa = 0.0
    for stage, e in zip(p["stages"], eps):
        feature = case.leaf(f"feat_stage{stage}")
        if feature.ndim == 4:
            branch = map_branch(stage, feature.shape[1], max(own, teacher), p["num_classes"])
        else:
            branch = token_branch(stage, *feature.shape[1:], own, p["num_classes"], class_tokens=p["cls_tokens"])
        case.load(branch, f"{stage}.").train(p["mode"] == "train")
        logits = branch(feature)
        case.close(f"head_logits_stage{stage}", logits, rtol=1e-4)
        total_ofa = total_ofa + ofa_loss(logits, t_logits, labels, e, temperature)
    s_logits = case.leaf("s_logits")
    terms = {
        "loss_gt": p["gt_weight"] * cross_entropy(s_logits, labels),
        "loss_kd": p["kd_weight"] * ofa_loss(s_logits, t_logits, labels, eps[-1], temperature),
        "loss_ofa": p["ofa_weight"] * total_ofa,
    }
    for name, value in terms.items():
        case.close(name, value)
    total = sum(terms.values())
    case.close("total", total)
    total.backward()
    for name in ("s_logits", *(f"feat_stage{stage}" for stage in p["stages"])):
        case.close_grad(name, rtol=1e-4)


ADAPTERS = {"ofa_loss": loss, "full": full}
