"""A step of pre-training, contrast by ids with a queue, and masked words under soft targets: the arrays of `albef`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.image_text.albef.losses import (
    MaskedWords,
    masked_word_loss,
    matching_loss,
)
from stillhouse.methods.image_text.albef.training import FusionTraining, Negatives, Terms
from stillhouse.models.fusion import FusedEncoders, renamed_from_bert

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def ours(state: dict[str, Tensor], layers: int, suffix: str = "") -> dict[str, Tensor]:
    """The released names of one of the two networks, in ours."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == f"visual_encoder{suffix}":
            out[f"visual_encoder.{rest}"] = value
        elif part in (f"vision_proj{suffix}", f"text_proj{suffix}"):
            out[f"{'visual' if part.startswith('vision') else 'text'}_projection.{rest}"] = value
    text = f"text_encoder{suffix}."
    out |= renamed_from_bert({k.removeprefix(text): v for k, v in state.items() if k.startswith(text)}, layers)
    return out


def network(case: Case, suffix: str = "") -> FusedEncoders:
    p, weights = case.params, case.weights
    hidden = [len(weights[k]) for k in ("visual_encoder.blocks.0.mlp.fc1.bias",)]
    hidden.append(len(weights["text_encoder.bert.encoder.layer.0.intermediate.dense.bias"]))
    vision = {"width": p["d"], "layers": p["vd"], "heads": p["h"], "patch": p["ps"], "hidden": hidden[0]}
    layers = p["fl"]
    deep = len({k.split(".")[4] for k in weights if k.startswith("text_encoder.bert.encoder.layer.")})
    text = {"width": p["d"], "layers": layers, "heads": p["h"], "hidden": hidden[1], "fusion": deep - layers}
    channels = case["images"].shape[1]
    context = len(weights["text_encoder.bert.embeddings.position_embeddings.weight"])
    shape = (channels, p["img"], p["img"])
    net = FusedEncoders(vision, text, p["e"], p["V"], context, p["temp"], 0.0, False, input_shape=shape)
    missing = net.load_state_dict(ours(weights, layers, suffix), strict=False)
    assert {k.partition(".")[0] for k in missing.missing_keys} <= {"match_head", "temperature"}, missing
    assert not missing.unexpected_keys, missing
    with torch.no_grad():
        net.temperature.copy_(weights.get("temp", torch.tensor(p["temp"])))
        net.match_head.load_state_dict({k: weights[f"itm_head.{k}"] for k in ("weight", "bias")})
    return net


def queued(module: FusionTraining, arrays: dict[str, Tensor]) -> None:
    for name in ("image_queue", "text_queue"):
        getattr(module, name).copy_(arrays[name].T)
    if "idx_queue" in arrays:
        module.id_queue.copy_(arrays["idx_queue"].flatten())
    if "queue_ptr" in arrays:
        module.pointer.copy_(arrays["queue_ptr"].flatten()[0])


def queues_after(module: FusionTraining, case: Case) -> None:
    for name in ("image_queue", "text_queue"):
        case.close(f"{name}_after", getattr(module, name).T, **CLOSE)
    case.close("idx_queue_after", module.id_queue[None])
    case.close("queue_ptr_after", module.pointer[None])


def pretrain_step(case: Case) -> None:
    p = case.params
    net, alpha = network(case), p["alpha"]
    module = FusionTraining(net, Terms(mask_share=1.0), p["Q"], p["m"])
    module.average.load_state_dict(network(case, "_m").state_dict())
    queued(module, case.weights)
    module.follow()
    images, ids, inside = case["images"], case["input_ids"], case["attention_mask"]
    seen, read = net.image_tokens(images), net.text_tokens(ids, inside)
    theirs = module.their_image_tokens(images)
    label = torch.arange(len(images))
    found = module.contrasted(seen, read, theirs, ids, inside, label, alpha)
    case.close("sim_i2t", found.image_to_text, **CLOSE)
    case.close("sim_t2i", found.text_to_image, **CLOSE)
    for name, value in zip(("weights_t2i", "weights_i2t"), module.weights(found, module.apart(label))):
        case.close(name, value, **CLOSE)
    there = torch.ones(len(images))
    negatives = Negatives(case["neg_image_for_text"], case["neg_text_for_image"], there)
    fused = module.read_pairs(seen, read, inside, negatives)
    case.close("itm_embeddings", fused[:, 0], **CLOSE)
    case.close("itm_logits", net.match(fused), **CLOSE)
    matching = module.matched(seen, read, inside, negatives)
    words = module.masked(seen, theirs, inside, MaskedWords(case["mlm_input_ids"], case["mlm_labels"]), alpha)
    for name, value in (("loss_ita", found.loss), ("loss_itm", matching), ("loss_mlm", words)):
        case.close(name, value, **CLOSE)
    queues_after(module, case)
    average = module.average
    for name, value in (
        ("vision_proj_m.weight", average.visual_projection.weight),
        ("vision_proj_m.bias", average.visual_projection.bias),
        ("text_proj_m.weight", average.text_projection.weight),
        ("text_proj_m.bias", average.text_projection.bias),
        ("visual_encoder_m.cls_token", average.visual_encoder.cls_token),
    ):
        case.close(f"after:{name}", value, **CLOSE)
    (found.loss + matching + words).backward()
    for name, parameter in (
        ("vision_proj.weight", net.visual_projection.weight),
        ("text_proj.weight", net.text_projection.weight),
        ("itm_head.weight", net.match_head.weight),
        ("temp", net.temperature),
        ("text_encoder.cls.predictions.bias", net.word_head.bias),
    ):
        case.close_grad(name, parameter, rtol=1e-4, atol=1e-5)


class Projections(FusedEncoders):
    """A network without encoders: its tokens are what it is given."""

    def __init__(self, case: Case, suffix: str) -> None:
        nn.Module.__init__(self)
        for name, released in (("visual_projection", "vision_proj"), ("text_projection", "text_proj")):
            weight = case.weights[f"{released}{suffix}.weight"]
            layer = nn.Linear(weight.shape[1], len(weight))
            layer.load_state_dict({k: case.weights[f"{released}{suffix}.{k}"] for k in ("weight", "bias")})
            setattr(self, name, layer)
        self.temperature = nn.Parameter(torch.tensor(case.params["temp"]))
        self.match_head = nn.Linear(1, 2)

    def text_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids


def itc_mod_retrieval(case: Case) -> None:
    p = case.params
    net, average = Projections(case, ""), Projections(case, "_m")
    module = FusionTraining(net, Terms(targets="ids"), p["queue_size"])
    module.average = average.requires_grad_(False)
    queued(module, {k: case[k] for k in ("image_queue", "text_queue", "idx_queue") if k in case})
    tokens = [case[f"{n}_cls{m}"][:, None] for m in ("", "_m") for n in ("image", "text")]
    for tensor, name in zip(tokens, ("image_feat", "text_feat", "image_feat_m", "text_feat_m")):
        used = average if name.endswith("_m") else net
        project = used.visual_projection if name.startswith("image") else used.text_projection
        case.close(name, F.normalize(project(tensor[:, 0]), dim=-1), **CLOSE)
    alpha = p["alpha"] if p.get("distill", True) else 0.0
    found = module.contrasted(tokens[0], tokens[1], tokens[2], tokens[3], tokens[3], case["idx"].flatten(), alpha)
    found.loss.backward()
    case.close("loss_ita", found.loss, **CLOSE)
    allowed = module.apart(case["idx"].flatten())
    for name, value in zip(("weights_t2i", "weights_i2t"), module.weights(found, allowed)):
        case.close(name, value, **CLOSE)
    queues_after(module, case)
    for name, parameter in (
        ("temp", net.temperature),
        ("vision_proj_weight", net.visual_projection.weight),
        ("text_proj_weight", net.text_projection.weight),
    ):
        case.close_grad(name, parameter, rtol=1e-4, atol=1e-5)
    if "itm_cls_pos" in case:
        head = [case.weights[f"itm_head.{k}"] for k in ("weight", "bias")]
        scores = [F.linear(case[f"itm_cls_{n}"], *head) for n in ("pos", "neg")]
        case.close("loss_itm", matching_loss(*scores), **CLOSE)


def mlm_mod(case: Case) -> None:
    logits = case.leaf("logits")
    loss = masked_word_loss(logits, case["labels"], case["momentum_logits"], case.params["alpha"])
    loss.backward()
    case.close("loss", loss, **CLOSE)
    case.close_grad("logits", rtol=1e-4)


ADAPTERS = {"pretrain_step": pretrain_step, "itc_mod_retrieval": itc_mod_retrieval, "mlm_mod": mlm_mod}
