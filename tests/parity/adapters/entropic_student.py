"""Entropic Student against the arrays of `entropic_student`: GDN, prior and tables, a training step of encoder and
decoder, the loss of stage 2."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.compression.entropic_student.layers import decoder, encoder, gdn1
from stillhouse.methods.compression.entropic_student.method import distortion
from stillhouse.methods.compression.entropic_student.network import LearnedCode
from stillhouse.methods.compression.entropic_student.prior import FactorisedPrior
from stillhouse.objectives.kd import kd_loss

OURS = {"_matrix": "matrices.", "_bias": "biases.", "_factor": "factors."}


def ours(name: str) -> str:
    """The name of one of the published prior's parameters in ours."""
    return next((new + name.removeprefix(old) for old, new in OURS.items() if name.startswith(old)), name)


def code_of(case: Case) -> LearnedCode:
    weights = {ours(name): value for name, value in case.under("eb").items()}
    code = LearnedCode(len(weights["quantiles"]))
    code.prior.load_state_dict(weights)
    return code


def close_prior_gradients(case: Case, prior: FactorisedPrior) -> None:
    for name in case.under("grad"):
        if name.startswith("_"):
            case.close_grad(name, prior.get_parameter(ours(name)), rtol=1e-4)


def close_lengths(case: Case, code: LearnedCode, latent: torch.Tensor, bits: torch.Tensor) -> None:
    """Our strings decode to the same symbols; another coder's lengths are near, as both are to the ideal."""
    code.settle(latent)
    coder, symbols = code.coder(), code.symbols(latent).detach().to(torch.int64).numpy()
    for sample, reference, ideal in zip(symbols, case["coded_bytes"].tolist(), (bits / 8).tolist()):
        string = coder.encode(sample)
        assert (coder.decode(string, sample.shape) == sample).all()
        assert abs(len(string) - reference) <= 12 + 0.05 * ideal
        assert len(string) <= 1.05 * ideal + 12


def gdn1_case(case: Case) -> None:
    p = case.params
    y = gdn1(case.leaf("x"), case.leaf("raw_beta"), case.leaf("raw_gamma"), p["inverse"], p.get("beta_min", 1e-6))
    y.backward(case["grad_output"])
    case.close("y", y, rtol=1e-4, atol=1e-5)
    for name in ("x", "raw_beta", "raw_gamma"):
        case.close_grad(name, rtol=1e-4)


def entropy_bottleneck(case: Case) -> None:
    code = code_of(case)
    x = case.leaf("x")
    noised = x + case["noise"]
    bits = code.bits(noised)
    bits.sum().backward()
    case.close("y_noise", noised)
    case.close("likelihood_noise", code.prior.likelihood(noised), rtol=1e-4, atol=1e-6)
    case.close("bits_noise", bits.sum(), rtol=1e-4)
    case.close_grad("x", rtol=1e-4)
    close_prior_gradients(case, code.prior)
    code.prior.zero_grad()
    quantised = code.values(code.symbols(x))
    case.close("y_hat", quantised)
    case.close("likelihood_hat", code.prior.likelihood(quantised), rtol=1e-4, atol=1e-6)
    case.close("bits_hat", code.bits(quantised).sum(), rtol=1e-4)
    auxiliary = code.prior.auxiliary_loss()
    auxiliary.backward()
    case.close("aux_loss", auxiliary, rtol=1e-4)
    case.close_grad("quantiles", code.prior.quantiles, array="grad:quantiles_aux", rtol=1e-4)
    tables = code.prior.tables()
    case.close("quantized_cdf", torch.from_numpy(tables.cumulative))
    case.close("cdf_length", torch.from_numpy(tables.lengths))
    case.close("offset", torch.from_numpy(tables.offsets))
    close_lengths(case, code, x, code.bits(quantised))


def layer(case: Case) -> None:
    p, weights = case.params, case.weights
    front = case.load(encoder(case["x"].shape[1], p["enc_channels"]), "encoder.")
    back = case.load(decoder(p["enc_channels"], weights["decoder.4.weight"].shape[0]), "decoder.")
    code = code_of(case)
    latent = front(case["x"])
    latent.retain_grad()
    noised = latent + case["noise"]
    output, bits = back(noised), code.bits(noised).sum()
    loss = distortion(output, case["target"]) + p["beta"] * bits
    loss.backward()
    for name, value in {
        "latent": latent,
        "y": noised,
        "likelihood": code.prior.likelihood(noised),
        "output": output,
        "distortion": distortion(output, case["target"]),
        "bits": bits,
        "loss": loss,
    }.items():
        case.close(name, value, rtol=1e-4, atol=1e-5)
    case.close_grad("latent", latent, rtol=1e-4)
    for name in case.under("grad"):
        if name != "latent":
            part, _, inner = name.partition(".")
            case.close_grad(name, {"encoder": front, "decoder": back}[part].get_parameter(inner), rtol=1e-4)
    quantised = code.values(code.symbols(latent))
    case.close("eval_output", back(quantised), rtol=1e-4, atol=1e-5)
    close_lengths(case, code, latent, code.bits(quantised))


def stage2_kd(case: Case) -> None:
    p, student = case.params, case.leaf("student_logits")
    ce = F.cross_entropy(student, case["labels"])
    kd = kd_loss(student, case["teacher_logits"], p["temperature"])
    loss = p["alpha"] * ce + (1 - p["alpha"]) * kd
    loss.backward()
    case.close("ce", ce)
    case.close("kl", kd / p["temperature"] ** 2)
    case.close("loss", loss)
    case.close_grad("student_logits")


ADAPTERS = {
    "gdn1": gdn1_case,
    "entropy_bottleneck": entropy_bottleneck,
    "layer": layer,
    "stage2_kd": stage2_kd,
}
