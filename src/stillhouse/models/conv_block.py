"""The block of data-set distillation's ConvNets, [convolution, instance norm, ReLU, 2x2 average pooling], with
derivatives written out for the CPU.

Trajectory and gradient matching differentiate a network twice. Torch's own second derivative of a norm is a chain of
passes over the maps, that of a convolution takes another as large as the image; here the former is two sums of maps
weighted by (B, C) numbers, the latter ordinary convolutions. Norm, ReLU and pooling go over a few images at a time,
which stay in the processor's cache, and keep nothing but their input. Elsewhere (GPU, autocast, compilers, torch.func)
torch's own modules run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PIXELS = (2, 3)
AT_ONCE = 2**18
"""Numbers of a map that are worked on at a time: 1 MiB."""


def channels_last(x: Tensor) -> Tensor:
    """Images (B, C, H, W) with channels last in memory, where the derivatives of this file serve: all of it is faster
    so."""
    return x.contiguous(memory_format=torch.channels_last) if _written_out(x, x) else x


class Block(nn.Sequential):
    """`conv`, `norm`, `act` and `pool`, in that order; they run as one where they are what is written out here and
    nothing listens to one of them.

    The norm takes out what the convolution's bias adds: then it is not added, and has a gradient of 0.
    """

    conv: nn.Conv2d
    norm: nn.Module
    act: nn.Module
    pool: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', h, w)."""
        conv, norm, act, pool = self.conv, self.norm, self.act, self.pool
        known = type(act) is nn.ReLU and type(pool) is nn.AvgPool2d and pool.kernel_size == pool.stride == 2
        if (
            known
            and isinstance(norm, InstanceNorm)
            and _written_out(x, norm.weight)
            and not any(map(_listened_to, self))
        ):
            maps = conv._conv_forward(x, conv.weight, None)
            pooled: Tensor = _Norm.apply(maps, norm.weight, norm.bias, norm.eps, True, conv.bias)[0]
            return pooled
        out: Tensor = super().forward(x)
        return out


class InstanceNorm(nn.GroupNorm):
    """(x - mean) / sqrt(variance + eps) over the pixels of each image and channel (biased variance), times weight, plus
    bias.

    Args:
        channels: C; the parameters are those of `nn.GroupNorm(C, C)`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not _written_out(x, self.weight):
            return super().forward(x)
        out: Tensor = _Norm.apply(x, self.weight, self.bias, self.eps, False, None)[0]
        return out


class Convolution(nn.Conv2d):
    """`nn.Conv2d` of stride 1 whose second derivative consists of ordinary convolutions."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _written_out(input, weight):
            return super()._conv_forward(input, weight, bias)
        out: Tensor = _Convolution.apply(
            input, weight.contiguous(memory_format=torch.channels_last), bias, self.padding
        )
        return out


def _written_out(x: Tensor, weight: Tensor) -> bool:
    """Whether the derivatives of this file serve."""
    plain = x.ndim == 4 and x.device.type == "cpu" and x.dtype == weight.dtype
    return plain and not (
        torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    )


def _listened_to(module: nn.Module) -> bool:
    """Whether hooks ask for the module's own inputs, outputs or gradients."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Norm(torch.autograd.Function):
    """x, weight (C,), bias (C,), eps, pooled, before -> n weight + bias (with `pooled`: rectified and pooled); then
    mean and 1 / deviation, without gradient.

    `before` (C,) or None is what could be added to x without changing a thing; its gradient is 0.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, eps: float, pooled: bool, before: Tensor | None
    ) -> tuple[Tensor, ...]:
        return _joined([_norm(pooled, weight, bias, eps, part) for (part,) in _few(x)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, ctx.pooled, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        x, *rest = ctx.saved_tensors
        found = _NormBackward.apply(grad, x, *rest, ctx.pooled)
        return *found[:3], None, None, torch.zeros_like(rest[0]) if ctx.needs_input_grad[5] else None


class _NormBackward(torch.autograd.Function):
    """Gradient, x, weight, bias, mean, rstd, pooled -> gradients of x, weight and bias; then the sums of a and of a n
    over pixels, without gradient."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, pooled: bool
    ) -> tuple[Tensor, ...]:
        of_x = torch.empty_like(x)
        total, along = _joined(
            [_norm_backward(pooled, weight, bias, *part) for part in _few(of_x, grad, x, mean, rstd)]
        )
        return of_x, along.sum(0).flatten(), total.sum(0).flatten(), total, along

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.pooled = inputs
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(*tensors, *output[3:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, x, weight, bias, mean, rstd, total, along = ctx.saved_tensors
        of_x = torch.empty_like(x)
        parts = _few(of_x, u, grad, x, mean, rstd, total, along)
        of_grad, of_weight = _joined([_norm_second(ctx.pooled, weight, bias, v, w, *part) for part in parts])
        return of_grad, of_x, of_weight.sum(0).flatten(), None, None, None, None


def _norm(pooled: bool, weight: Tensor, bias: Tensor, eps: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_Norm` gives, for a few images."""
    mean = x.mean(PIXELS, keepdim=True)
    rstd = (x - mean).square_().mean(PIXELS, keepdim=True).add_(eps).rsqrt_()
    out = _scaled(x, weight, bias, mean, rstd)
    return F.avg_pool2d(out.clamp_(min=0), 2) if pooled else out, mean, rstd


def _norm_backward(
    pooled: bool, weight: Tensor, bias: Tensor, of_x: Tensor, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Into `of_x`, with a the gradient at the norm's output and M pixels: weight rstd (a - sum(a) / M - n sum(a n) /
    M). Returns sum(a) and sum(a n)."""
    a = _unpooled(grad, _scaled(x, weight, bias, mean, rstd)) if pooled else grad
    total, along = _sums(a, x, mean, rstd)
    scale, size = _column(weight) * rstd, _pixels(x)
    tilt = scale * rstd * along / -size
    torch.addcmul(scale * total / -size - mean * tilt, x, tilt, out=of_x).addcmul_(a, scale)
    return total, along


def _norm_second(
    pooled: bool, weight: Tensor, bias: Tensor, v: Tensor, w: Tensor,
    of_x: Tensor, u: Tensor, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, total_a: Tensor, along_a: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Derivatives of s = <u, d/dx> + <v, d/dweight> + <w, d/dbias>: into `of_x`; returned, for the gradient and, image
    by image, for the weight.

    s = <a, b> with b = weight rstd (u - sum(u) / M - n sum(u n) / M) + v n + w, so that b, rectified and pooled, is the
    first; n itself has the derivative to_a a + to_u u.
    """
    size, gain, v, w = _pixels(x), _column(weight), _column(v), _column(w)
    y = _scaled(x, weight, bias, mean, rstd) if pooled else x
    a = _unpooled(grad, y) if pooled else grad
    total_u, along_u = _sums(u, x, mean, rstd)
    of_weight = rstd * ((a * u).sum(PIXELS, keepdim=True) - (total_a * total_u + along_a * along_u) / size)
    to_a, to_u = v - gain * rstd * along_u / size, gain * rstd * along_a / -size
    b = torch.addcmul(w - gain * rstd * total_u / size - mean * rstd * to_a, x, rstd * to_a).addcmul_(u, gain * rstd)
    total, along = to_a * total_a + to_u * total_u, to_a * along_a + to_u * along_u
    tilt = rstd.square() * (along + gain * of_weight) / -size
    torch.addcmul(rstd * total / -size - mean * tilt, x, tilt, out=of_x).addcmul_(a, rstd * to_a).addcmul_(
        u, rstd * to_u
    )
    return F.avg_pool2d(torch.ops.aten.threshold_backward(b, y, 0), 2) if pooled else b, of_weight


class _Convolution(torch.autograd.Function):
    """x (B, C, H, W), weight (C', C, k, k), bias (C',) or None, padding -> (B, C', h, w), at stride 1."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, bias, 1, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _ConvolutionBackward.apply(grad, *ctx.saved_tensors, ctx.padding, ctx.needs_input_grad[:3])
        return *found, None


class _ConvolutionBackward(torch.autograd.Function):
    """Gradient, x, weight, padding and which are wanted -> gradients of x, weight and bias."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _convolution_backward(grad, x, weight, padding, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        grad, x, weight, ctx.padding, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of <u, d/dx> + <v, d/dweight> + <w, d/dbias>, which is linear in the gradient, in x and in the weight."""
        grad, x, weight = ctx.saved_tensors
        of_grad = of_x = of_weight = None
        if v is not None:
            of_grad = F.conv2d(x, v, w, 1, ctx.padding)
            of_x = _convolution_backward(grad, x, v, ctx.padding, (True, False, False))[0]
        elif w is not None:
            of_grad = _column(w).expand_as(grad)
        if u is not None:
            along = F.conv2d(u, weight, None, 1, ctx.padding)
            of_grad = along if of_grad is None else along.add_(of_grad)
            of_weight = _convolution_backward(grad, u, weight, ctx.padding, (False, True, False))[1]
        return of_grad, of_x, of_weight, None, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [1, 1], list(padding), [1, 1], False, [0, 0], 1, list(wanted)
    )
    return found


def _few(*tensors: Tensor) -> Iterator[Any]:
    """Tensors (B, …), of which the first is a map, a few images at a time."""
    step = max(1, AT_ONCE // max(1, tensors[0][:1].numel()))
    return zip(*(t.split(step) for t in tensors))


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(p) for p in zip(*parts))


def _scaled(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """n weight + bias."""
    scale = rstd * _column(weight)
    return torch.addcmul(_column(bias) - mean * scale, x, scale)


def _unpooled(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient at y of ReLU and 2x2 average pooling."""
    spread = torch.ops.aten.avg_pool2d_backward(grad, y, [2, 2], [2, 2], [0, 0], False, True, None)
    found: Tensor = torch.ops.aten.threshold_backward(spread, y, 0)
    return found


def _sums(a: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels of a and of a n, (B, C, 1, 1)."""
    total = a.sum(PIXELS, keepdim=True)
    return total, rstd * ((a * x).sum(PIXELS, keepdim=True) - mean * total)


def _column(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]
