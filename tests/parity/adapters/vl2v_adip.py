"""One update of each stage, and the classifier of text embeddings: the arrays of `vl2v_adip`."""

from __future__ import annotations

import math

from torch import nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.image_text.vl2v_adip import AdipTraining, EmbeddingClassifier, class_vectors
from stillhouse.training.context import Progress


def stage(case: Case) -> None:
    p, weights = case.params, case.weights
    layers = {}
    for name in ("backbone", "proj"):
        outputs, inputs = weights[f"{name}_weight"].shape
        layers[name] = nn.Linear(inputs, outputs, bias=f"{name}_bias" in weights)
        layers[name].load_state_dict({k.removeprefix(f"{name}_"): v for k, v in weights.items() if k.startswith(name)})
    features = nn.Sequential(nn.Flatten(), layers["backbone"])
    student = EmbeddingClassifier(features, layers["proj"], case["text_emb_unit"], p["logit_scale_exp"])
    image, labels = F.normalize(case["clip_image_emb_raw"], dim=-1), case["labels"].long()
    trained, part = (("projection",), "proj") if p["stage"] == 1 else (("features",), "backbone")
    module = AdipTraining(student, trained, lambda _: image, weight=p["lmd"])
    loss = module({"input": case["images"], "label": labels}, Progress())["loss"]
    loss.backward()
    case.close("loss", loss, rtol=1e-4)
    if "student_logits" in case:
        case.close("student_logits", student(case["images"]), rtol=1e-4)
    for name, layer in layers.items():
        for kind, parameter in layer.named_parameters():
            if name != part:
                assert parameter.grad is None
            elif f"grad:{name}_{kind}" in case.arrays:
                case.close_grad(f"{name}_{kind}", parameter, rtol=1e-4)


def text_classifier(case: Case) -> None:
    vectors, scale = class_vectors(case["text_emb_raw"]), math.exp(case.params["logit_scale"])
    case.close("class_weights", scale * vectors, rtol=1e-4)
    student = EmbeddingClassifier(nn.Identity(), nn.Identity(), vectors, scale)
    case.close("logits", student(case["student_feat"]), rtol=1e-4)


ADAPTERS = {"stage1": stage, "stage2": stage, "text_classifier": text_classifier}
