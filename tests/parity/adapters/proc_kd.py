"""The prototype modules, and the divergences between logits, against the arrays of `proc_kd`."""

from __future__ import annotations

import re

from parity.case import Case
from stillhouse.functional.divergences import kl_divergence, soft_cross_entropy
from stillhouse.objectives.proc_kd import Prototypes

NAMES = {
    "centroids": "prototypes",
    "netvlad.0": "assign",
    "cat_transform.0": "fuse",
    "transform.0": "transform.0",
    "transform.2": "transform.2",
    "vladfc": "describe",
    "encode": "encode",
    "aug_transform.0": "mix.0",
    "aug_transform.2": "mix.2",
}
"""Names in the released code, where the number of the stage follows the first word."""


def prototype_modules(case: Case) -> None:
    layers = [case[f"teacher_feat{i}"] for i in range(sum(name.startswith("teacher_feat") for name in case.arrays))]
    parts = Prototypes([x.shape[-1] for x in layers], case.params["dim"], case.params["num_prototypes"]).to(
        layers[0].dtype
    )
    state = {}
    for name, value in case.weights.items():
        name = re.sub(r"^([a-z_]+)\d+", r"\1", name)
        module, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        key = f"{NAMES[module]}.{kind}" if kind else NAMES[module]
        state[key] = value.flatten(1) if kind == "weight" else value  # 1x1 convolutions are linear layers here
    parts.load_state_dict(state)
    fused = parts.fused(layers)
    described = parts.described(fused, parts.assignment(fused))
    taught, own = parts.augmented(described), parts.augmented(case.leaf("student_feat"))
    (taught.square().mean() + own.square().mean()).backward()
    for name, value in {"fused": fused, "vlad": described, "teacher_aug": taught, "student_aug": own}.items():
        case.close(name, value)
    case.close_grad("student_feat", rtol=1e-4)
    case.close_grad("centroids", parts.prototypes, rtol=1e-4)

    predicted, target = case.leaf("pred_logits"), case["target_logits"]
    kl = kl_divergence(predicted, target.log_softmax(-1))
    kl.backward()
    case.close("kl", kl)
    case.close_grad("pred_logits", rtol=1e-4)
    case.close("soft_ce", soft_cross_entropy(predicted, target.softmax(-1)) / predicted.shape[-1])


ADAPTERS = {"prototype_modules": prototype_modules}
