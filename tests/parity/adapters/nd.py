"""KD++ and its parts against the arrays of `nd`."""

from __future__ import annotations

from parity.case import Case
from stillhouse.objectives.ce import cross_entropy
from stillhouse.objectives.kd import kd_loss
from stillhouse.objectives.nd import adapter, class_means, nd_loss


def loss(case: Case) -> None:
    p, labels = case.params, case["labels"]
    nd = p["nd_loss_factor"] * nd_loss(case.leaf("s_emb"), case["t_emb"], case["class_means"], labels)
    kd = p["kd_loss_factor"] * kd_loss(case.leaf("s_logits"), case["t_logits"], p["temperature"])
    ce = p["cls_loss_factor"] * cross_entropy(case["s_logits"], labels)
    total = ce + kd * min(1.0, p["epoch"] / p["warm_up"]) + nd
    total.backward()
    case.close("nd_loss", nd)
    case.close("kd_loss", kd)
    case.close("cls_loss", ce)
    case.close("total", total)
    case.close_grad("s_emb")
    case.close_grad("s_logits")


def means(case: Case) -> None:
    found = class_means(case["features"], case["labels"], case.params["num_class"])
    half_a_unit = 1.1 * 10.0 ** -case.params["decimals"]  # the released script rounds features and means
    case.close("class_means", found[case["class_ids"]], rtol=0, atol=half_a_unit)


def adapter_eval(case: Case) -> None:
    p = case.params
    layers = case.load(adapter(p["student_dim"], p["teacher_dim"], p["dropout"]))
    assert layers[0].eps == p["bn_eps"]
    layers.train(p["mode"] == "train")
    out = layers(case.leaf("x"))
    out.square().sum().backward()
    case.close("out", out, rtol=1e-4)
    case.close_grad("x", rtol=1e-4)


ADAPTERS = {"nd_loss": loss, "class_means": means, "adapter_eval": adapter_eval}
