"""Mimicry of tokens, preference with the teacher as reference, and the gate of two experts: the arrays of
`llava_mod`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.image_text.llava_mod import answer_log_probs, distilled_places, mimic_loss, preference_loss
from stillhouse.nn.experts import capacity_of, mixed, top2

RTOL, ATOL = 1e-4, 1e-5
IGNORED = -100


def _shifted(labels: Tensor) -> Tensor:
    """Labels as they stand where their predictions stand."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def mimic(case: Case) -> None:
    p = case.params
    student, teacher = case.leaf("student_logits"), case["teacher_logits"]
    labels = case["labels"].masked_fill(case["labels"] == p.get("pad", IGNORED), IGNORED)
    label = _shifted(labels)
    counts = distilled_places(label, shift=False, everything=p.get("distill_all_tokens", False))
    if not p.get("distill_all_tokens", False):
        counts = counts.clone()
        counts[:, 0] = labels[:, 0] != IGNORED  # the first place, whose own token no prediction gives
    align = mimic_loss(student, teacher, counts)
    ce = F.cross_entropy(student.flatten(0, 1), label.flatten(), ignore_index=IGNORED)
    total = align if p["loss_type"] == "only_kd" else align + ce if p["loss_type"] == "kd_lm" else ce
    if p["loss_type"] != "only_kd":
        total = total + 2 * (p.get("moe_loss") or 0.0)
    total.backward()
    case.close("align_loss", align, rtol=RTOL, atol=ATOL)
    case.close("lm_ce", ce, rtol=RTOL, atol=ATOL)
    case.close("total", total, rtol=RTOL, atol=ATOL)
    case.close_grad("student_logits", rtol=RTOL, atol=ATOL)


def preference(case: Case) -> None:
    p = case.params
    found = {}
    for owner in ("policy", "ref"):
        for side in ("chosen", "rejected"):
            name = f"{owner}_{side}_logits"
            logits = case.leaf(name) if owner == "policy" else case[name]
            found[owner, side] = answer_log_probs(logits, _shifted(case[f"{side}_labels"]))
            case.close(f"{owner}_{side}_logp", found[owner, side], rtol=RTOL, atol=ATOL)
    kind = "kto_pair" if p["loss_type"] == "kto_pair" else "dpo"
    right, wrong = found["policy", "chosen"], found["policy", "rejected"]
    their_right, their_wrong = found["ref", "chosen"], found["ref", "rejected"]
    loss = preference_loss(right, wrong, their_right, their_wrong, kind, p["beta"], p.get("label_smoothing", 0.0))
    total = loss + (p.get("moe_loss_chosen") or 0.0) + (p.get("moe_loss_rejected") or 0.0)
    total.backward()
    gain, other = p["beta"] * (right - their_right), p["beta"] * (wrong - their_wrong)
    case.close("reward_loss", loss, rtol=RTOL, atol=ATOL)
    case.close("total", total, rtol=RTOL, atol=ATOL)
    case.close("reward_chosen", gain.mean(), rtol=RTOL, atol=ATOL)
    case.close("reward_rejected", other.mean(), rtol=RTOL, atol=ATOL)
    case.close("reward_accuracy", (gain > other).float().mean(), rtol=RTOL, atol=ATOL)
    for side in ("chosen", "rejected"):
        case.close_grad(f"policy_{side}_logits", rtol=RTOL, atol=ATOL)


class _Expert(nn.Module):
    """A SwiGLU layer of given matrices."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def moe_top2(case: Case) -> None:
    p = case.params
    x = case["x"]
    logits = case.leaf("router_logits") if "router_logits" in case else F.linear(x, case["router_weight"])
    capacity = capacity_of(len(x), p["num_experts"], p["capacity_factor"], p.get("min_capacity", 0))
    assert capacity == p.get("capacity", capacity)
    noisy = p.get("second_expert_sampling", True) and "gumbel" in case
    routing = top2(logits, capacity, case["gumbel"] if noisy else None)
    case.close("l_aux", routing.balance, rtol=RTOL, atol=ATOL)
    case.close("gate_weight_per_expert", routing.weights, rtol=RTOL, atol=ATOL)
    case.close("dispatched", routing.chosen)
    case.close("expert_counts", routing.counts)
    if "expert_gate" not in case:
        return
    experts: list[nn.Module] = [
        _Expert(*each) for each in zip(case["expert_gate"], case["expert_up"], case["expert_down"])
    ]
    out = mixed(x, routing, capacity, experts)
    case.close("moe_out", out, rtol=RTOL, atol=ATOL)
    if "cotangent" in case and logits.requires_grad:
        ((out * case["cotangent"]).sum() + routing.balance).backward()
        case.close_grad("router_logits", rtol=RTOL, atol=ATOL)


ADAPTERS = {"mimic": mimic, "preference": preference, "moe_top2": moe_top2}
