"""KRR-ST's outer step and pool updates against the arrays of `krr_st`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case
from stillhouse.methods.datasets.krr_st.ridge import inner_optimizer, inner_step, outer_loss, outer_optimizer


class Net(nn.Module):
    """The published ConvNet: blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, of the file's widths and
    norm."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        kernels = [w for k, w in weights.items() if k.endswith("block.0.weight")]
        self.layers = nn.ModuleList()
        norm: Callable[[int], nn.Module] = (
            partial(nn.InstanceNorm2d, affine=True) if "layers.0.block.1.weight" in weights else nn.Identity
        )
        if "layers.0.block.1.running_mean" in weights:
            norm = nn.BatchNorm2d
        for kernel in kernels:
            out, channels, size, _ = kernel.shape
            block = nn.Sequential(
                nn.Conv2d(channels, out, size, padding=size // 2), norm(out), nn.ReLU(), nn.AvgPool2d(2)
            )
            layer = nn.Module()
            layer.block = block
            self.layers.append(layer)
        self.fc = nn.Linear(weights["fc.weight"].shape[1], weights["fc.weight"].shape[0])

    def embed(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.block(x)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))


def outer_step(case: Case) -> None:
    p, double = case.params, case["x_syn"].dtype == torch.float64
    rtol, pool_rtol = (1e-8, 1e-8) if double else (max(1e-3, solving_error(case["feat_syn"])), 1e-4)
    network = case.load(Net(case.weights).to(case["x_syn"].dtype)).eval()
    x0, y0 = case["x_syn"].clone(), case["y_syn"].clone()
    x, y = case.leaf("x_syn"), case.leaf("y_syn")
    found = outer_loss(network, x, y, case["x_real"], case["y_real"])
    images_grad, targets_grad = torch.autograd.grad(found["loss"], [x, y])
    x.grad, y.grad = images_grad, targets_grad
    case.close("feat_syn", found["synthetic"], rtol=rtol)
    case.close("feat_real", found["real"], rtol=rtol)
    case.close("lam", found["lam"], rtol=rtol, atol=0.0)
    case.close("outer_loss", found["loss"], rtol=rtol)
    for name in ("x_syn", "y_syn"):
        scale = float(case[f"grad:{name}"].abs().max()) if f"grad:{name}" in case else 1.0
        case.close_grad(name, rtol=rtol, atol=(1e-9 if double else rtol) * scale)
    outer_optimizer(x, y, p["outer_lr"]).step()
    for name, leaf, grad in (("x_after", x, images_grad), ("y_after", y, targets_grad)):
        # the first step of AdamW is nearly the sign of the gradient
        clear = grad.abs() > (1e-6 if double else rtol) * grad.abs().max()
        case.close(
            name, leaf, rtol=1e-8 if double else 1e-3, atol=1e-8 if double else 1e-3 * p["outer_lr"], where=clear
        )
    sgd = inner_optimizer(network)
    for _ in range(p["inner_steps"]):
        inner_step(network, sgd, x0, y0)
    for name, value in network.state_dict().items():
        case.close(f"after:{name}", value, rtol=pool_rtol, atol=1e-8 if double else 1e-5)


def solving_error(features: Tensor) -> float:
    """The relative error that the published code's solve in float32 may make: half of eps times the condition of its
    matrix."""
    rows = F.pad(features.double(), (0, 1), value=1.0)
    gram = rows @ rows.T
    return (
        0.5
        * torch.finfo(torch.float32).eps
        * float(torch.linalg.cond(gram + 1e-6 * gram.trace() * torch.eye(len(gram))))
    )


ADAPTERS = {"outer_step": outer_step}
