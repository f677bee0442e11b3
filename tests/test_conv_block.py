"""The ConvNets' block is torch's in values and in first and second derivatives, and stands back where something
listens, compiles or casts."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from stillhouse.models import conv_block
from stillhouse.models.conv_block import Block, Convolution, InstanceNorm
from stillhouse.models.convnet import ConvNet


def blocks(**options: nn.Module) -> tuple[Block, nn.Sequential]:
    """Ours, and torch's with the same weights, in double precision."""
    torch.manual_seed(0)
    parts = {
        "conv": Convolution(2, 3, 3, padding=1),
        "norm": InstanceNorm(3),
        "act": nn.ReLU(),
        "pool": nn.AvgPool2d(2),
        **options,
    }
    ours = Block(OrderedDict(parts)).double()
    for p in ours.parameters():
        nn.init.normal_(p)
    plain = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(2, 3, 3, padding=1), norm=nn.GroupNorm(3, 3), act=nn.ReLU(), pool=nn.AvgPool2d(2))
    ).double()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def images(count: int = 3, height: int = 6, width: int = 5) -> Tensor:
    return torch.randn(
        count, 2, height, width, dtype=torch.double, generator=torch.Generator().manual_seed(1), requires_grad=True
    )


def derivatives(block: nn.Module, x: Tensor) -> list[Tensor]:
    """The value, the gradients, and the gradients of a function of the gradients."""
    wanted = [x, *block.parameters()]
    first = torch.autograd.grad(block(x).square().sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum((g * g.detach().cos()).sum() for g in first), wanted)
    return [block(x), *first, *second]


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("at_once", [40, 10**6])
def test_the_block_is_torchs_in_value_and_both_derivatives(
    monkeypatch: pytest.MonkeyPatch, listens: bool, at_once: int
):
    monkeypatch.setattr(conv_block, "AT_ONCE", at_once)  # one image at a time, or all
    ours, plain = blocks()
    if listens:
        ours.act.register_forward_hook(lambda *_: None)
    for a, b in zip(derivatives(ours, images()), derivatives(plain, images()), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_channels_last_and_single_precision_agree_with_double():
    torch.manual_seed(0)
    network, x = ConvNet(8, 3, input_shape=(3, 16, 16)), torch.randn(4, 3, 16, 16)

    def slope(network: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        grads = torch.autograd.grad(network(x).square().sum(), list(network.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), x)[0]

    single, last = slope(network, x), slope(network, x.contiguous(memory_format=torch.channels_last))
    double = slope(network.double(), x.double())
    assert torch.allclose(single, last, rtol=1e-4, atol=1e-5 * single.abs().max())
    assert (single - double).norm() < 1e-4 * double.norm()


def test_what_listens_to_an_activation_hears_it():
    ours, plain = blocks()
    heard = []
    ours.act.register_forward_hook(lambda module, given, out: heard.append(out))
    ours(images())
    assert torch.allclose(heard[0], plain.act(plain.norm(plain.conv(images()))))


def test_other_activations_and_poolings_are_as_they_are():
    ours, plain = blocks(act=nn.LeakyReLU(0.01), pool=nn.MaxPool2d(2))
    assert torch.allclose(ours(images()), nn.MaxPool2d(2)(nn.LeakyReLU(0.01)(plain.norm(plain.conv(images())))))


def test_autocast_and_export_take_torchs_own_modules():
    network, x = ConvNet(4, 2, input_shape=(3, 8, 8)), torch.randn(2, 3, 8, 8)
    exported = torch.export.export(network, (x,)).module()
    expected = network(x)
    assert torch.allclose(exported(x), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(network(x).float(), expected, atol=0.1)


def test_gradients_of_each_image_by_functional_transforms():
    network, x = ConvNet(4, 2, input_shape=(3, 8, 8)), torch.randn(3, 3, 8, 8)
    weights = dict(network.named_parameters())

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(network, weights, (image[None],)).square().sum()

    found = vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(3):
        expected = torch.autograd.grad(network(x[i : i + 1]).square().sum(), network.layer2.conv.weight)[0]
        assert torch.allclose(found["layer2.conv.weight"][i], expected, atol=1e-5)
