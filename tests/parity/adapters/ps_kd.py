"""PS-KD against the arrays of `ps_kd`: the loss, a whole training by the released loop, and the paper's calibration
figures."""

from __future__ import annotations

import torch
from torch import nn

from parity.case import Case
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import PastSelf
from stillhouse.objectives.ps_kd import PSKD, calibration, ps_kd_loss, refined_targets, share


def loss(case: Case) -> None:
    alpha = case.params["alpha_t"]
    case.close("soft_targets", refined_targets(case["labels"], case["prev_pred"], alpha))
    value = ps_kd_loss(case.leaf("student_logits"), case["labels"], case["prev_pred"], alpha)
    value.backward()
    case.close("loss", value)
    case.close_grad("student_logits")


def training_loop(case: Case) -> None:
    p, x, labels = case.params, case["x"], case["labels"]
    classes = case["w:weight"].shape[0]
    model = case.load(nn.Linear(x.shape[1], classes))
    past = PastSelf()
    past.start(labels, classes)
    module = Distillation(model, past, [PSKD(p["alpha_T"])])
    module.build({"input": x, "label": labels, "index": torch.arange(len(x))})
    sgd = torch.optim.SGD(
        model.parameters(), p["lr"], momentum=p["momentum"], weight_decay=p["weight_decay"], nesterov=p["nesterov"]
    )
    case.close(
        "alpha", torch.tensor([share(p["alpha_T"], e, p["epochs"]) for e in range(p["epochs"])], dtype=torch.float64)
    )
    for epoch in range(p["epochs"]):
        progress = Progress(epoch=epoch, epochs=p["epochs"])
        for index in case["order"][epoch].split(p["batch_size"]):
            batch = {"input": x[index], "label": labels[index], "index": index}
            sgd.zero_grad()
            module(batch, progress)["loss"].backward()
            sgd.step()
            module.after_step(batch, progress, True)
        case.close(f"pred_after_epoch{epoch}", past.table, rtol=1e-4, atol=1e-5)
        case.close(f"weight_after_epoch{epoch}", model.weight, rtol=1e-4, atol=1e-5)
        case.close(f"bias_after_epoch{epoch}", model.bias, rtol=1e-4, atol=1e-5)


def calibration_metrics(case: Case) -> None:
    figures = calibration(case["probs"], case["labels"], bins=round(1 / case.params["bin_size"]))
    for name, value in figures.items():
        case.close(name, torch.tensor(value, dtype=torch.float64))


ADAPTERS = {"loss": loss, "training_loop": training_loop, "calibration_metrics": calibration_metrics}
