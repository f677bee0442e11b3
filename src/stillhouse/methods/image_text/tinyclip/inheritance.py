"""What a smaller CLIP takes over of a larger one: the leading part of every tensor, or what learned masks left."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.clip import Clip, plain
from stillhouse.nn.clip import Encoder, EncoderShape, ImageEncoder, Masks, TextEncoder


def teacher_layers(theirs: int, ours: int) -> list[int]:
    """Which layer of the larger network each layer of the smaller one comes from: every (theirs // ours)-th.

    >>> teacher_layers(12, 6), teacher_layers(12, 9)[:3]
    ([0, 2, 4, 6, 8, 10], [0, 1, 2])
    """
    return [i * (theirs // ours) for i in range(ours)]


def leading(value: Tensor, shape: torch.Size) -> Tensor:
    """The first entries of a tensor along every axis."""
    return value[tuple(slice(0, n) for n in shape)]


@torch.no_grad()
def inherit_encoder(ours: Encoder, theirs: Encoder, where: str = "student") -> None:
    """Layers of a larger transformer, cut to the leading channels, heads and hidden units, into a smaller one.

    Raises:
        UserError: another dimension of a head, or a network that is larger somewhere.
    """
    mine, other = ours.shape, theirs.shape
    if mine.head_dim != other.head_dim:
        raise UserError(
            f"tinyclip: a head of the {where} has {mine.head_dim} channels and one of the larger network "
            f"{other.head_dim}; heads are taken over whole, so both must be alike (width / heads)."
        )
    if len(mine.heads) > len(other.heads):
        raise UserError(
            f"tinyclip: the {where} has {len(mine.heads)} layers, more than the {len(other.heads)} it inherits."
        )
    for layer, source in zip(ours.layers, teacher_layers(len(other.heads), len(mine.heads))):
        given = theirs.layers[source].state_dict()
        _copy_leading(layer, given, f"layer {source} of the {where}")


@torch.no_grad()
def inherit(student: Clip, teacher: Clip) -> None:
    """Manual inheritance: layers at equal distances, and of every tensor the leading entries of every axis (of queries,
    keys and values so the first heads). Networks of equal shape are copied.

    Raises:
        UserError: as `inherit_encoder`, for both transformers; another embedding, patch or vocabulary.
    """
    for name in ("image", "text"):
        ours, theirs = student.get_submodule(name), teacher.get_submodule(name)
        assert isinstance(ours, ImageEncoder | TextEncoder) and isinstance(theirs, ImageEncoder | TextEncoder)
        inherit_encoder(ours.encoder, theirs.encoder, f"student's {name} transformer")
        rest = {k: v for k, v in theirs.state_dict().items() if not k.startswith("encoder.")}
        _copy_leading(ours, rest, f"the student's {name} half")
    student.logit_scale.copy_(teacher.logit_scale)


def _copy_leading(module: nn.Module, given: Mapping[str, Tensor], where: str) -> None:
    own = module.state_dict()
    for name, value in given.items():
        if any(n > m for n, m in zip(own[name].shape, value.shape)):
            raise UserError(
                f"tinyclip: in {where}, '{name}' is {tuple(own[name].shape)}, larger than the "
                f"{tuple(value.shape)} that it inherits from."
            )
        own[name].copy_(leading(value, own[name].shape))


# ---- what masks leave ------------------------------------------------------------------------------------------------


def kept(mask: Tensor) -> Tensor:
    """Positions of a mask that are not 0."""
    return mask.nonzero().flatten()


def folded_shape(shape: EncoderShape, masks: Masks) -> EncoderShape:
    """The shape of what masks leave of a transformer."""
    assert masks.channels is not None and masks.heads is not None and masks.hidden is not None
    heads, hidden = (tuple(len(kept(m)) for m in part) for part in (masks.heads, masks.hidden))
    return EncoderShape(len(kept(masks.channels)), heads, hidden, shape.head_dim, shape.activation, shape.eps)


@torch.no_grad()
def fold_encoder(ours: Encoder, theirs: Encoder, masks: Masks) -> None:
    """The layers of a masked transformer into one of its `folded_shape`, their masks multiplied into the weights."""
    z = masks.channels
    assert z is not None and masks.heads is not None and masks.hidden is not None
    channels = kept(z)
    for i, (new, old) in enumerate(zip(ours.layers, theirs.layers)):
        heads, units = kept(masks.heads[i]), kept(masks.hidden[i])
        rows = (heads[:, None] * theirs.shape.head_dim + torch.arange(theirs.shape.head_dim, device=z.device)).flatten()
        by_row = masks.heads[i][heads].repeat_interleave(theirs.shape.head_dim)
        for name in ("norm1", "norm2"):
            _set(
                new.get_submodule(name),
                old.get_parameter(f"{name}.weight")[channels],
                old.get_parameter(f"{name}.bias")[channels],
            )
        for name in ("query", "key", "value"):
            layer = old.get_submodule(f"attention.{name}")
            _set(
                new.get_submodule(f"attention.{name}"),
                _at(layer, "weight")[rows][:, channels],
                _at(layer, "bias")[rows],
            )
        out, fc1, fc2 = (old.get_submodule(n) for n in ("attention.out", "fc1", "fc2"))
        scale = z[channels]
        weight = _at(out, "weight")[channels][:, rows] * by_row * scale[:, None]
        _set(new.get_submodule("attention.out"), weight, _at(out, "bias")[channels] * scale)
        _set(new.get_submodule("fc1"), _at(fc1, "weight")[units][:, channels], _at(fc1, "bias")[units])
        weight = _at(fc2, "weight")[channels][:, units] * masks.hidden[i][units] * scale[:, None]
        _set(new.get_submodule("fc2"), weight, _at(fc2, "bias")[channels] * scale)


def _at(layer: nn.Module, name: str) -> Tensor:
    return layer.get_parameter(name)


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.get_parameter("weight").copy_(weight)
    layer.get_parameter("bias").copy_(bias)


@torch.no_grad()
def fold_image(ours: ImageEncoder, theirs: ImageEncoder, masks: Masks, scale_projection: bool = False) -> None:
    """A masked image half into one of its folded shape; its output is the same.

    Args:
        scale_projection: multiply the last projection by the channels' masks too, as the released code does; then the
            output is another.
    """
    assert masks.channels is not None
    channels, scale = kept(masks.channels), masks.channels[kept(masks.channels)]
    ours.patches.weight.copy_(theirs.patches.weight[channels] * scale[:, None, None, None])
    ours.first.copy_(theirs.first[channels] * scale)
    ours.positions.copy_(theirs.positions[:, channels] * scale)
    _fold_ends(ours, theirs, channels, scale, scale_projection)
    _set(ours.norm_before, theirs.norm_before.weight[channels], theirs.norm_before.bias[channels])
    fold_encoder(ours.encoder, theirs.encoder, masks)


@torch.no_grad()
def fold_text(ours: TextEncoder, theirs: TextEncoder, masks: Masks, scale_projection: bool = False) -> None:
    """As `fold_image`, of a text half."""
    assert masks.channels is not None
    channels, scale = kept(masks.channels), masks.channels[kept(masks.channels)]
    ours.tokens.weight.copy_(theirs.tokens.weight[:, channels] * scale)
    ours.positions.copy_(theirs.positions[:, channels] * scale)
    _fold_ends(ours, theirs, channels, scale, scale_projection)
    fold_encoder(ours.encoder, theirs.encoder, masks)


def _fold_ends(
    ours: ImageEncoder | TextEncoder, theirs: ImageEncoder | TextEncoder, channels: Tensor, scale: Tensor, scaled: bool
) -> None:
    _set(ours.norm_after, theirs.norm_after.weight[channels], theirs.norm_after.bias[channels])
    projection = theirs.projection.weight[:, channels]
    ours.projection.weight.copy_(projection * scale if scaled else projection)


def fold(
    network: Clip, masks: Mapping[str, Masks], input_shape: tuple[int, ...], scale_projection: bool = False
) -> Clip:
    """What masks leave of a CLIP, as a network of its own, with the output of the masked one (see `fold_image`).

    Args:
        masks: of the transformers `image` and `text`.
        input_shape: (C, H, W) of the images.
    """
    shapes = {name: plain(folded_shape(e.shape, masks[name])) for name, e in network.encoders.items()}
    options = {
        **network.options,
        "vision": {**shapes["image"], "patch": network.options["vision"]["patch"]},
        "text": shapes["text"],
    }
    small = Clip(**options, input_shape=input_shape).to(network.logit_scale.device)
    fold_image(small.image, network.image, masks["image"], scale_projection)
    fold_text(small.text, network.text, masks["text"], scale_projection)
    with torch.no_grad():
        small.logit_scale.copy_(network.logit_scale)
    return small
