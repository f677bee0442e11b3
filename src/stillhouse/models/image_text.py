"""Networks that embed images and texts into one space: how they are called, whatever library they come from.

Such a network has `get_image_features(pixel_values=…)`, `get_text_features(input_ids=…, attention_mask=…)` and the
parameter `logit_scale`, the logarithm of what cosines are multiplied by: the CLIP and SigLIP families of transformers
have, and `stillhouse:two_towers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.models import build
from stillhouse.models.tokenizer import encode, marks

LARGEST_SCALE = 100.0
"""Cosines are multiplied by no more than this (Radford et al. 2021, section 2.5)."""
_METHODS = ("get_image_features", "get_text_features", "logit_scale")


def check(model: nn.Module, name: str) -> None:
    """Raises `UserError` for a network that does not embed images and texts."""
    missing = [m for m in _METHODS if not hasattr(model, m)]
    if missing:
        raise UserError(
            f"'{name}' is a {type(model).__name__}, which does not embed images and texts (it has no {missing[0]}); "
            "take a CLIP or SigLIP of transformers, such as hf:config:clip, or stillhouse:two_towers."
        )


def image_features(model: Any, images: Tensor) -> Tensor:
    """(B, D) embeddings of images (B, C, H, W), before they are normalised."""
    return _pooled(model.get_image_features(pixel_values=images))


def text_features(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    """(T, D) embeddings of texts, before they are normalised; `tokens` holds input_ids (T, L) and, for encoders that
    read it, attention_mask (T, L)."""
    config = getattr(model, "config", None)
    if str(getattr(config, "model_type", "")).startswith("siglip"):
        tokens = _to_the_end(tokens["input_ids"], cast(Any, config).text_config)
    return _pooled(model.get_text_features(**tokens))


def _to_the_end(ids: Tensor, config: Any) -> dict[str, Tensor]:
    """Texts as SigLIP was trained on them: padded to all its positions, of which it pools the last, and read whole."""
    missing = config.max_position_embeddings - ids.shape[1]
    return {"input_ids": F.pad(ids, (0, missing), value=config.pad_token_id or 0)}


def scale(model: Any) -> Tensor:
    """What cosines are multiplied by, (): the exponential of `logit_scale`, in float32, at most `LARGEST_SCALE`."""
    value: Tensor = model.logit_scale.float().reshape(())
    return value.clamp(max=math.log(LARGEST_SCALE)).exp()


def bias(model: Any) -> Tensor | None:
    """What is added to scaled cosines, (): SigLIP's `logit_bias`; None where there is none."""
    value = getattr(model, "logit_bias", None)
    return None if value is None else value.float().reshape(())


@torch.no_grad()
def clamp_scale(model: Any) -> None:
    """Put `logit_scale` back to at most the logarithm of `LARGEST_SCALE`, where it is trained."""
    if model.logit_scale.requires_grad:
        model.logit_scale.clamp_(max=math.log(LARGEST_SCALE))


def prompt_ids(tokenizer: Any, names: Sequence[str], prompts: int, context: int) -> tuple[Tensor, Tensor]:
    """Ids (C, L) of a begin mark, places for prompts, a class name, a full stop and an end mark, padded; and the places
    (C,) of the end marks.

    Raises:
        UserError: a name that is too long for the context.
    """
    begin, close = marks(tokenizer)
    place = tokenizer.pad_token_id
    bodies = encode(tokenizer, [f"{name.replace('_', ' ')}." for name in names])
    rows = [begin[-1:] + [place] * prompts + body + close[:1] for body in bodies]
    length = max(map(len, rows))
    if length > context:
        raise UserError(f"A class name with {prompts} prompts has {length} tokens, more than the {context} of a text.")
    ids = torch.tensor([row + [place] * (length - len(row)) for row in rows])
    return ids, torch.tensor([len(row) - 1 for row in rows])


def prompt_words(tokenizer: Any, prompts: int) -> Tensor:
    """(prompts,) ids of the first tokens of "a photo of a", which prompts begin as; the last again where there are too
    few."""
    ids = encode(tokenizer, ["a photo of a"])[0][:prompts]
    return torch.tensor(ids + ids[-1:] * (prompts - len(ids)))


class ImageTower(nn.Module):
    """The image half of a network that embeds images and texts: (B, C, H, W) to (B, D), before it is normalised.

    Args:
        network: the whole; its text half is dropped.
        example: an input of one image, (1, C, H, W).

    Attributes:
        width: D.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        super().__init__()
        for name in _TEXT_PARTS:
            if hasattr(network, name):
                setattr(network, name, nn.Identity() if isinstance(getattr(network, name), nn.Module) else None)
        self.network = network
        mode = network.training
        with torch.no_grad():
            self.width = int(image_features(network.eval(), example).shape[-1])
        network.train(mode)

    def forward(self, images: Tensor) -> Tensor:
        return image_features(self.network, images)


def image_tower(spec: ModelSpec, shape: tuple[int, ...]) -> ImageTower:
    """The image half of the network of a spec, without weights; the text half of a fresh one is built as small as it
    gets before it is dropped."""
    options = dict(spec.options)
    if spec.model == "stillhouse:two_towers":
        options["text"] = {"model": "hf:config:bert", "options": _NO_TEXT}
    elif spec.model.startswith("hf:config:"):
        vision = {"image_size": shape[1], "num_channels": shape[0], **options.get("vision_config", {})}
        options |= {"task": "features", "text_config": _NO_TEXT, "vision_config": vision}
    elif spec.model.startswith("hf:"):
        options = {"task": "features", **options}
    plain = spec.model_copy(update={"options": options, "checkpoint": None, "pretrained": False})
    return ImageTower(build(plain, None, shape), torch.zeros(1, *shape))


_TEXT_PARTS = ("text_model", "text", "text_projection", "logit_scale", "logit_bias")
_NO_TEXT = {
    "vocab_size": 128,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _pooled(output: Any) -> Tensor:
    """Features as a tensor: transformers 5 gives an output object, earlier versions a tensor."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found
