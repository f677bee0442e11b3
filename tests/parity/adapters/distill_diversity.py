"""Clean samples along a trajectory, the hybrid sampler and sliders: the arrays of `distill_diversity`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case
from stillhouse.functional.diffusion import Denoise, Sampler, Schedule, guided, sample
from stillhouse.methods.generation.distill_diversity.adapters import LowRankAdapter, attached
from stillhouse.methods.generation.distill_diversity.hybrid import hybrid_sample, stop_index

SAMPLERS: dict[str, Any] = {"ddim": "ddim", "lcm": "lcm", "euler": "euler", "euler_a": "euler_ancestral"}
KINDS: dict[str, Any] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def _optional(case: Case, name: str) -> Tensor | None:
    return case[name] if name in case.arrays else None


def _start(case: Case, role: str, sampler: Sampler) -> Tensor:
    """The noise of the file, scaled as its sampler begins where that differs from ours by the spacing of steps."""
    noise, scale = case["start_noise"], _optional(case, f"init_noise_sigma_{role}")
    return noise if scale is None else noise * (float(scale) / float(sampler.start(torch.ones(()))))


def _network(case: Case, role: str, prompt: Tensor, negative: Tensor | None = None, guidance: float = 0) -> Denoise:
    w, u, time = (case[f"w:{role}{name}"] for name in ("W", "U", "w"))

    def of(words: Tensor) -> Denoise:
        def see(x: Tensor, t: Tensor) -> Tensor:
            mixed = torch.tanh(torch.einsum("oc,bchw->bohw", w, x))
            moment = (t.float() / 1000)[:, None] * time
            return mixed + (words.mean(1) @ u.T + moment)[:, :, None, None]

        return see

    if guidance <= 1 or negative is None:
        return of(prompt)
    conditional, unconditional = of(prompt), of(negative)
    return lambda x, t: guided(conditional(x, t), unconditional(x, t), guidance)


def _sampler(case: Case, name: str, steps: Tensor, sigmas: Tensor | None) -> Sampler:
    config = case.params["scheduler_config"]
    return Sampler(
        SAMPLERS[name],
        Schedule.preserving(case["alphas_cumprod"]),
        KINDS[config["prediction_type"]],
        [int(t) for t in steps],
        sigmas=None if sigmas is None else sigmas.tolist(),
        to_first=name == "ddim" and not config.get("set_alpha_to_one", False),
    )


def trajectory(case: Case) -> None:
    sigmas = _optional(case, "sigmas")
    sampler = _sampler(case, case.params["scheduler"], case["timesteps"], sigmas)
    atol = 1e-4 if sampler.scaled else 2e-5
    seen: list[Tensor] = []
    noise = (lambda i: case["step_noise"][i]) if "step_noise" in case else None
    denoise = _network(case, "", case["prompt"])
    final = sample(denoise, sampler, case["latents"][0], noise=noise, seen=lambda i, x0: seen.append(x0))
    case.close("dt", torch.stack(seen), atol=atol)
    case.close("final", final, atol=atol)


def _drawn(case: Case, name: str) -> Callable[[], Tensor] | None:
    if name not in case:
        return None
    draws = iter(case[name])
    return lambda: next(draws)


def hybrid(case: Case) -> None:
    p = case.params
    samplers = []
    for role in ("base", "distilled"):
        sigmas = _optional(case, f"{role}_sigmas")
        samplers.append(_sampler(case, p[f"{role}_scheduler"], case[f"{role}_timesteps"], sigmas))
    base, student = (
        _network(case, f"{role}.", case["prompt"], case["negative"], p[f"{role}_guidance"])
        for role in ("base", "distilled")
    )
    atol = 1e-4 if samplers[0].scaled else 5e-5
    begin = p["run_distilled_from"]
    assert stop_index(samplers[0].steps, samplers[1].steps, begin) == p["base_stop_index"]
    noise = _start(case, "base" if begin else "distilled", samplers[0 if begin else 1])
    found = hybrid_sample(base, student, samplers[0], samplers[1], noise, begin, fresh=_drawn(case, "step_noise"))
    case.close("switch_latents", found.switched, atol=atol)
    case.close("hybrid", found.x, atol=atol)
    case.close("dt_base", found.base_sees, atol=atol)
    case.close("dt_distilled", found.student_sees, atol=atol)
    alone = hybrid_sample(
        base,
        student,
        samplers[1],
        samplers[1],
        _start(case, "distilled", samplers[1]),
        0,
        fresh=_drawn(case, "step_noise_distilled_only"),
    )
    case.close("distilled_only", alone.x, atol=atol)
    case.close("dt_distilled_only", alone.student_sees, atol=atol)


def slider(case: Case) -> None:
    p = case.params

    def layer(role: str) -> nn.Module:
        weight = case[f"w:{role}.weight"]
        bias = f"w:{role}.bias" in case
        made: nn.Module
        if weight.ndim == 4:
            place = {"stride": p.get("stride", 1), "padding": p.get("padding", 0), "bias": bias}
            made = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), **place)
        else:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        return case.load(made, f"{role}.") if bias else _weighted(made, weight)

    def _weighted(made: nn.Module, weight: Tensor) -> nn.Module:
        made.load_state_dict({"weight": weight})
        return made

    for role in ("base", "distilled"):
        network = nn.Sequential(layer(role))
        adapter = LowRankAdapter(network[0], p["rank"], p["alpha"])
        adapter.load_state_dict({f"{name}.weight": case[f"w:{name}"] for name in ("down", "up")})
        for name, scale in (("scale0", 0.0), ("scale1", 1.0), ("scaled", float(p["slider_scale"]))):
            with attached(network, {"0": adapter}, scale):
                case.close(f"{role}_{name}", network(case["x"]))
        case.close(f"{role}_scale0", network(case["x"]))


ADAPTERS = {
    "dt_ddim": trajectory,
    "dt_euler": trajectory,
    "hybrid_lcm_same": hybrid,
    "hybrid_euler_trailing": hybrid,
    "slider": slider,
}
