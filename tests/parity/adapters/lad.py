"""Label channel, channel-wise distillation, and the steps of both stages: the arrays of `lad`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.functional.channelwise import channelwise_divergence
from stillhouse.methods.dense.lad import Maps, consistency_loss, fixed_codes, label_channel, task_loss


class Net(nn.Module):
    """The network of the files: a convolution of stride 2 on x / 100, tanh, and two heads."""

    def __init__(self, case: Case, prefix: str) -> None:
        super().__init__()
        width, channels, *kernel = case[f"w:{prefix}f.weight"].shape
        classes = case[f"w:{prefix}h.weight"].shape[0]
        self.f = nn.Conv2d(channels, width, kernel, 2, kernel[0] // 2)
        self.h, self.a = nn.Conv2d(width, classes, 1), nn.Conv2d(width, classes, 1)
        case.load(self, prefix)

    def forward(self, x: Tensor) -> Maps:
        inner = torch.tanh(self.f(x * 0.01))
        return Maps(self.h(inner), self.a(inner))


def cwd(case: Case) -> None:
    loss = channelwise_divergence(case.leaf("student"), case["teacher"], case.params["temperature"])
    loss.backward()
    case.close("loss", loss, rtol=1e-4)
    case.close_grad("student", rtol=1e-4)


def _channel(case: Case, codes: Tensor, which: int) -> Tensor:
    p = case.params
    noise = case[f"noise{which}"]
    channel = label_channel(case["labels"].long(), codes, noise, p["pixel_noise"], p["code_scale"], p["ignore_label"])
    case.close(f"input{which}", channel[:, 0], rtol=1e-4)
    return torch.cat([case["images"], channel], 1)


def _finish(case: Case, net: Net, loss: Tensor) -> None:
    loss.backward()
    case.close("losses", loss, rtol=1e-4)
    for name, parameter in net.named_parameters():
        case.close_grad(name, parameter, rtol=1e-4)


def teacher_step(case: Case) -> None:
    p, net, labels = case.params, Net(case, "model."), case["labels"].long()
    outs = [net(_channel(case, case[f"codes{i}"], i)) for i in (1, 2)]
    losses = [task_loss(out, labels, p["aux_weight"], p["ignore_label"]) for out in outs]
    for i, (out, loss) in enumerate(zip(outs, losses), 1):
        case.close(f"out{i}", out.main, rtol=1e-4)
        case.close(f"task_loss{i}", loss, rtol=1e-4)
    consistency = consistency_loss(outs[0].main, outs[1].main, p["T"])
    case.close("task_loss", losses[0] + losses[1], rtol=1e-4)
    case.close("cons_loss", consistency, rtol=1e-4)
    _finish(case, net, losses[0] + losses[1] + p["cons_weight"] * consistency)


def student_step(case: Case) -> None:
    p, student, teacher = case.params, Net(case, "model."), Net(case, "teacher.")
    labels, images = case["labels"].long(), case["images"]
    with torch.no_grad():
        theirs = teacher(_channel(case, fixed_codes(p["num_classes"]).to(images.dtype), 1)).main
    ours = student(F.pad(images, (0, 0, 0, 0, 0, 1)))
    task = task_loss(ours, labels, p["aux_weight"], p["ignore_label"])
    distilled = channelwise_divergence(ours.main, theirs, p["T"])
    values = {"teacher_out": theirs, "student_out": ours.main, "task_loss": task, "cons_loss": distilled}
    for name, value in values.items():
        case.close(name, value, rtol=1e-4)
    _finish(case, student, task + p["cons_weight"] * distilled)


ADAPTERS = {"cwd": cwd, "teacher_step": teacher_step, "student_step": student_step}
