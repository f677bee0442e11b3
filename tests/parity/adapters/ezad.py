"""Square crops, certainty, the embedding head with conditioned boxes, and the weighted loss of features: the arrays of
`ezad`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.dense.ezad.regions import certainty, feature_loss, row_weights, square_crop
from stillhouse.models.text_rcnn import BoxHead

RTOL = 1e-4


def distill(case: Case) -> None:
    p, counts = case.params, case.params["counts"]
    own = p.get("gt_weight")
    weights: list[Tensor] | None = None
    if "proposal_weight0" in case:
        weights = []
        for i, (boxes, _) in enumerate(counts):
            given = case[f"proposal_weight{i}"]
            rows = torch.cat([torch.full((boxes,), 1.0 if own is None else own), given])[None]
            weights.append(row_weights(rows, torch.ones_like(rows))[0])
            if f"norm_weight{i}" in case:
                case.close(f"norm_weight{i}", weights[-1], rtol=RTOL)
    features = torch.cat([case[f"clip_feat{i}"] for i in range(len(counts))])
    raw = case.leaf("raw_student")
    joined = None if weights is None else torch.cat(weights)
    loss = feature_loss(raw, features, joined, torch.ones(len(raw)), p.get("distill_loss_factor", 1.0))
    loss.backward()
    case.close("loss", loss, rtol=RTOL)
    if "student" in case:
        case.close("student", F.normalize(raw, dim=-1), rtol=RTOL)
    if "grad:raw_student" in case:
        case.close_grad("raw_student", rtol=RTOL)


class Known(nn.Module):
    """A trunk whose output is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def head(case: Case) -> None:
    weights, text = case.weights, case["text"]
    units, dim = weights["map.weight"].shape[1], text.shape[1]
    made = BoxHead(Known(), units, 0, dim, True, None, None, False)
    made.embed.load_state_dict({k: weights[f"map.{k}"] for k in ("weight", "bias")})
    made.regress.load_state_dict({k: weights[f"reg.{k}"] for k in ("weight", "bias")})
    made.background.data = weights["bg.weight"]
    log_scale = case.leaf("log_temperature")
    del made.log_scale
    made.log_scale = log_scale  # type: ignore[assignment]
    train = case.params["train"]
    made.train(train)
    raw, _ = made.embedded(case.leaf("x_cls"))
    logits = made.logits(raw, text)
    labels = case["labels"] if train else logits.argmax(-1)
    boxes = made.corrections(case["x_reg"], labels, text)
    case.close("cls_score", logits, rtol=RTOL)
    if "bbox_pred" in case:
        case.close("bbox_pred", boxes, rtol=RTOL)
    if "embedding" in case:
        case.close("embedding", F.normalize(raw, dim=-1), rtol=RTOL)
    (F.cross_entropy(logits, case["labels"]) + boxes.abs().mean()).backward()
    for name in ("x_cls", "log_temperature"):
        if f"grad:{name}" in case:
            case.close_grad(name, rtol=RTOL)


def entropy_score(case: Case) -> None:
    case.close("score", certainty(case["logits"]), rtol=RTOL, atol=1e-5)


def square_crops(case: Case) -> None:
    image = case["image"].permute(2, 0, 1)
    for i, box in enumerate(case.params["boxes"]):
        if f"patch{i}" in case:
            patch = square_crop(image, torch.tensor(box), case.params["ratio"])
            case.close(f"patch{i}", patch.permute(1, 2, 0), rtol=0, atol=0)


ADAPTERS = {
    "distill": distill,
    "distill_plain": distill,
    "head": head,
    "entropy_score": entropy_score,
    "square_crop": square_crops,
}
