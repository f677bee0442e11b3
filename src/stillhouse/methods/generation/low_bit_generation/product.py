"""`LowBitGenerator`: a quantised generator to keep, which draws images of classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.errors import unknown
from stillhouse.files import atomic_write
from stillhouse.generation.product import Look, write_weights
from stillhouse.methods.generation.low_bit_generation.forms import DiffusionSpec, denoised, diffusion_network
from stillhouse.methods.generation.low_bit_generation.grids import add_input_grids
from stillhouse.methods.generation.low_bit_generation.network import GeneratorSpec, SamplerSpec, sample
from stillhouse.methods.generation.low_bit_generation.tokenizer import ImageTokenizer, TokenizerSpec
from stillhouse.nn import quantise
from stillhouse.nn.quantise import PackedTensor
from stillhouse.randomness import generator, key
from stillhouse.runs.products import Product, read_meta

WEIGHTS, TOKENIZER = "generator.safetensors", "tokenizer.safetensors"
AT_ONCE = 256  # images drawn together
SHOWN = 8  # images of a prompt in a picture


class Blueprint(Spec):
    """All that a generator is built from but its weights."""

    generator: GeneratorSpec = Field(description="Its size.")
    tokenizer: TokenizerSpec | None = Field(None, description="Of a model of tokens.")
    diffusion: DiffusionSpec | None = Field(None, description="Of a diffusion model.")
    sampler: SamplerSpec = Field(default_factory=SamplerSpec, description="How tokens are drawn.")
    shape: tuple[int, int, int] = Field(description="(C, H, W) of an image.")
    prompts: list[str] = Field(description="What it draws.")
    mean: tuple[float, ...] = Field(description="Of images in [0, 1], per channel.")
    std: tuple[float, ...] = Field(description="Likewise.")
    inputs: list[str] = Field(default_factory=list, description="Layers with a grid for their inputs.")
    input_bits: int | None = Field(None, description="Of that grid; none: inputs are smoothed alone.")

    @property
    def look(self) -> Look:
        """How its images become pictures."""
        return Look(self.shape, self.mean, self.std)

    def networks(self) -> tuple[nn.Module, ImageTokenizer | None]:
        """A new generator, without grids, and its tokenizer."""
        count, g = len(self.prompts), self.generator
        if self.diffusion is not None:
            return diffusion_network(self.diffusion, g.width, g.depth, g.heads, count, self.shape), None
        assert self.tokenizer is not None
        tokenizer = ImageTokenizer(self.tokenizer, self.shape)
        return g.build(tokenizer, count), tokenizer


@torch.no_grad()
def drawn_images(
    blueprint: Blueprint,
    network: nn.Module,
    tokenizer: ImageTokenizer | None,
    label: Tensor,
    seed: int,
    sampler: SamplerSpec | None = None,
) -> Tensor:
    """Normalised images (B, C, H, W) of prompts (B,): the same draws for the same seed, whatever the network."""
    parts = []
    for number, some in enumerate(label.split(AT_ONCE)):
        draw = generator(seed, "images", number)
        if blueprint.diffusion is not None:
            noise = torch.randn(len(some), *blueprint.shape, generator=draw).to(label.device)
            parts.append(denoised(network, some, blueprint.diffusion, noise, len(blueprint.prompts)))
        else:
            assert tokenizer is not None
            how = sampler or blueprint.sampler
            codes = sample(network, some, how, draw, tokenizer.lengths, len(blueprint.prompts))
            parts.append(tokenizer.decode(codes))
    return torch.cat(parts)


@dataclass
class LowBitGenerator(Product):
    """A generator whose weights are stored as packed codes and scales; loaded, it is the plain network with these
    weights, and with grids for its inputs where activations are quantised.

    Attributes:
        module: the network.
        tokenizer: of a model of tokens.
        blueprint: what both are built from.
        codes: of each quantised weight, by its name.
        figures: of its making; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "stillhouse.methods.generation.low_bit_generation:LowBitGenerator"
    formats: ClassVar[Mapping[str, str]] = {"samples": "samples", "safetensors": WEIGHTS}
    reads = "texts"
    module: nn.Module
    tokenizer: ImageTokenizer | None
    blueprint: Blueprint
    codes: dict[str, PackedTensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def samples(self, prompt: str, count: int = SHOWN, seed: int = 0, sampler: SamplerSpec | None = None) -> Tensor:
        """(count, C, H, W) images of a prompt, normalised as the data. Raises `UserError` for a prompt that it does not
        know."""
        if prompt not in self.blueprint.prompts:
            raise unknown("prompt", prompt, self.blueprint.prompts)
        number = self.blueprint.prompts.index(prompt)
        label = torch.full((count,), number, device=next(self.module.parameters()).device)
        return drawn_images(self.blueprint, self.module, self.tokenizer, label, key("predict", prompt, seed), sampler)

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each prompt: how many images, and `picture`, a row of them."""
        return [{"samples": SHOWN, "picture": self.blueprint.look.grid(self.samples(str(t)))} for t in inputs]

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        state = {n: v.detach().cpu() for n, v in self.module.state_dict().items()}
        quantise.save(self.codes, {n: v for n, v in state.items() if n not in self.codes}, folder / WEIGHTS)
        if self.tokenizer is not None:
            with atomic_write(folder / TOKENIZER) as temporary:
                held = {n: v.detach().cpu().contiguous() for n, v in self.tokenizer.state_dict().items()}
                save_file(held, str(temporary))
        meta = {"kind": self.kind, "format": 1, "blueprint": self.blueprint.model_dump(mode="json")}
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> LowBitGenerator:
        from safetensors.torch import load_file

        blueprint = Blueprint.model_validate(read_meta(folder)["blueprint"])
        network, tokenizer = blueprint.networks()
        add_input_grids(network, blueprint.inputs, blueprint.input_bits)
        codes, others = quantise.load(Path(folder) / WEIGHTS)
        network.load_state_dict({**others, **{name: code.unpack() for name, code in codes.items()}})
        if tokenizer is not None:
            tokenizer.load_state_dict(load_file(str(Path(folder) / TOKENIZER)))
            tokenizer.eval()
        return cls(network.eval(), tokenizer, blueprint, codes)

    def export(self, to: str, path: Path) -> list[str]:
        """`samples`: a row of images of each prompt as PNG files; `safetensors`: the quantised weights as plain
        tensors."""
        if to == "safetensors":
            write_weights(self.module, path)
            return [f"Wrote {path}"]
        from torchvision.io import write_png

        path.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(self.blueprint.prompts):
            write_png(self.predict([name])[0]["picture"], str(path / f"{number:03d}.png"))
        return [f"Wrote a row of images for each of {len(self.blueprint.prompts)} prompts to {path}"]
