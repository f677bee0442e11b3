"""`stillhouse:clip`: CLIP with transformers of any shape, made fresh, from a CLIP of transformers, or from weights in
the names of OpenAI and open_clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.registry import register
from stillhouse.models.weights import layout
from stillhouse.nn.clip import NO_MASKS, Encoder, EncoderShape, ImageEncoder, Masks, TextEncoder

START = 1 / 0.07


@register({"clip": {}})
class Clip(nn.Module):
    """Embeds images and texts into one space.

    Args:
        vision, text: shapes of the two transformers: `width`, `layers`, `heads` (of each layer, or a list by layer),
            `hidden` (likewise; default: 4 * width), `head_dim` (default: width / heads), `activation`, `eps`; of the
            vision `patch`.
        dim: of the embedding.
        vocabulary, context: of the texts.
        num_classes: not read: it has no classes.
        input_shape: (C, H, W).
    """

    def __init__(
        self,
        vision: Mapping[str, Any],
        text: Mapping[str, Any],
        dim: int = 512,
        vocabulary: int = 49408,
        context: int = 77,
        num_classes: int | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
    ) -> None:
        super().__init__()
        channels, size = input_shape[0], input_shape[1]
        patch = int(dict(vision).get("patch", 16))
        shape = shape_of({k: v for k, v in vision.items() if k != "patch"}, "vision")
        self.image = ImageEncoder(shape, size, patch, dim, channels)
        self.text = TextEncoder(shape_of(text, "text"), vocabulary, context, dim)
        self.logit_scale = nn.Parameter(torch.tensor(START).log())

    @property
    def options(self) -> dict[str, Any]:
        """The options that build this shape again."""
        return {
            "vision": {**plain(self.image.encoder.shape), "patch": self.image.patches.kernel_size[0]},
            "text": plain(self.text.encoder.shape),
            "dim": self.image.projection.out_features,
            "vocabulary": self.text.tokens.num_embeddings,
            "context": len(self.text.positions),
        }

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The two transformers by name."""
        return {"image": self.image.encoder, "text": self.text.encoder}

    def get_image_features(self, pixel_values: Tensor, masks: Masks = NO_MASKS) -> Tensor:
        """(B, dim) of images (B, C, H, W)."""
        found: Tensor = self.image(pixel_values, masks)
        return found

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, masks: Masks = NO_MASKS) -> Tensor:
        """(T, dim) of texts, ids and mask (T, L)."""
        found: Tensor = self.text(input_ids, attention_mask, masks)
        return found

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)


def shape_of(given: Mapping[str, Any], where: str) -> EncoderShape:
    """A transformer's shape from a recipe's words.

    Raises:
        UserError: a key that is none, lists of different lengths, or a width that the heads do not divide.
    """
    known = {"width", "layers", "heads", "hidden", "head_dim", "activation", "eps"}
    wrong = [k for k in given if k not in known]
    if wrong or "width" not in given or "heads" not in given:
        raise UserError(
            f"options.{where} needs width and heads, and may have {', '.join(sorted(known - {'width', 'heads'}))}"
            + (f"; '{wrong[0]}' is none of them." if wrong else ".")
        )
    width, heads = int(given["width"]), given["heads"]
    layers = int(given.get("layers", len(heads) if isinstance(heads, list | tuple) else 1))
    hidden = given.get("hidden", 4 * width)
    lists = [tuple(x) if isinstance(x, list | tuple) else (int(x),) * layers for x in (heads, hidden)]
    if any(len(x) != layers for x in lists):
        raise UserError(f"options.{where}: heads and hidden must be numbers, or lists of {layers}, one a layer.")
    head_dim = int(given.get("head_dim", width // max(lists[0][0], 1)))
    if "head_dim" not in given and head_dim * lists[0][0] != width:
        raise UserError(f"options.{where}: {lists[0][0]} heads do not divide the width {width}; give head_dim.")
    activation, eps = str(given.get("activation", "gelu")), float(given.get("eps", 1e-5))
    return EncoderShape(width, lists[0], lists[1], head_dim, activation, eps)


def plain(shape: EncoderShape) -> dict[str, Any]:
    """A shape as the options that give it."""
    return {
        "width": shape.width,
        "layers": len(shape.heads),
        "heads": list(shape.heads),
        "hidden": list(shape.hidden),
        "head_dim": shape.head_dim,
        "activation": shape.activation,
        "eps": shape.eps,
    }


# ---- from other libraries --------------------------------------------------------------------------------------------

_FULL: dict[str, str] = {"q": "query", "k": "key", "v": "value"}
TRANSFORMERS: tuple[tuple[str, Any], ...] = (
    (r"^vision_model\.embeddings\.class_embedding$", "image.first"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "image.patches."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "image.positions"),
    (r"^vision_model\.pre_layrnorm\.", "image.norm_before."),
    (r"^vision_model\.post_layernorm\.", "image.norm_after."),
    (r"^visual_projection\.", "image.projection."),
    (r"^text_model\.embeddings\.token_embedding\.", "text.tokens."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "text.positions"),
    (r"^text_model\.final_layer_norm\.", "text.norm_after."),
    (r"^text_projection\.", "text.projection."),
    (r"^vision_model\.", "image."),
    (r"^text_model\.", "text."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.mlp\.fc(\d)\.", r".fc\1."),
    (r"\.self_attn\.(query|key|value|q|k|v)_proj\.", lambda m: f".attention.{_FULL.get(m[1], m[1])}."),
    (r"\.self_attn\.out_proj\.", ".attention.out."),
)
"""Names of transformers' CLIP -> ours, in order."""

OPENAI = (
    (r"^text\.(?=transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text_projection$)", ""),
    (r"^visual\.class_embedding$", "image.first"),
    (r"^visual\.positional_embedding$", "image.positions"),
    (r"^visual\.conv1\.", "image.patches."),
    (r"^visual\.ln_pre\.", "image.norm_before."),
    (r"^visual\.ln_post\.", "image.norm_after."),
    (r"^visual\.transformer\.resblocks\.", "image.encoder.layers."),
    (r"^token_embedding\.", "text.tokens."),
    (r"^positional_embedding$", "text.positions"),
    (r"^ln_final\.", "text.norm_after."),
    (r"^transformer\.resblocks\.", "text.encoder.layers."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.mlp\.c_fc\.", ".fc1."),
    (r"\.mlp\.c_proj\.", ".fc2."),
    (r"\.attn\.out_proj\.", ".attention.out."),
)
"""Names of OpenAI's and open_clip's CLIP -> ours; projections are transposed, and q, k and v lie in one matrix."""


def renamed_from_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the names of OpenAI's and open_clip's CLIP, in ours."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ("visual.proj", "text_projection", "text.text_projection"):
            out["image.projection.weight" if name == "visual.proj" else "text.projection.weight"] = value.T.contiguous()
            continue
        new = _renamed(name, OPENAI)
        match = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", new)
        if match is None:
            out[new] = value
            continue
        for part, rows in zip(("query", "key", "value"), value.chunk(3)):
            out[f"{match[1]}.attention.{part}.{match[2]}"] = rows.contiguous()
    return {k: v for k, v in out.items() if k not in ("input_resolution", "context_length", "vocab_size", "attn_mask")}


layout("open_clip", renamed_from_openai)


def _renamed(name: str, rules: Any) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def from_transformers(model: Any) -> Clip:
    """A CLIP of transformers in our form, with the same weights and outputs.

    Raises:
        UserError: a network that is no CLIP of transformers.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", "") != "clip" or not hasattr(model, "text_model"):
        raise UserError(f"A CLIP of transformers is needed here (hf:config:clip), not a {type(model).__name__}.")
    vision, text = model.config.vision_config, model.config.text_config
    net = Clip(
        {**_config_shape(vision), "patch": vision.patch_size},
        _config_shape(text),
        model.config.projection_dim,
        text.vocab_size,
        text.max_position_embeddings,
        input_shape=(vision.num_channels, vision.image_size, vision.image_size),
    )
    state = {_renamed(k, TRANSFORMERS): v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    net.load_state_dict(state)
    return net.train(model.training)


def _config_shape(config: Any) -> dict[str, Any]:
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "hidden": config.intermediate_size,
        "activation": config.hidden_act,
        "eps": config.layer_norm_eps,
    }


def as_clip(model: nn.Module) -> Clip:
    """The network itself where it is ours, else a CLIP of transformers in our form. Raises as `from_transformers`."""
    return model if isinstance(model, Clip) else from_transformers(model)
