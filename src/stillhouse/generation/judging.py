"""How samples are judged: by a classifier of the data, trained as a shared stage, against the data's own features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.distillation.teachers import Reader
from stillhouse.evaluation.generation import frechet_distance, modes, pairwise_distance
from stillhouse.generation.config import GenerationConfig, Prompts
from stillhouse.generation.product import Generator, real_samples
from stillhouse.randomness import generator
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Stage
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating, to_device
from stillhouse.tasks.classification import Classification

PROBE = Stage("probe", "train the classifier by which samples are judged (stored, shared)")
REAL = 4096  # samples of the data that generated ones are compared with, at most
Draw = Callable[[Tensor, Tensor], Tensor]
"""Noise (B, ...) and prompts (B,) -> samples (B, ...), on the run's device."""


@dataclass
class Seen:
    """What a probe sees in samples.

    Attributes:
        features: (n, D) what goes into its last layer.
        classes: (n,) the most probable.
    """

    features: Tensor
    classes: Tensor


class Probe:
    """The classifier of a recipe's data.

    Args:
        run: the run, whose plan has the stage `probe`.
        config: what is generated, and by what it is judged.
    """

    def __init__(self, run: Run, config: GenerationConfig) -> None:
        self.run, self.config, spec = run, config, config.probe
        self.bundle = run.data(config.data, Classification)
        self.prompts = Prompts.read(config.prompts, self.bundle.classes)
        model = run.model(spec.network, config.data, role="probe", seed=0)
        found = run.trained(PROBE.name, model, spec.network, spec.train, config.data, 0)
        model.load_state_dict(found["weights"])
        self.accuracy = float(found["figures"].get("accuracy", float("nan")))
        self.model = model.to(run.device).eval().requires_grad_(False)
        self._reader = Reader(self.model, "probe", spec.embedding, self.bundle.task)
        example = to_device(next(iter(run.loader(config.data, "train", 2))), run.device)
        self._reader.attach(["embedding"], example)
        self._real: Seen | None = None

    def close(self) -> None:
        """Take the hooks out of the probe."""
        self._reader.close()

    def see(self, samples: Tensor) -> Seen:
        """What the probe sees in samples (n, ...), normalised as the data are."""
        features, classes = [], []
        for some in samples.split(512):
            with evaluating(self.model):
                found = self._reader({"input": some.to(self.run.device)})
            features.append(found.require("embedding").flatten(1).float().cpu())
            classes.append(found.require("logits").argmax(-1).cpu())
        return Seen(torch.cat(features), torch.cat(classes))

    @property
    def real(self) -> Seen:
        """What it sees in training samples that a prompt means, without augmentation."""
        if self._real is None:
            kept, count = [], 0
            for batch in self.run.loader(self.config.data, "train"):
                meant = self.prompts.labels(batch["label"]) >= 0
                kept.append(batch["input"][meant])
                count += len(kept[-1])
                if count >= REAL:
                    break
            self._real = self.see(torch.cat(kept)[:REAL])
        return self._real

    def real_samples(self, count: int) -> Tensor:
        """(prompts, count, ...) training samples of each prompt; fewer are repeated."""
        return real_samples(self.run, self.config.data, self.prompts, count)

    def noise(self, of: int, *keys: int | str) -> Tensor:
        """(judge.samples, ...) the noise from which every network's samples of a prompt begin."""
        draw = generator("samples", self.config.judge.seed, of, *keys)
        return torch.randn(self.config.judge.samples, *self.bundle.input_shape, generator=draw).to(self.run.device)

    def drawn(self, draw: Draw) -> Tensor:
        """(prompts, judge.samples, ...) samples of each prompt, on the CPU."""
        found = []
        for number in range(len(self.prompts.names)):
            noise = self.noise(number)
            label = torch.full((len(noise),), number, device=self.run.device)
            size = self.config.judge.batch
            parts = [draw(n, i).cpu() for n, i in zip(noise.split(size), label.split(size))]
            found.append(torch.cat(parts))
        return torch.stack(found)

    def figures(self, samples: Tensor) -> dict[str, float]:
        """Figures of samples (prompts, n, ...): `frechet`, `prompt_accuracy`, `modes` and `diversity`; the last two are
        means over prompts, and modes are counted among the samples that follow theirs."""
        seen = [self.see(of_prompt) for of_prompt in samples]
        of_class = torch.tensor(self.prompts.of_class)
        follow = [of_class[s.classes] == i for i, s in enumerate(seen)]
        count = self.bundle.num_classes
        return {
            "frechet": frechet_distance(self.real.features, torch.cat([s.features for s in seen])),
            "prompt_accuracy": float(torch.stack(follow).double().mean()),
            "modes": sum(modes(s.classes[f], count) for s, f in zip(seen, follow)) / len(seen),
            "diversity": sum(pairwise_distance(s.features) for s in seen) / len(seen),
        }


@evaluates("generator")
def evaluate(product: Generator, run: Run) -> dict[str, float]:
    """The figures of a run's generator, of samples drawn by its own sampler; and what it costs."""
    from stillhouse.evaluation import cost

    config = run.config
    assert isinstance(config, GenerationConfig)
    probe = Probe(run, config)
    try:
        product.module.to(run.device)
        found = probe.figures(probe.drawn(product.draw))
    finally:
        probe.close()
    return {**found, "probe_accuracy": probe.accuracy, "parameters": cost.parameters(product.module)}
