"""`stillhouse:two_towers`: any image classifier of timm or torchvision and any text encoder of transformers, each
behind a projection into one space.

Either may be frozen: then only its projection learns, and the encoder stays in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from stillhouse.config.messages import spell
from stillhouse.config.specs import ModelSpec
from stillhouse.functional.pictures import renormalise
from stillhouse.models.backbone import backbone
from stillhouse.models.registry import register
from stillhouse.models.sources import from_transformers
from stillhouse.models.weights import load_weights


class Tower(ModelSpec):
    """One of the two encoders, by name."""

    frozen: bool = Field(False, description="Train its projection alone.")


class ImageTower(Tower):
    """The image encoder."""

    size: int | None = Field(None, description="Its input is resized to this many pixels a side.")
    mean: tuple[float, ...] | None = Field(None, description="Its normalisation; default: the data's.")
    std: tuple[float, ...] | None = None


@register({"two_towers": {}})
class TwoTowers(nn.Module):
    """Embeds images and texts into one space of `dim` dimensions.

    Args:
        image: the image encoder, a spec (`model`, `checkpoint`, `pretrained`, `options`) that may also have `frozen`,
            and its own input (`size`, `mean`, `std`); a classifier, whose last layer is left out.
        text: the text encoder, a spec that may also have `frozen`; a model of transformers that gives hidden states,
            whose mean over the tokens of a text is its embedding.
        dim: dimensions of the common space.
        logit_scale: what cosines are multiplied by at first.
        normalised: mean and standard deviation per channel of the images that it is given.
        num_classes: not read: it has no classes.
        input_shape: (C, H, W) of the images that it is given.
    """

    def __init__(
        self,
        image: Mapping[str, Any],
        text: Mapping[str, Any],
        dim: int = 256,
        logit_scale: float = 1 / 0.07,
        normalised: tuple[Sequence[float], Sequence[float]] = ((), ()),
        num_classes: int | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
    ) -> None:
        super().__init__()
        picture, words = _spec(ImageTower, image, "image"), _spec(Tower, text, "text")
        self._frozen = (picture.frozen, words.frozen)
        self._given = (tuple(normalised[0]), tuple(normalised[1]))
        self._own = (picture.mean or self._given[0], picture.std or self._given[1])
        self._size = None if picture.size is None else (picture.size, picture.size)
        channels, *size = input_shape
        seen = (channels, *(self._size or size))
        self.image = backbone(ModelSpec.model_validate(picture.model_dump(include=set(ModelSpec.model_fields))), seen)
        arguments = {**words.options, "task": "features"}
        name = words.model.removeprefix("hf:")
        self.text = from_transformers(name, None, None, arguments, words.pretrained)
        if words.weights is not None:
            load_weights(self.text, words.weights.path, "text encoder", words.weights.rename)
        for tower, frozen in zip((self.image, self.text), self._frozen):
            tower.requires_grad_(not frozen)
        self.visual_projection = nn.Linear(self.image.width, dim, bias=False)
        self.text_projection = nn.Linear(cast(Any, self.text).config.hidden_size, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.train()

    def train(self, mode: bool = True) -> TwoTowers:
        """As `nn.Module.train`; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        for tower, frozen in zip((self.image, self.text), self._frozen):
            tower.train(mode and not frozen)
        return self

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, dim) of images (B, C, H, W)."""
        x = renormalise(pixel_values, self._given, self._own, self._size)
        with torch.no_grad() if self._frozen[0] else nullcontext():
            pooled = self.image(x)
        return self.visual_projection(pooled)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(T, dim) of texts: ids (T, L), and 1 where a token is a text's and not padding."""
        with torch.no_grad() if self._frozen[1] else nullcontext():
            hidden = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            inside = attention_mask[..., None].to(hidden.dtype)
            pooled = (hidden * inside).sum(1) / inside.sum(1).clamp_min(1)
        return self.text_projection(pooled)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)


def _spec(cls: type[Any], given: Mapping[str, Any], name: str) -> Any:
    try:
        return cls.model_validate(dict(given))
    except ValidationError as error:
        raise spell(error, cls, f"options.{name}") from None
