"""`stillhouse:fusion`: an image and a text encoder that embed into one space, and a fusion of both, which reads a text
with an image beside it: whether they belong together, and which words are masked.

The image encoder is timm's plain `VisionTransformer`; the text encoder and the fusion are the first and the last layers
of one BERT, the last with cross-attention. `begin_from` takes over the published weights of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stillhouse.errors import UserError, unknown
from stillhouse.models.registry import register
from stillhouse.nn.cross_encoder import CrossLayer, TextEmbeddings, WordHead, begin

VISION = {"width": 768, "layers": 12, "heads": 12, "patch": 16, "hidden": None}
TEXT = {"width": 768, "layers": 6, "heads": 12, "hidden": None, "fusion": 6}


@register({"fusion": {}})
class FusedEncoders(nn.Module):
    """Embeds images and texts into one space, and reads a text with an image.

    Args:
        vision: `width`, `layers`, `heads`, `patch` and `hidden` (default: 4 * width) of the image encoder.
        text: `width`, `layers`, `heads` and `hidden` of the text encoder, and `fusion`, the layers of the fusion.
        dim: of the common space.
        vocabulary, context: of the texts.
        temperature: what cosines are divided by at first; learned.
        dropout: of the text encoder and of the fusion.
        tied: whether masked words are scored by the embeddings of words, as BERT does.
        num_classes: not read: it has no classes.
        input_shape: (C, H, W).
    """

    def __init__(
        self,
        vision: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        dim: int = 256,
        vocabulary: int = 30522,
        context: int = 512,
        temperature: float = 0.07,
        dropout: float = 0.1,
        tied: bool = True,
        num_classes: int | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
    ) -> None:
        super().__init__()
        v, t = _filled(vision, VISION, "vision"), _filled(text, TEXT, "text")
        channels, *size = input_shape
        if any(side % v["patch"] for side in size):
            raise UserError(
                f"options.vision.patch: patches of {v['patch']} px do not divide an image of {size[0]} x {size[1]}."
            )
        self.visual_encoder = VisionTransformer(
            img_size=(size[0], size[1]),
            patch_size=v["patch"],
            in_chans=channels,
            num_classes=0,
            global_pool="",
            embed_dim=v["width"],
            depth=v["layers"],
            num_heads=v["heads"],
            mlp_ratio=v["hidden"] / v["width"],
        )
        width = t["width"]
        self.embeddings = TextEmbeddings(vocabulary, context, width, dropout)
        sizes = (width, t["heads"], t["hidden"])
        self.text_layers = nn.ModuleList(CrossLayer(*sizes, None, dropout) for _ in range(t["layers"]))
        self.fusion_layers = nn.ModuleList(CrossLayer(*sizes, v["width"], dropout) for _ in range(t["fusion"]))
        self.visual_projection, self.text_projection = nn.Linear(v["width"], dim), nn.Linear(width, dim)
        self.match_head, self.word_head = nn.Linear(width, 2), WordHead(width, vocabulary, tied)
        for part in (self.embeddings, self.text_layers, self.fusion_layers, self.match_head, self.word_head):
            begin(part)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of what cosines are multiplied by."""
        return -self.temperature.log()

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """(B, 1 + N, W) of images (B, C, H, W), the class token first."""
        found: Tensor = self.visual_encoder.forward_features(pixel_values)
        return found

    def text_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(T, L, W) of texts (T, L), from their own layers alone."""
        x: Tensor = self.embeddings(input_ids)
        mask = _readable(attention_mask)
        for layer in self.text_layers:
            x = layer(x, mask)
        return x

    def fused(self, text_tokens: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """(B, L, W) of texts as `text_tokens` gives them, each read with its image's tokens (B, 1 + N, W)."""
        x, mask = text_tokens, _readable(attention_mask)
        for layer in self.fusion_layers:
            x = layer(x, mask, image_tokens)
        return x

    def match(self, fused: Tensor) -> Tensor:
        """(B, 2) scores of whether image and text belong together: no, yes."""
        found: Tensor = self.match_head(fused[:, 0])
        return found

    def words(self, fused: Tensor) -> Tensor:
        """(…, V) scores of words at tokens (…, W)."""
        found: Tensor = self.word_head(fused, self.embeddings.word_embeddings.weight)
        return found

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, dim) of images."""
        found: Tensor = self.visual_projection(self.image_tokens(pixel_values)[:, 0])
        return found

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(T, dim) of texts."""
        found: Tensor = self.text_projection(self.text_tokens(input_ids, attention_mask)[:, 0])
        return found

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)


def _readable(attention_mask: Tensor) -> Tensor:
    """(T, 1, 1, L), true where a token is no padding."""
    return attention_mask.bool()[:, None, None]


def _filled(given: Mapping[str, Any] | None, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in given or {}:
        if key not in defaults:
            raise unknown("option", f"options.{where}.{key}", [f"options.{where}.{k}" for k in defaults])
    found = {**defaults, **(given or {})}
    found["hidden"] = found["hidden"] or 4 * found["width"]
    if found["width"] % found["heads"]:
        raise UserError(f"options.{where}: {found['heads']} heads do not divide the width {found['width']}.")
    return found


# ---- published weights -----------------------------------------------------------------------------------------------

BERT = (
    (r"^bert\.", ""),
    (r"^embeddings\.(?!position_ids)", "embeddings."),
    (r"^cls\.predictions\.transform\.", "word_head."),
    (r"^cls\.predictions\.bias$", "word_head.bias"),
    (r"^cls\.predictions\.decoder\.weight$", "word_head.weight"),
)
"""Names of transformers' BERT with its head for masked words -> ours, in order; its layers are counted through."""


def renamed_from_bert(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A BERT's weights in our names.

    Args:
        state: its state dict.
        layers: how many of its layers are the text encoder; the others are the fusion.
    """
    out = {}
    for name, value in state.items():
        for pattern, new in BERT:
            name = re.sub(pattern, new, name)
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.*)", name)
        if match is not None:
            i = int(match[1])
            half = f"text_layers.{i}" if i < layers else f"fusion_layers.{i - layers}"
            name = f"{half}.{match[2]}"
        out[name] = value
    dropped = ("pooler.", "cls.", "embeddings.position_ids")
    return {k: v for k, v in out.items() if not k.startswith(dropped)}


def begin_from(network: FusedEncoders, image: nn.Module | None = None, text: nn.Module | None = None) -> None:
    """Take over the weights of trained encoders, where they are given.

    Args:
        network: changed in place; what neither has (cross-attention, projections, the head of matching) stays.
        image: a plain vision transformer of timm.
        text: a BERT of transformers with its head for masked words.

    Raises:
        UserError: an encoder of another shape.
    """
    if image is not None:
        state = {f"visual_encoder.{k}": v for k, v in image.state_dict().items() if not k.startswith("head")}
        _take(network, state, [k for k in network.state_dict() if k.startswith("visual_encoder.")], "image")
    if text is not None:
        state = renamed_from_bert(text.state_dict(), len(network.text_layers))
        own = ("embeddings.", "text_layers.", "fusion_layers.", "word_head.")
        wanted = [k for k in network.state_dict() if k.startswith(own) and ".crossattention." not in k]
        ours = network.state_dict()
        places = "embeddings.position_embeddings.weight"
        if places in state:
            state[places] = state[places][: len(ours[places])]
        for name in ("embeddings.word_embeddings.weight", "word_head.bias", "word_head.weight"):
            if (
                name in state and name in ours and len(state[name]) < len(ours[name])
            ):  # a tokenizer with marks of its own
                state[name] = torch.cat([state[name], ours[name][len(state[name]) :]])
        _take(network, state, wanted, "text")


def _take(network: nn.Module, state: Mapping[str, Tensor], wanted: list[str], which: str) -> None:
    ours = network.state_dict()
    wrong = next((k for k in wanted if k not in state or state[k].shape != ours[k].shape), None)
    if wrong is not None:
        theirs = tuple(state[wrong].shape) if wrong in state else "not there"
        raise UserError(
            f"The {which} encoder to begin from does not fit: '{wrong}' is {tuple(ours[wrong].shape)} here, and in its "
            f"weights {theirs}; give the network its shape (options.{'vision' if which == 'image' else 'text'})."
        )
    network.load_state_dict({k: state[k] for k in wanted}, strict=False)
