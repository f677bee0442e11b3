"""Images being learned: how they begin, the real batch and the augmentation of each iteration, random networks, the
outer loop, and the product.

A method that learns pixels makes a `Synthesis`, gives `learn` a function from the iteration to a loss, and returns
`product()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.evaluation import cost
from stillhouse.functional.augmentation import apply, groups_of
from stillhouse.functional.recovery import clamp_to_pixels
from stillhouse.randomness import generator
from stillhouse.runs.method import Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import DatasetConfig, PixelConfig
from stillhouse.synthetic.initial import initial
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import RealImages
from stillhouse.synthetic.training import augmentation


class Synthesis:
    """The images of one run, on its device.

    Attributes:
        real: the training images.
        images: (classes * ipc, C, H, W), a parameter, class-major.
        labels: (classes * ipc,).
        figures: what learning cost.
    """

    def __init__(
        self, config: PixelConfig, run: Run, features: Callable[[Tensor], Tensor] | None = None, factor: int = 1
    ) -> None:
        self.config, self.run, self.factor = config, run, factor
        self.real = RealImages.load(run, config.data, config.zca)
        start = initial(config.init, self.real, config.ipc, generator(run.seed, "initial"), features, max(factor, 2))
        self.images = nn.Parameter(start)
        self.labels = torch.arange(self.classes, device=start.device).repeat_interleave(config.ipc)
        self.figures: dict[str, float] = {}

    @property
    def classes(self) -> int:
        return len(self.real.classes)

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    def generator(self, *keys: int | str) -> torch.Generator:
        """A generator of this run and these keys."""
        return generator(self.run.seed, "synthesis", *keys)

    def network(self, i: int, spec: ModelSpec | None = None) -> nn.Module:
        """The random, frozen network of iteration i, in training mode."""
        network = self.run.model(spec or self.config.network, self.config.data, role=f"random.{i}")
        return network.to(self.images.device).requires_grad_(False)

    def shown(self) -> Tensor:
        """The images as methods match them: with `mirror`, those of each class and then their mirror images (classes *
        2 ipc, C, H, W)."""
        return with_mirrors(self.images, self.classes) if self.config.mirror else self.images

    def batches(self, i: int) -> tuple[Tensor, Tensor]:
        """Real (classes * batch_real, …) and synthetic images, class-major, of iteration i: each class under a draw of
        its own that both share."""
        real = self.real.draw(self.config.batch_real, self.generator("real", i))
        return self.siamese(real, self.shown(), i)

    def siamese(self, real: Tensor, synthetic: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Class-major batches, augmented: a draw a class, the same for both."""
        drawn = self.generator("augment", i)
        draws = [augmentation(self.config.augment, 1, self.size, drawn) for _ in range(self.classes)]
        return tuple(  # type: ignore[return-value]
            torch.cat([apply(part, draw) for part, draw in zip(batch.chunk(self.classes), draws)])
            for batch in (real, synthetic)
        )

    def new_optimizer(self) -> torch.optim.Optimizer:
        """SGD over the pixels, with the recipe's options."""
        return torch.optim.SGD([self.images], self.config.lr, momentum=self.config.momentum)

    def learn(
        self,
        name: str,
        loss: Callable[[int], Tensor | Mapping[str, Tensor]],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        extra: Mapping[str, Any] | None = None,
        after: Callable[[int], None] | None = None,
        steps: int | None = None,
    ) -> None:
        """Minimise over the pixels.

        Args:
            name: of the stage.
            loss: iteration -> a scalar, or named terms of which `loss` is minimised; one that has called backward
                itself returns it detached.
            optimizer: default: `new_optimizer()`.
            extra: what else a checkpoint must store, by name.
            after: called after each step.
            steps: default: `iterations`.
        """
        optimizer = optimizer or self.new_optimizer()
        peak = _Peak()

        def one(i: int) -> Mapping[str, Tensor]:
            given = loss(i)
            terms = {"loss": given} if isinstance(given, Tensor) else dict(given)
            if terms["loss"].requires_grad:
                terms["loss"].backward()
            return {k: v.detach() for k, v in terms.items()}

        def step(i: int) -> Mapping[str, Tensor]:
            optimizer.zero_grad()
            terms: dict[str, Tensor] = {}
            if i == 0:
                peak.bytes = cost.peak_of_tensors(lambda: terms.update(one(0)), self.images.device)
            else:
                terms.update(one(i))
            optimizer.step()
            if self.config.clamp:
                clamp_to_pixels(self.images, self.real.mean, self.real.std)
            if after is not None:
                after(i)
            return terms

        state = {"images": TensorState(self.images), "optimizer": optimizer, "peak": peak, **(extra or {})}
        steps = self.config.iterations if steps is None else steps
        seconds = self.run.loop(name, state, step, steps, log_every=10) if steps else 0.0
        self.figures |= {
            "distil_seconds": seconds,
            "distil_peak_mb": peak.bytes / 1e6,
            "distil_iterations": float(steps),
        }
        if steps:
            self.figures["distil_seconds_per_iteration"] = seconds / steps

    def product(self, *, lr: float | None = None) -> SyntheticSet:
        """The images with hard labels."""
        config, real = self.config, self.real
        bounded = config.clamp or (not config.iterations and config.init != "noise")
        return SyntheticSet(
            self.images, self.labels, real.classes, real.mean, real.std, bounded, real.whitening,
            factor=self.factor, lr=lr, made_by=made_by(config), figures=dict(self.figures),
        )  # fmt: skip


def with_mirrors(images: Tensor, classes: int) -> Tensor:
    """Class-major images (classes * n, C, H, W) as (classes * 2n, …): those of each class, then their mirror images."""
    grouped = images.view(classes, -1, *images.shape[1:])
    return torch.cat([grouped, grouped.flip(-1)], 1).flatten(0, 1)


def made_by(config: DatasetConfig) -> dict[str, Any]:
    """A recipe as a product keeps it."""
    recipe: dict[str, Any] = config.model_dump(
        mode="json", exclude_none=True, exclude={"variants", "groups", "evaluate"}
    )
    return recipe


def plan(run: Run, config: DatasetConfig, stage: str, does: str, steps: int) -> list[Stage]:
    """The lines of a plan that every method here has: learning the set, and judging it.

    Raises `UserError` where digits, say, would be mirrored.
    """
    from stillhouse.synthetic.judging.evaluator import planned

    _check_mirroring(run, config)
    return [Stage(stage, does, {"network": config.network.model}, steps=steps), Stage("evaluate", planned(run, config))]


def _check_mirroring(run: Run, config: DatasetConfig) -> None:
    if run.data(config.data).flip or run.config is not config:  # a host's recipe is checked by the method that it is in
        return
    learns, hard = isinstance(config, PixelConfig), config.evaluate.protocol == "hard"
    used = {"augment": config.augment if learns or (hard and config.evaluate.augment is None) else None}
    used["evaluate.augment"] = config.evaluate.augment if hard else None
    settings = ["mirror=false"] if isinstance(config, PixelConfig) and config.mirror else []
    for key, spec in used.items():
        for field in ("always", "groups"):
            groups = groups_of(getattr(spec, field)) if spec is not None else ()
            others = "_".join(g for g in groups if g != "flip")
            settings += [f"{key}.{field}={others or repr(others)}"] if "flip" in groups else []
    if settings:
        raise UserError(
            f"Images of '{config.data.name}' change their class when mirrored; set {' and '.join(settings)}."
        )


class TensorState:
    """A tensor that a checkpoint holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Tensor]:
        return {"tensor": self.tensor.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.tensor.copy_(state["tensor"])


class _Peak:
    """The most bytes that an iteration held."""

    bytes: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"bytes": self.bytes}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.bytes = state["bytes"]
