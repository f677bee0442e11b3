"""`Generator`: a denoiser with its sampler and its prompts, to keep: it draws samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.functional.diffusion import Parametrisation, sample
from stillhouse.functional.pictures import unnormalise, with_channels
from stillhouse.generation.config import Prompts, SamplerSpec, ScheduleSpec
from stillhouse.generation.denoising import Denoiser
from stillhouse.models import build, load_weights
from stillhouse.randomness import generator
from stillhouse.runs.gallery import FOLDER, write_pictures
from stillhouse.runs.products import Product, read_meta, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating
from stillhouse.tasks.classification import Classification

WEIGHTS = "model.safetensors"
SHOWN = 8  # samples of a prompt in a picture
LEAST = 32  # pixels of a sample's side in a picture, at least


@dataclass(frozen=True)
class Look:
    """How samples become pictures.

    Attributes:
        shape: of a sample, (frames * C, H, W).
        mean, std: the normalisation per channel that is undone.
        frames: of a clip, shown side by side; 1 for images.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = 1

    @classmethod
    def of(cls, task: Classification, frames: int = 1) -> Look:
        """Of a data set's task."""
        return cls(tuple(task.input_shape), tuple(task.mean), tuple(task.std), frames)

    def images(self, samples: Tensor) -> Tensor:
        """Samples (n, frames * C, H, W) as uint8."""
        return unnormalise(samples.cpu().float(), self.mean, self.std)

    def grid(self, samples: Tensor) -> Tensor:
        """One picture (3, H', W') of some samples: images side by side; clips below each other, frame by frame."""
        times = max(1, -(-LEAST // max(self.shape[-2:])))
        images = self.images(samples[:SHOWN]).unflatten(1, (self.frames, -1))
        if images.shape[2] not in (1, 3):
            images = images[:, :, :1]
        lines = [torch.cat(list(clip), -1) for clip in images]
        whole = torch.cat(lines, -2 if self.frames > 1 else -1)
        return with_channels(whole, 3).repeat_interleave(times, -2).repeat_interleave(times, -1)


@dataclass
class Generator(Product):
    """A network that draws samples of prompts.

    Attributes:
        module: the network.
        model: how it is built again.
        prompts: what it knows.
        look: the form of its samples.
        predicts, schedule, sampler: how it is sampled.
        figures: of its making; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "generator"
    formats: ClassVar[Mapping[str, str]] = {"samples": "samples", "safetensors": WEIGHTS}
    reads = "texts"
    module: nn.Module
    model: ModelSpec
    prompts: Prompts
    look: Look
    predicts: Parametrisation
    schedule: ScheduleSpec
    sampler: SamplerSpec
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def denoiser(self) -> Denoiser:
        """The network with what its output means."""
        return Denoiser(self.module, self.predicts, self.schedule.build(), len(self.prompts.names))

    def draw(self, noise: Tensor, label: Tensor) -> Tensor:
        """Samples (B, ...) of noise (B, ...) and prompts (B,), on their device; what noise the sampler draws besides is
        a function of the first."""
        denoiser = self.denoiser
        sampler = self.sampler.build(denoiser.schedule, self.predicts)
        more = further_noise(noise)
        with evaluating(self.module):
            denoise = denoiser.denoise(label, self.sampler.guidance)
            return sample(denoise, sampler, sampler.start(noise), noise=lambda i: more())

    def samples(self, prompt: str, count: int = SHOWN, seed: int = 0) -> Tensor:
        """(count, ...) samples of a prompt, normalised as the data. Raises `UserError` for a prompt that it does not
        know."""
        number = self.prompts.number(prompt)
        device = next(self.module.parameters()).device
        noise = torch.randn(count, *self.look.shape, generator=generator("predict", prompt, seed)).to(device)
        return self.draw(noise, torch.full((count,), number, device=device))

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each prompt: how many samples, and `picture`, a grid of them."""
        return [{"samples": SHOWN, "picture": self.look.grid(self.samples(str(text)))} for text in inputs]

    def extras(self) -> dict[str, Any]:
        """What a subclass adds to product.json."""
        return {}

    def facts(self) -> dict[str, Any]:
        """product.json."""
        model = self.model.model_copy(update={"checkpoint": None, "pretrained": False})
        return {
            "kind": self.kind,
            "format": 1,
            "model": model.model_dump(mode="json"),
            "prompts": {"names": self.prompts.names, "of_class": self.prompts.of_class},
            "look": vars(self.look),
            "predicts": self.predicts,
            "schedule": self.schedule.model_dump(mode="json"),
            "sampler": self.sampler.model_dump(mode="json"),
            **self.extras(),
        }

    def save(self, folder: Path) -> None:
        write_weights(self.module, folder / WEIGHTS)
        (folder / "product.json").write_text(json.dumps(self.facts(), indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> Generator:
        meta = read_meta(folder)
        model = ModelSpec.model_validate(meta["model"])
        if model.model.startswith(("file:", "hf:")):
            raise UserError(f"The product in {folder} names '{model.model}', which lies outside of it.")
        prompts = Prompts(*(tuple(meta["prompts"][k]) for k in ("names", "of_class")))
        form = meta["look"]
        look = Look(tuple(form["shape"]), tuple(form["mean"]), tuple(form["std"]), form["frames"])
        module = build(model, len(prompts.names), look.shape)
        load_weights(module, folder / WEIGHTS, owner=f"model {model.model}")
        return cls(
            module.eval(),
            model,
            prompts,
            look,
            meta["predicts"],
            ScheduleSpec.model_validate(meta["schedule"]),
            SamplerSpec.model_validate(meta["sampler"]),
            **cls.restored(meta, folder),
        )

    @classmethod
    def restored(cls, meta: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Of a subclass: its own fields from product.json."""
        return {}

    def export(self, to: str, path: Path) -> list[str]:
        """`samples`: a grid of samples of each prompt as PNG files; `safetensors`: the network's tensors."""
        if to == "safetensors":
            write_weights(self.module, path)
            return [f"Wrote {path}"]
        from torchvision.io import write_png

        path.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(self.prompts.names):
            write_png(self.predict([name])[0]["picture"], str(path / f"{number:03d}.png"))
        return [f"Wrote a grid of samples for each of {len(self.prompts.names)} prompts to {path}"]


def further_noise(noise: Tensor) -> Callable[[], Tensor]:
    """Draws of more noise (B, ...), a function of the first, so that the same start gives the same samples and other
    batches other ones."""
    fresh = generator("sampler", *[str(v) for v in noise.flatten()[:4].tolist()])
    return lambda: torch.randn(noise.shape, generator=fresh).to(noise)


def write_weights(module: nn.Module, path: Path) -> None:
    """A network's tensors as safetensors."""
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file(state_on_cpu(module), str(temporary))


def write_grids(run: Run, look: Look, prompts: Prompts, columns: Mapping[str, Tensor]) -> None:
    """Samples for the report: of each prompt (the first eight) a picture a column.

    Args:
        columns: who drew them -> (prompts, n, ...) samples; `truth` is the data's own.
    """
    rows = range(min(SHOWN, len(prompts.names)))
    grids = {name: [look.grid(samples[i]) for i in rows] for name, samples in columns.items()}
    captions = [prompts.names[i] for i in rows]
    pictures = {name: (found, captions) for name, found in grids.items()}
    write_pictures(run.folder / FOLDER, pictures, list(rows), compared=False)


def real_samples(run: Run, data: Any, prompts: Prompts, count: int = SHOWN) -> Tensor:
    """(prompts, count, ...) training samples of each prompt; fewer are repeated."""
    found: list[list[Tensor]] = [[] for _ in prompts.names]
    for batch in run.loader(data, "train"):
        for x, label in zip(batch["input"], prompts.labels(batch["label"]).tolist()):
            if label >= 0 and len(found[label]) < count:
                found[label].append(x)
        if all(len(of_prompt) == count for of_prompt in found):
            break
    if not all(found):
        raise UserError(f"The data holds no sample of the prompt '{prompts.names[found.index([])]}'.")
    return torch.stack([torch.stack((xs * count)[:count]) for xs in found])
