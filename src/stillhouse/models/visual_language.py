"""`stillhouse:visual_language`: a frozen tower of CLIP, a projector, and a decoder of transformers: a LLaVA.

Liu et al., NeurIPS 2023 (2304.08485): patches of the tower's last layer but one, without the class token, through two
linear layers with GELU, stand before the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import MissingExtra, UserError
from stillhouse.models import sources
from stillhouse.models.registry import register
from stillhouse.nn.experts import upcycled


@register({"visual_language": {}})
class VisualLanguage(nn.Module):
    """Logits of text tokens, after those of an image.

    Args:
        tower: options of transformers' CLIPVisionConfig.
        decoder: options of the config of the decoder, with `model_type` (default: qwen2); or a spec of one of
            transformers (`model`, `pretrained`, `options`).
        experts: number of experts of a mixture; 0: none.
        mode: which layers are mixtures: sparse (every second), first_half, second_half, dense (all).
        factor, least, noisy: of a mixture (see `stillhouse.nn.experts.MixtureOfExperts`).
        layer: whose patches are read, counted from the end.
        vocabulary: tokens.
        num_classes: not read: it has no classes.
        input_shape: (C, H, W) of an image.
    """

    tower: Any
    decoder: Any

    def __init__(
        self,
        tower: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        experts: int = 0,
        mode: str = "sparse",
        factor: float = 1.5,
        least: int = 0,
        noisy: bool = True,
        layer: int = -2,
        vocabulary: int = 512,
        num_classes: int | None = None,
        input_shape: Sequence[int] = (3, 32, 32),
    ) -> None:
        super().__init__()
        transformers = _library()
        if input_shape[1] != input_shape[2]:
            raise UserError(f"A tower of CLIP takes square images; set data.image_size, not {list(input_shape[1:])}.")
        vision = {"image_size": input_shape[1], "num_channels": input_shape[0], **(tower or {})}
        self.tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
        self.decoder = _decoder(dict(decoder or {}), vocabulary)
        width = self.decoder.config.hidden_size
        if self.decoder.config.vocab_size < vocabulary:
            raise UserError(
                f"options.decoder has {self.decoder.config.vocab_size} tokens, but the tokenizer {vocabulary}; take "
                "the decoder's own tokenizer (data.options.tokenizer: hf:NAME)."
            )
        self.projector = nn.Sequential(
            nn.Linear(self.tower.config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.layer = layer
        self.tower.requires_grad_(False)
        if experts:
            upcycled(self.decoder.model.layers, width, mode, experts=experts, factor=factor, least=least, noisy=noisy)

    def train(self, mode: bool = True) -> VisualLanguage:
        """As `nn.Module.train`; the tower stays in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    @property
    def places(self) -> int:
        """Tokens of an image."""
        side = self.tower.config.image_size // self.tower.config.patch_size
        return int(side**2)

    def patches(self, images: Tensor) -> Tensor:
        """(B, P, D) of the frozen tower."""
        with torch.no_grad():
            hidden = self.tower(pixel_values=images, output_hidden_states=True).hidden_states[self.layer]
        patches: Tensor = hidden[:, 1:]
        return patches

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, patches: Tensor | None = None
    ) -> Tensor:
        """Logits (B, L, V) of texts (B, L) after images (B, C, H, W).

        Args:
            patches: of the tower, where they are known; the images are not looked at.
        """
        seen = self.projector(self.patches(pixel_values) if patches is None else patches)
        words = self.decoder.get_input_embeddings()(input_ids)
        mask = torch.cat([attention_mask.new_ones(seen.shape[:2]), attention_mask], 1)
        both = torch.cat([seen.to(words.dtype), words], 1)
        logits: Tensor = self.decoder(inputs_embeds=both, attention_mask=mask, use_cache=False).logits
        return logits[:, seen.shape[1] :]


def _decoder(options: dict[str, Any], vocabulary: int) -> nn.Module:
    """A causal language model of transformers."""
    if "model" not in options:
        kind = options.pop("model_type", "qwen2")
        return sources.from_transformers(
            f"config:{kind}", None, None, {"task": "causal", "vocab_size": vocabulary, **options}, False
        )
    spec = ModelSpec.model_validate(options)
    if not spec.model.startswith("hf:"):
        raise UserError(f"options.decoder: a decoder is a model of transformers, hf:…, not '{spec.model}'.")
    name = spec.model.removeprefix("hf:")
    return sources.from_transformers(name, None, None, {"task": "causal", **spec.options}, spec.pretrained)


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra("A decoder of transformers", "text") from None
    return transformers
