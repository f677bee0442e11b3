"""Sparse attention, its masks and order, and an iteration of trajectory distribution matching: the arrays of
`video_blade`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.case import Case
from stillhouse.functional.diffusion import Clean, Schedule, clean, guided
from stillhouse.generation.trajectory import (
    Times,
    fake_terms,
    roll_out,
    student_loss,
    student_step,
)
from stillhouse.methods.generation.video_blade.attention import (
    Sparsity,
    adaptive_attention,
    block_mask,
    block_scores,
    gathered_attention,
    kept_counts,
    masked_attention,
    sampled_positions,
    window_attention,
)
from stillhouse.methods.generation.video_blade.order import hilbert_order


def _sparsity(params: dict[str, Any]) -> Sparsity:
    return Sparsity(
        block=params.get("block_size", 1),
        sampled=params.get("num_keep", 1),
        least=params["min_retain_ratio"],
        most=params["max_retain_ratio"],
        energy=params["energy_threshold"],
        window=params.get("sample_gap", 0),
        kept_at_end=params.get("text_blocks", 0),
    )


def asa(case: Case) -> None:
    sparsity = _sparsity(case.params)
    q, k, v = (case.leaf(name) for name in "qkv")
    positions = [sampled_positions(case[name], sparsity.sampled) for name in ("rand_q", "rand_k")]
    scores = block_scores(q, k, positions[0], positions[1], sparsity.block)
    case.close("P", scores)
    mask = block_mask(scores, sparsity)
    case.close("mask", mask)
    for attention in (masked_attention, gathered_attention):
        kept = attention(q, k, v, mask, sparsity.block)
        case.close("out_sparse", kept.out, atol=5e-6)
        case.close("lse_sparse", kept.lse, atol=5e-6)
    means = window_attention(q, k, v, sparsity.window)
    case.close("out_global", means.out, atol=5e-6)
    case.close("lse_global", means.lse, atol=5e-6)
    case.close("sparsity", 1 - mask.float().mean() - 1 / sparsity.window)
    for gather in (False, True):
        for leaf in (q, k, v):
            leaf.grad = None
        out = adaptive_attention(q, k, v, mask, sparsity, gather)
        case.close("out", out, atol=5e-6)
        if "cotangent" in case:
            out.backward(case["cotangent"], retain_graph=True)
            for name in "qkv":
                case.close_grad(name)


def mask(case: Case) -> None:
    sparsity = _sparsity(case.params)
    case.close("mask", block_mask(case["P"], sparsity))
    if not sparsity.kept_at_end:
        case.close("kept", kept_counts(case["P"], sparsity))


def gilbert(case: Case) -> None:
    p = case.params
    order, inverse = hilbert_order(p["width"], p["height"], p["depth"])
    text = p.get("text_length", 0)
    if text:  # which stands before the clip, and is moved behind it
        order = torch.cat([order + text, torch.arange(text)])
        inverse = order.argsort()
    case.close("order", order)
    case.close("inverse", inverse)
    if "x" in case:
        case.close("y", case["x"].index_select(2, order))


def tdm(case: Case) -> None:
    p = case.params
    bar = case["alphas_cumprod"]
    schedule = Schedule(bar.sqrt().float(), (1 - bar).sqrt().float())

    def network(role: str, prompt: Tensor) -> Any:
        w = {name: case.leaf(f"w:{role}.{name}") for name in ("W", "U", "w")}

        def see(x: Tensor, t: Tensor) -> Clean:
            mixed = torch.tanh(torch.einsum("oc,bfc...->bfo...", w["W"], x))
            words = (prompt.mean(1) @ w["U"].T)[:, None, :, None, None]
            time = (t / p["total_steps"]).float()[:, None, None, None, None] * w["w"][None, None, :, None, None]
            return clean(p["prediction"], mixed + words + time, x, *schedule.at(t, x))

        return see

    student, fake, real = (network(role, case["prompt"]) for role in ("student", "fake", "real"))
    nothing = network("real", case["uncond_prompt"])
    states = roll_out(student, schedule, case["start_noise"], case["rollout_eps"], p["K"], p["eta"])
    case.close("rollout_noisy", states.flip(0), atol=1e-5)

    def reach(stage: str) -> tuple[Times, Any]:
        times = Times(*(case[f"{stage}_{name}"] for name in ("index", "t_gen", "t_mid", "t")))
        draws = case[f"{stage}_eps_mix"], case[f"{stage}_eps_forward"]
        reached = student_step(student, schedule, states, times, *draws, p["eta"])
        for name, value in zip(("x0_student", "x_mid", "x_t"), reached):
            case.close(f"{stage}_{name}", value, atol=1e-5)
        return times, reached

    with torch.no_grad():
        times, reached = reach("fake")
        unguided = real(reached.noisy, times.noisy).x0
    seen = fake(reached.noisy, times.noisy)
    case.close("fake_pred", seen.x0, atol=1e-5)
    first, second = (x.mean() for x in fake_terms(seen, reached, schedule, times.noisy, unguided))
    case.close("fake_loss", first)
    case.close("fake_reg", second)
    (first + p["lambda_reg"] * second).backward()
    for name in ("W", "U", "w"):
        case.close_grad(f"fake.{name}", case[f"w:fake.{name}"])
        assert case[f"w:student.{name}"].grad is None and case[f"w:real.{name}"].grad is None
    times, reached = reach("gen")
    with torch.no_grad():
        theirs = guided(real(reached.noisy, times.noisy).x0, nothing(reached.noisy, times.noisy).x0, p["cfg"])
        known = fake(reached.noisy, times.noisy).x0
    case.close("gen_real", theirs, atol=1e-5)
    case.close("gen_fake", known, atol=1e-5)
    loss, target, divisor = student_loss(reached.x0, theirs, known, p["huber_c"], p["weight_clip"])
    case.close("gen_loss", loss)
    case.close("gen_target", target, atol=1e-5)
    case.close("gen_weight", divisor)
    loss.backward()
    for name in ("W", "U", "w"):
        case.close_grad(f"student.{name}", case[f"w:student.{name}"], rtol=1e-4)


ADAPTERS = {"asa": asa, "mask": mask, "gilbert": gilbert, "tdm_cog": tdm}
