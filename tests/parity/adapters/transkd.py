"""Cross-selective fusion, patch-embedding alignment and the hierarchical context loss: the arrays of `transkd`."""

from __future__ import annotations

import re

import torch

from parity.case import Case
from stillhouse.functional.hierarchical_context import hcl_loss
from stillhouse.objectives.transkd import CrossSelectiveFusion, PatchEmbeddingAlignment, embedding_loss

CSF = {"conv1": "reduce", "conv2": "predict", "fc": "squeeze", "fc1": "squeeze_one", "fcs": "choose"}
PEA = {
    r"embed(\d)_linearproject": lambda m: f"project.{int(m[1]) - 1}",
    r"patch_embed(\d)\.proj": lambda m: f"assistants.{int(m[1]) - 1}.patches",
    r"patch_embed(\d)\.norm": lambda m: f"assistants.{int(m[1]) - 1}.norm",
    r"attn\d\.qkv": lambda m: "mixer.qkv",
    r"attn\d\.proj": lambda m: "mixer.out",
    r"conv1\b": lambda m: "mixer.value",
    r"conv2\b": lambda m: "mixer.gate",
    r"atten_weight": lambda m: "mixer.attention_weight",
    r"conv_weight": lambda m: "mixer.convolution_weight",
}


def hcl(case: Case) -> None:
    stages = range(sum(name.startswith("student") for name in case.arrays))
    loss = torch.stack([hcl_loss(case.leaf(f"student{i}"), case[f"teacher{i}"]) for i in stages]).sum()
    loss.backward()
    case.close("loss", loss)
    for i in stages:
        case.close_grad(f"student{i}")


def csf_pea(case: Case) -> None:
    p = case.params
    stages = range(len(p["in_channels"]))
    squeezed = {"reduction": p["mid_channel"], "least": p["fc_len"]}
    widths = p["in_channels"], p["out_channels"]
    fusion = CrossSelectiveFusion(*widths, p["mid_channel"], **squeezed).train(p["training"])
    image = case["image"] if p["variant"] == "ea" else None
    channels = 0 if image is None else image.shape[1]
    alignment = PatchEmbeddingAlignment(*widths, p["variant"], channels, p["gl_heads"] or 1, p["add"])
    fused, aligned = {}, {}
    for name, value in case.weights.items():
        unit = re.match(r"skfs\.(\d)\.(\w+)(.*)", name)
        weight = re.match(r"fuse_weights\.(\d)", name)
        if unit:
            fused[f"units.{stages[-1] - int(unit[1])}.{CSF[unit[2]]}{unit[3]}"] = value
        elif weight:
            side, stage = divmod(int(weight[1]), len(stages))
            aligned[f"{('own_weights', 'assistant_weights')[side]}.{stage}"] = value
        else:
            pattern, place = next((k, v) for k, v in PEA.items() if re.match(k, name))
            aligned[re.sub(f"^{pattern}", place, name)] = value
    fusion.to(case["feat0"].dtype).load_state_dict(fused, strict=False)
    alignment.to(case["feat0"].dtype).load_state_dict(aligned)
    missing = set(fusion.state_dict()) - set(fused)
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    maps, embeddings = [case.leaf(f"feat{i}") for i in stages], [case.leaf(f"embed{i}") for i in stages]
    out_maps = fusion(maps)
    out_embeddings = alignment(embeddings, image, maps[:-1])
    losses = [hcl_loss(g, case[f"teacher_feat{i}"]) for i, g in enumerate(out_maps)]
    features = torch.stack(losses).sum()
    embedded = embedding_loss(out_embeddings, [case[f"teacher_embed{i}"] for i in stages], p["embed_weights"])
    (features + embedded).backward()
    for i in stages:
        case.close(f"out_feat{i}", out_maps[i], rtol=1e-4)
        case.close(f"out_embed{i}", out_embeddings[i], rtol=1e-4)
    case.close("feature_loss", features, rtol=1e-4)
    case.close("embed_loss", embedded, rtol=1e-4)
    for name in (n for n in case.arrays if n.startswith("grad:")):  # through batch-norm of few values
        case.close_grad(name.removeprefix("grad:"), rtol=1e-3, atol=1e-4 * float(abs(case.arrays[name]).max()))


ADAPTERS = {"hcl": hcl, "csf_pea": csf_pea, "csf_pea_ea": csf_pea}
