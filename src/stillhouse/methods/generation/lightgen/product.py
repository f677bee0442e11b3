"""`CaptionGenerator`: a masked generator to keep, which draws images of captions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Spec
from stillhouse.errors import unknown
from stillhouse.files import atomic_write
from stillhouse.generation.product import Look, write_weights
from stillhouse.methods.generation.lightgen.captions import TextSpec, embedded
from stillhouse.methods.generation.lightgen.network import MaskedGenerator, NetworkSpec, SamplingSpec
from stillhouse.randomness import generator, key
from stillhouse.runs.products import Product, read_meta
from stillhouse.signals import evaluating

WEIGHTS, TEXTS = "generator.safetensors", "texts.safetensors"
SHOWN = 8


class Blueprint(Spec):
    """All that a generator is built from but its weights."""

    network: NetworkSpec = Field(description="Its size.")
    sampling: SamplingSpec = Field(description="How it draws.")
    text: TextSpec = Field(description="The text encoder.")
    text_width: int = Field(description="Dt.")
    captions: list[str] = Field(description="What it was made for.")
    shape: tuple[int, int, int] = Field(description="(C, H, W) of an image.")
    mean: tuple[float, ...] = Field(description="Of images in [0, 1], per channel.")
    std: tuple[float, ...] = Field(description="Likewise.")

    @property
    def look(self) -> Look:
        """How its images become pictures."""
        return Look(self.shape, self.mean, self.std)

    def build(self) -> MaskedGenerator:
        """A new generator, initialised by torch's generator."""
        return MaskedGenerator(self.network, self.shape[0], self.shape[1], self.text_width)


def drawn(network: MaskedGenerator, text: Tensor, sampling: SamplingSpec, *keys: int | str) -> Tensor:
    """Images (B, C, H, W) of texts (B, M, Dt): a function of the keys."""
    draw = generator("draw", *keys)
    orders = torch.rand(len(text), network.length, generator=draw).argsort(1).to(text.device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(text.device)

    with evaluating(network):
        return network.sample(text, orders, sampling, normal)


@dataclass
class CaptionGenerator(Product):
    """The product of LightGen.

    Attributes:
        module: the generator.
        blueprint: what it is built from.
        texts: (P, M, Dt) features of its captions.
        figures: of its making; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "stillhouse.methods.generation.lightgen:CaptionGenerator"
    formats: ClassVar[Mapping[str, str]] = {"samples": "samples", "safetensors": WEIGHTS}
    reads = "texts"
    module: MaskedGenerator
    blueprint: Blueprint
    texts: Tensor
    figures: dict[str, float] = field(default_factory=dict)

    def features(self, caption: str) -> Tensor:
        """(M, Dt) of a caption. Raises `UserError` for one that is not stored, where the text encoder is a model."""
        if caption in self.blueprint.captions:
            return self.texts[self.blueprint.captions.index(caption)]
        if self.blueprint.text.model != "words":
            raise unknown("caption", caption, self.blueprint.captions)
        return embedded([caption], self.blueprint.text, Path())[0]

    def samples(self, caption: str, count: int = SHOWN, seed: int = 0) -> Tensor:
        """(count, C, H, W) images of a caption, normalised as the data."""
        text = self.features(caption).expand(count, -1, -1).to(next(self.module.parameters()).device)
        return drawn(self.module, text, self.blueprint.sampling, "predict", key(caption, seed))

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each caption: how many images, and `picture`, a row of them."""
        return [{"samples": SHOWN, "picture": self.blueprint.look.grid(self.samples(str(t)))} for t in inputs]

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        write_weights(self.module, folder / WEIGHTS)
        with atomic_write(folder / TEXTS) as temporary:
            save_file({"texts": self.texts.cpu().contiguous()}, str(temporary))
        meta = {"kind": self.kind, "format": 1, "blueprint": self.blueprint.model_dump(mode="json")}
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> CaptionGenerator:
        from safetensors.torch import load_file

        blueprint = Blueprint.model_validate(read_meta(folder)["blueprint"])
        module = blueprint.build()
        module.load_state_dict(load_file(str(Path(folder) / WEIGHTS)))
        return cls(module.eval(), blueprint, load_file(str(Path(folder) / TEXTS))["texts"])

    def export(self, to: str, path: Path) -> list[str]:
        """`samples`: a row of images of each of the first captions as PNG files; `safetensors`: the tensors."""
        if to == "safetensors":
            write_weights(self.module, path)
            return [f"Wrote {path}"]
        from torchvision.io import write_png

        path.mkdir(parents=True, exist_ok=True)
        shown = self.blueprint.captions[: 4 * SHOWN]
        for number, caption in enumerate(shown):
            write_png(self.predict([caption])[0]["picture"], str(path / f"{number:03d}.png"))
        return [f"Wrote a row of images for each of {len(shown)} captions to {path}"]
