"""DataDAM's attention maps and loss against the arrays of `datadam`."""

from __future__ import annotations

import torch

from parity.adapters.dataset_distillation_common import convnet_of
from parity.case import Case
from stillhouse.methods.datasets.datadam import attention_map, losses


def attention(case: Case) -> None:
    power, features = case.params["exp"], case.leaf("feat")
    case.close("abs_l2", attention_map(features, 1), rtol=1e-6)
    maps = attention_map(features, power)
    case.close("pow_l2", maps, rtol=1e-6)
    case.close("pow_l1", attention_map(features, power, norm=1), rtol=1e-6)
    if "pow_none" in case:
        case.close("pow_none", attention_map(features, power, norm=None).view(case["pow_none"].shape), rtol=1e-6)
    (maps * torch.linspace(-1, 1, maps.numel()).view_as(maps)).sum().backward()
    case.close_grad("feat")


def loss(case: Case) -> None:
    p, x = case.params, case.leaf("x_syn")
    found = losses(convnet_of(case), case["x_real"], x, p["num_classes"], p["exp"], p["task_balance"])
    case.close("att_terms", found["attention"], rtol=1e-4)
    case.close("out_term", found["features"], rtol=1e-4)
    value = found["attention"].sum() + found["features"]
    value.backward()
    case.close("loss", value, rtol=1e-4)
    case.close("emb_real", found["real"], rtol=1e-4)
    case.close("emb_syn", found["synthetic"], rtol=1e-4)
    case.close_grad("x_syn", rtol=1e-4)


ADAPTERS = {"attention": attention, "loss": loss}
