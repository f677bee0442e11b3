"""The shared weights of all sub-networks, and sub-networks as networks of their own.

A sub-network's weights are views of the shared ones (`nn.slicing`), called by `torch.func.functional_call` through a
network of its shape that holds none. So nothing is switched on or off in the shared network, and what is cut out at the
end is what was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.methods.language.autodistil.space import SubNet, Whole
from stillhouse.models.language import quietly
from stillhouse.nn.slicing import sliced, spread_layers

LAYER = "encoder.layer."
ATTENTION = "attention.self."
KINDS = ("bert", "roberta", "xlm-roberta")
"""Types of transformers configs whose encoders are named as BERT's."""
QKV = tuple[Tensor, Tensor, Tensor]


def whole_of(model: nn.Module) -> Whole:
    """The dimensions of a transformers encoder.

    Raises:
        UserError: a network that is not one of BERT's kind.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in KINDS:
        raise UserError(
            f"autodistil cuts encoders of transformers of the kinds {', '.join(KINDS)}; the teacher is a "
            f"{type(model).__name__}."
        )
    return Whole(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
        config.type_vocab_size,
    )


def shaped(model: nn.Module, whole: Whole, net: SubNet, layers: int | None = None) -> Any:
    """A new network of the class of `model` with a sub-network's shape, initialised by torch's current generator.

    Its config tells the hidden size and the number of heads; the width of a head stays the large network's, which
    transformers takes for hidden size / heads.

    Args:
        model: a network of transformers, whole or its encoder alone.
        whole: the dimensions of the large network.
        net: the shape.
        layers: how many, where not all of the sub-network's.
    """
    config: Any = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size = net.hidden, whole.feed_forward(net)
    config.num_hidden_layers = net.depth if layers is None else layers
    config.num_attention_heads = 1  # which divides any hidden size; the true number follows
    with quietly():
        made: Any = type(model)(config)
    width = net.heads * whole.head_size
    for block in made.base_model.encoder.layer:
        own, out = block.attention.self, block.attention.output
        own.query, own.key, own.value = (nn.Linear(net.hidden, width) for _ in range(3))
        out.dense = nn.Linear(width, net.hidden)
        own.num_attention_heads, own.attention_head_size, own.all_head_size = net.heads, whole.head_size, width
        own.scaling = whole.head_size**-0.5
        for layer in (own.query, own.key, own.value, out.dense):
            made._init_weights(layer)
    config.num_attention_heads = net.heads
    made.tie_weights()
    return made


class SuperNet(nn.Module):
    """The weights that all sub-networks of an encoder share.

    Args:
        model: a transformers network of BERT's kind; its encoder is copied.

    Raises:
        UserError: another network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.whole = whole_of(model)
        self.encoder: Any = copy.deepcopy(model.base_model)
        self._shapes: dict[tuple[SubNet, int], nn.Module] = {}

    def weights(self, net: SubNet) -> dict[str, Tensor]:
        """The weights of a sub-network's encoder by name, as views."""
        shell = self._shell(net, net.depth)
        return self._views(net, {n: p.shape for n, p in shell.named_parameters()})

    def hidden(self, net: SubNet, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, L, hidden) last hidden states of a sub-network."""
        return self._run(net, net.depth, inputs)

    def queries_keys_values(self, net: SubNet, inputs: Mapping[str, Tensor]) -> QKV:
        """Three tensors (B, L, heads x head size) of a sub-network's last layer, of which nothing else is computed."""
        before = self._run(net, net.depth - 1, inputs)
        shared = dict(self.encoder.named_parameters())
        width = net.heads * self.whole.head_size
        at = f"{LAYER}{spread_layers(self.whole.layers, net.depth)[-1]}.{ATTENTION}"
        shapes = {f"{at}{part}.{kind}": shape for part in ("query", "key", "value")
                  for kind, shape in (("weight", (width, net.hidden)), ("bias", (width,)))}  # fmt: skip
        own = sliced(shared, shapes, LAYER, range(self.whole.layers))
        q, k, v = (F.linear(before, own[f"{at}{p}.weight"], own[f"{at}{p}.bias"]) for p in ("query", "key", "value"))
        return q, k, v

    def _run(self, net: SubNet, layers: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Hidden states (B, L, hidden) after the first so many layers of a sub-network."""
        shell = self._shell(net, layers)
        shell.train(self.training)
        held = {
            **self._views(net, {n: p.shape for n, p in shell.named_parameters()}),
            **dict(self.encoder.named_buffers()),
        }
        out: Tensor = functional_call(shell, held, (), dict(inputs), tie_weights=False).last_hidden_state
        return out

    def _shell(self, net: SubNet, layers: int) -> nn.Module:
        """A network of the shape without weights, made once."""
        if (net, layers) not in self._shapes:
            with torch.device("meta"):
                made = shaped(self.encoder, self.whole, net, layers)
            made.pooler = None
            self._shapes[net, layers] = made
        return self._shapes[net, layers]

    def _views(self, net: SubNet, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
        chosen = spread_layers(self.whole.layers, net.depth)
        return sliced(dict(self.encoder.named_parameters()), shapes, LAYER, chosen)


@torch.no_grad()
def cut_out(model: nn.Module, whole: Whole, net: SubNet) -> Any:
    """A sub-network of a whole model, with its head, as a network of its own with copies of the weights; embeddings
    that the head shares stay shared."""
    made = shaped(model, whole, net)
    shapes = {n: p.shape for n, p in made.named_parameters()}
    views = sliced(dict(model.named_parameters()), shapes, LAYER, spread_layers(whole.layers, net.depth))
    for name, parameter in made.named_parameters():
        parameter.copy_(views[name])
    return made
