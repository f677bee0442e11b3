"""LightGen: its diffusion head, the whole generator without dropout, and what a sampler counts: the arrays of
`lightgen`."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.case import Case
from stillhouse.methods.generation.lightgen.head import DiffusionHead, head_betas, recorded, respaced
from stillhouse.methods.generation.lightgen.network import (
    Draws,
    MaskedGenerator,
    NetworkSpec,
    SamplingSpec,
    guidance_at,
    mask_of,
    masked_count,
    patchify,
    remaining,
)

HEAD = (
    ("time_embed.mlp", "time"),
    ("cond_embed", "condition"),
    ("input_proj", "enter"),
    ("res_blocks", "blocks"),
    ("in_ln", "norm"),
    ("adaLN_modulation.1", "modulation"),
    ("final_layer.modulation", "modulation"),
    ("final_layer.linear", "leave"),
)
GENERATOR = (
    ("diffloss.net.", "head."),
    ("text_emb.text_proj.linear_", "text.linear"),
    ("text_emb.text_aligner_norm", "text.norm"),
    ("text_emb.text_aligner", "text.blocks"),
    ("fake_latent", "no_text"),
    ("z_proj_ln", "enter_norm"),
    ("z_proj", "enter"),
    ("encoder_pos_embed_learned", "encoder_positions"),
    ("decoder_pos_embed_learned", "decoder_positions"),
    ("last_pos_embed_learned", "cross_positions"),
    ("last_embed", "cross_embed"),
    ("cross_attn_blocks", "cross_blocks"),
)
CROSS = (
    ("normq", "norm_query"),
    ("normkv", "norm_text"),
    ("norm2", "norm"),
    ("attn.query_linear", "attention.query"),
    ("attn.", "attention."),
    ("mlp.", ""),
)


def renamed(name: str) -> str:
    """Our name of one of the authors' weights."""
    pairs = (*GENERATOR, *(HEAD if "diffloss" in name else ()), *(CROSS if "cross_attn" in name else ()))
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name


def head_name(name: str) -> str:
    for theirs, ours in HEAD:
        name = name.replace(theirs, ours)
    return name


def diffloss(case: Case) -> None:
    p = case.params
    schedule, steps = p.get("schedule", "cosine"), p["diffusion_steps"]
    head = DiffusionHead(p["channels"], p["z_channels"], p["width"], p["depth"], steps, schedule).eval()
    head.load_state_dict({head_name(k): v for k, v in case.weights.items()})
    betas = head_betas(schedule, steps)
    case.close("betas", betas)
    case.close("alphas_cumprod", (1 - betas).cumprod(0))
    z, t, noise = case.leaf("z"), case["t"], case["noise"]
    terms = head.terms(case["x"], z, t, noise)
    for name, value in {"x_t": terms.noisy, "net_out": terms.output, "mse": terms.mse, "eps_pred": terms.eps}.items():
        case.close(name, value)
    case.close("vb", terms.vb, rtol=1e-4)
    case.close("loss_each", terms.mse + terms.vb, rtol=1e-4)
    loss = head.loss(case["x"], z, case["mask"], t, noise)
    case.close("loss", loss, rtol=1e-4)
    loss.backward()
    case.close_grad("z", rtol=1e-4)
    count, temperature = p["sampling_steps"], p["temperature"]
    case.close("sample_timesteps", torch.tensor(respaced(betas, count)[0]))
    for name, guidance in (("plain", 1.0), ("cfg", p["cfg"])):
        if f"init_{name}" in case:
            draws = recorded(list(case[f"steps_{name}"]))
            found = head.sample(z.detach(), case[f"init_{name}"], draws, count, temperature, guidance)
            case.close(f"sample_{name}", found, rtol=1e-4, atol=1e-5)


def fluid_tiny(case: Case) -> None:
    p, latents, text = case.params, case["latents"], case["text"]
    weights = {renamed(k): v for k, v in case.weights.items()}

    def depth(prefix: str) -> int:
        return len({k.split(".")[prefix.count(".")] for k in weights if k.startswith(prefix)})

    spec = NetworkSpec(
        patch=p["patch"],
        width=p["dim"],
        encoder=depth("encoder_blocks."),
        decoder=depth("decoder_blocks."),
        cross=depth("cross_blocks."),
        text=depth("text.blocks."),
        heads=p["heads"],
        mlp_ratio=p["mlp_ratio"],
        head_width=weights["head.enter.weight"].shape[0],
        head_depth=depth("head.blocks."),
        repeat=p["diffusion_batch_mul"],
    )
    generator = MaskedGenerator(spec, p["vae_channels"], p["latent"], text.shape[-1]).eval()
    generator.load_state_dict(weights)
    length = generator.length
    masked = masked_count(length, p["mask_ratio"])
    mask = mask_of(case["orders"], masked)
    case.close("mask", mask)
    tokens = patchify(latents, spec.patch)
    case.close("target_tokens", tokens)
    condition = generator.condition(text)
    case.close("z", generator.vectors(tokens, mask, condition, masked), rtol=1e-4, atol=1e-5)
    loss = generator.loss(latents, condition, Draws(mask, case["timesteps"], case["noise"]), masked)
    case.close("loss", loss, rtol=1e-4)
    loss.backward()
    named: dict[str, Tensor] = dict(generator.named_parameters())
    for name in case.under("grad"):
        case.close_grad(name, named[renamed(name)], rtol=1e-4, atol=1e-6)
    sampling = SamplingSpec(iterations=p["sampler_num_iter"], guidance=p["sampler_cfg"], schedule="linear")
    left, counts = length, []
    for iteration in range(sampling.iterations):
        left = remaining(length, iteration, sampling.iterations, left)
        counts.append(left)
    case.close("sampler_mask_len", torch.tensor(counts).double())
    case.close("sampler_cfg_linear", torch.tensor([guidance_at(sampling, length, n) for n in counts]).double())


ADAPTERS = {"diffloss": diffloss, "fluid_tiny": fluid_tiny}
