"""`HybridGenerator`: a base model and its few-step student, sampled together; and a slider for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec, Spec
from stillhouse.generation.config import SamplerSpec
from stillhouse.generation.denoising import Denoiser
from stillhouse.generation.judging import evaluate as evaluate_generator
from stillhouse.generation.product import Generator, further_noise, write_weights
from stillhouse.methods.generation.distill_diversity.adapters import adapters_for, attached
from stillhouse.methods.generation.distill_diversity.hybrid import Drawn, hybrid_sample
from stillhouse.models import build, load_weights
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating

BASE, SLIDER = "base.safetensors", "slider.safetensors"


class HybridSpec(Spec):
    """How base and student are sampled together."""

    begin: int = Field(1, ge=0, description="k: the student's first step; 0: the student alone; its last: the base.")
    base_sampler: SamplerSpec | None = Field(
        None, description="The base's; null: the student's own, without guidance, as the paper has it."
    )
    guidance: float = Field(0.0, ge=0, description="Of the student; up to 1: none.")
    stop: int | None = Field(None, ge=0, description="Steps of the base; null: up to the nearest to the student's.")


class AdapterSpec(Spec):
    """Adapters of low rank."""

    rank: int = Field(4, ge=1)
    alpha: float = Field(1.0, gt=0)
    without: list[str] = Field(
        default_factory=lambda: ["step", "label", "modulation"],
        description="Layers whose names hold one of these have none: those of the time, and of the prompt.",
    )

    def build(self, module: nn.Module) -> nn.ModuleDict:
        """New adapters, which do nothing yet."""
        return adapters_for(module, self.without, self.rank, self.alpha)


@dataclass
class HybridGenerator(Generator):
    """The product of distill_diversity: `module` is the student.

    Attributes:
        base: the base model's network.
        hybrid: how both are sampled.
        adapter: the form of the slider.
        slider: its weights, which fit both networks; None: there is none.
    """

    kind: ClassVar[str] = "stillhouse.methods.generation.distill_diversity:HybridGenerator"
    base: nn.Module = field(default_factory=nn.Module)
    hybrid: HybridSpec = field(default_factory=HybridSpec)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    slider: nn.ModuleDict | None = None

    def sampled(self, noise: Tensor, label: Tensor, begin: int | None = None, *, slide: float = 0.0) -> Drawn:
        """Samples (B, ...) of noise and prompts (B,).

        Args:
            begin: the student's first step; None: the product's own.
            slide: scale of the slider, on both networks.
        """
        student = self.denoiser
        base = Denoiser(self.base, self.predicts, student.schedule, student.prompts)
        own = self.sampler.build(student.schedule, self.predicts)
        spec = self.hybrid
        its = self.sampler if spec.base_sampler is None else spec.base_sampler
        alone = begin is not None  # asked for by name, so the override of the recipe does not count
        with evaluating(self.module), evaluating(self.base):
            networks = [self.module, self.base] if slide and self.slider is not None else []
            with _sliding(networks, self.slider, slide):
                return hybrid_sample(
                    base.denoise(label, 0.0 if spec.base_sampler is None else its.guidance),
                    student.denoise(label, spec.guidance),
                    its.build(base.schedule, self.predicts),
                    own,
                    noise,
                    spec.begin if begin is None else begin,
                    stop=None if alone else spec.stop,
                    fresh=further_noise(noise),
                )

    def draw(self, noise: Tensor, label: Tensor) -> Tensor:
        return self.sampled(noise, label).x

    def save(self, folder: Path) -> None:
        super().save(folder)
        write_weights(self.base, folder / BASE)
        if self.slider is not None:
            write_weights(self.slider, folder / SLIDER)

    def extras(self) -> dict[str, Any]:
        return {
            "hybrid": self.hybrid.model_dump(mode="json"),
            "adapter": self.adapter.model_dump(mode="json"),
            "slider": self.slider is not None,
        }

    @classmethod
    def restored(cls, meta: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        model = ModelSpec.model_validate(meta["model"])
        base = build(model, len(meta["prompts"]["names"]), tuple(meta["look"]["shape"]))
        load_weights(base, folder / BASE, owner=f"model {model.model}")
        adapter = AdapterSpec.model_validate(meta["adapter"])
        slider = adapter.build(base) if meta["slider"] else None
        if slider is not None:
            load_weights(slider, folder / SLIDER, owner="slider")
        hybrid = HybridSpec.model_validate(meta["hybrid"])
        return {"base": base.eval(), "hybrid": hybrid, "adapter": adapter, "slider": slider}


class _sliding:
    """Several networks with one slider."""

    def __init__(self, networks: list[nn.Module], slider: nn.ModuleDict | None, scale: float) -> None:
        self._inner = [attached(n, dict(slider.items()), scale) for n in networks] if slider is not None else []

    def __enter__(self) -> None:
        for each in self._inner:
            each.__enter__()

    def __exit__(self, *error: object) -> None:
        for each in reversed(self._inner):
            each.__exit__(None, None, None)


@evaluates(HybridGenerator.kind)
def evaluate(product: HybridGenerator, run: Run) -> dict[str, float]:
    """As of every generator; the base's weights count too."""
    product.base.to(run.device)
    found = evaluate_generator(product, run)
    return found | {"parameters": found["parameters"] + sum(p.numel() for p in product.base.parameters())}
