"""NCFM: synthetic images whose features have the characteristic function of the real ones, at random or adversarially
chosen frequencies.

paper: Dataset Distillation with Neural Characteristic Function: A Minmax Perspective
venue: CVPR 2025
arxiv: 2502.20653
task: classification
family: dataset distillation
use when: a set must match more than mean features (spread and shape too) at the memory and time of DM
needs: real images with labels; a network without batch statistics that has `embed`, such as a ConvNet with instance
norm

A pool of networks is trained first. Each iteration takes a random point on the line between a network's start and its
end, and compares, class by class with a step of the pixels after each, E[exp(i <t, feature>)] of real and synthetic
images, split into amplitude and phase. Then a pass of cross-entropy in the trained network calibrates every class. A
stored image holds factor x factor training images. `sampler: gaussian` is the released setting; `learned` is the
paper's minmax: the released code adds the gradients of both players, which cancel, so its sampler never moves; here it
ascends. Its rows are distinct (the code tiles 4). Pixels are learned normalised: decay pulls to the mean, and the
published rate 0.001 is about 0.004. Real images are drawn at random (`fixed_real`: the code's first ones). Without
CutMix, and the pool's rate falls once, where published; judged by the shared protocol at the last epoch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.augmentation import Draws, apply
from stillhouse.functional.matching import Flat
from stillhouse.functional.precision import full_precision
from stillhouse.methods.datasets.dm import embedding, real_embedding
from stillhouse.randomness import generator, keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import AugmentSpec, PixelConfig
from stillhouse.synthetic.initial import decode
from stillhouse.synthetic.pools import ExpertSpec, experts
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.synthesis import Synthesis, TensorState, plan, with_mirrors
from stillhouse.synthetic.training import augmentation

SCALE = 300.0
"""The factor of the released code, to which its learning rates are tuned."""

SMALLEST = 1e-12
"""Of the phase term: below it there is no gradient, and the loss of equal batches is 300 sqrt(beta * 1e-12)."""


class Config(PixelConfig):
    pool: ExpertSpec = Field(
        default_factory=lambda: ExpertSpec(
            count=3, epochs=3, batch_size=128, lr=0.01, momentum=0.9, weight_decay=5e-4, drop=0.2
        ),
        description="Networks, each kept at its start and trained; published: 20 of 60 epochs.",
    )
    init: Literal["noise", "real", "representative", "mix"] = Field(
        "mix", description="How the images begin; mix: a real image in every tile."
    )
    factor: int = Field(2, ge=1, description="A stored image is cut into factor x factor training images.")
    batch_real: int = Field(
        256, ge=1, description="Real images per class and iteration, or all where a class has fewer; published: 1024."
    )
    fixed_real: bool = Field(False, description="Always the first images of each class, as the released loader does.")
    alpha: float = Field(0.5, ge=0, description="Weight of the amplitude: spread and diversity.")
    beta: float = Field(0.5, ge=0, description="Weight of the phase: location and realism.")
    sampler: Literal["gaussian", "learned"] = Field(
        "gaussian", description="Of frequencies; learned: a network that maximises the loss."
    )
    frequencies: int = Field(
        1024, ge=2, description="Drawn for each class and iteration; published: 4096 (gaussian), 64 (learned)."
    )
    frequency_variance: float = Field(
        1.0, gt=0, description="Of the Gaussian draws, which a learned sampler takes as its input."
    )
    sampler_lr: float = Field(
        1e-5,
        gt=0,
        description="learned: SGD with momentum 0.5, upwards; the published 1e-3, of a loss that is 300 times the "
        "distance, destroys the set.",
    )
    calibration: float = Field(
        1.0, ge=0, description="Weight of the cross-entropy in the trained network, one pass an iteration; 0: none."
    )
    optimiser: Literal["adamw", "sgd"] = Field("adamw", description="Of the pixels; `momentum` is that of sgd.")
    lr: float = Field(0.004, gt=0, description="Of the normalised pixels.")
    weight_decay: float = Field(5e-4, ge=0, description="Of the pixels.")
    patience: int = Field(
        500, ge=1, description="Iterations without a lower mean loss, after which the rate is halved."
    )
    clamp: bool = Field(True, description="Keep pixels in [0, 1] after every step.")
    augment: AugmentSpec = Field(
        default_factory=lambda: AugmentSpec(always="color_crop_cutout", groups=""),
        description="One draw for the real and synthetic images of a class.",
    )
    soft_labels: bool = Field(False, description="Store logits of a network of the pool, for evaluate.protocol: soft.")

    @property
    def labels_softly(self) -> bool:
        return self.soft_labels


@full_precision
def characteristic_terms(real: Tensor, synthetic: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Amplitude and phase terms (K,) of the difference of two empirical characteristic functions; they sum to
    |Phi_r - Phi_s|^2.

    (A_r - A_s)^2 and 2 (A_r A_s - Re Phi_r Re Phi_s - Im Phi_r Im Phi_s), at least 1e-12, with A = |Phi| and
    Phi(t) = mean_n exp(i <t, feature_n>).

    Args:
        real, synthetic: features (N, D) and (M, D); the real ones have no gradient.
        t: frequencies (K, D).

    Raises:
        UserError: shapes that do not fit.
    """
    if not (
        real.ndim == synthetic.ndim == t.ndim == 2
        and real.shape[1] == synthetic.shape[1] == t.shape[1]
        and len(real)
        and len(synthetic)
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (real, synthetic, t))
        raise UserError(
            f"Characteristic functions need features (N, D), (M, D) and frequencies (K, D); given: {shapes}."
        )
    (re_r, im_r), (re_s, im_s) = _characteristic(real.detach(), t), _characteristic(synthetic, t)
    squares_r, squares_s = re_r.square() + im_r.square(), re_s.square() + im_s.square()
    a_r, a_s = squares_r.clamp(min=SMALLEST**2).sqrt(), squares_s.clamp(min=SMALLEST**2).sqrt()  # no NaN gradient at 0
    amplitude = (a_r - a_s).square()
    phase = 2 * (a_r * a_s - re_r * re_s - im_r * im_s)
    return amplitude, phase.clamp(min=SMALLEST)


def _characteristic(features: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part (K,)."""
    angles = t @ features.T
    return angles.cos().mean(1), angles.sin().mean(1)


@full_precision
def characteristic_distance(
    real: Tensor, synthetic: Tensor, t: Tensor, alpha: float = 0.5, beta: float = 0.5, unit_features: bool = True
) -> Tensor:
    """mean_k sqrt(alpha amplitude_k + beta phase_k), a scalar (see `characteristic_terms`); the loss is 300 times it.

    Args:
        unit_features: bring every feature to L2 norm 1 first.
    """
    if unit_features:
        real, synthetic = F.normalize(real, dim=1), F.normalize(synthetic, dim=1)
    amplitude, phase = characteristic_terms(real, synthetic, t)
    return (alpha * amplitude + beta * phase).clamp(min=SMALLEST**2).sqrt().mean()


def match_loss(
    network: nn.Module, real: Tensor, synthetic: Tensor, t: Tensor, alpha: float = 0.5, beta: float = 0.5
) -> Tensor:
    """300 times the distance of one class: images (N, C, H, W) and (M, C, H, W), frequencies (K, D) of the network's
    embedding."""
    return SCALE * characteristic_distance(real_embedding(network, real), embedding(network, synthetic), t, alpha, beta)


def between(start: Tensor, end: Tensor, share: Tensor | float) -> Tensor:
    """Parameters on the line: share * start + (1 - share) * end."""
    return share * start + (1 - share) * end


class SamplingNetwork(nn.Sequential):
    """psi: noise (K, D) -> frequencies (K, D) in (-1, 1).

    Three times linear and batch norm, then LeakyReLU 0.2, at the end tanh; K of 2 or more.
    """

    def __init__(self, dim: int) -> None:
        layers: list[nn.Module] = []
        for act in (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2), nn.Tanh()):
            layers += [nn.Linear(dim, dim), nn.BatchNorm1d(dim), act]
        super().__init__(*layers)


def corrected_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, C): the logits; of a wrongly classified image, the one-hot of its label in their place."""
    right = logits.argmax(1, keepdim=True) == labels[:, None]
    return torch.where(right, logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))


class CharacteristicFunctionMatching(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        _check(config)
        network = run.model(config.network, config.data)
        Flat(network)
        pool = f"train a pool of {config.pool.count} networks for {config.pool.epochs} epochs (stored, shared)"
        does = f"match characteristic functions at {config.frequencies} {config.sampler} frequencies, then calibrate"
        steps = config.iterations * run.data(config.data).num_classes * (2 if config.calibration else 1)
        return [Stage("expert", pool, {"network": config.network.model}), *plan(run, config, "ncfm", does, steps)]

    def run(self, config: Config, run: Run) -> SyntheticSet:
        _check(config)
        made = Synthesis(config, run, factor=config.factor)
        if config.iterations or config.soft_labels:
            pool = experts(run, config.network, config.data, made.real, config.pool, without_cutout(config.augment))
            matching = Matching(made, config, run, pool)
        if config.iterations:
            matching.learn()
        product = made.product()
        if config.soft_labels:
            images, labels = product.training_images()
            with torch.no_grad():
                logits = torch.cat(
                    [matching.trained_on(pool[0])(x.to(made.images.device)).cpu() for x in images.split(256)]
                )
            product.soft = corrected_logits(logits, labels)
            product.check()
        return product


def without_cutout(augment: AugmentSpec) -> AugmentSpec:
    """The augmentation of the pool's networks: that of the matching, but for cutout, as in the released code."""
    left = {key: "_".join(p for p in getattr(augment, key).split("_") if p != "cutout") for key in ("always", "groups")}
    return augment.model_copy(update=left)


def _check(config: Config) -> None:
    if not config.alpha + config.beta > 0:
        raise UserError("ncfm: alpha and beta are both 0, so that nothing is matched; give one of them a weight.")


class Matching:
    """The loop: for each class a step on the matching loss, then for each class one on the calibration.

    A step of the run's loop is one class.
    """

    def __init__(self, made: Synthesis, config: Config, run: Run, pool: list[Tensor]) -> None:
        self.made, self.config, self.run, self.pool = made, config, run, pool
        self.device = made.images.device
        self.mid, self.final = (
            run.model(config.network, config.data, role="expert").to(self.device).requires_grad_(False)
            for _ in range(2)
        )
        self.loaded = -1
        with torch.no_grad():
            self.dim = embedding(self.mid, made.images[:1]).shape[1]

    def learn(self) -> None:
        """Minimise over the pixels; where the sampler is learned, maximise over it after each step."""
        config, made = self.config, self.made
        optimizer = self._optimizer()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=config.patience)
        total = torch.zeros((), device=self.device)
        extra: dict[str, Any] = {"plateau": plateau, "total": TensorState(total)}
        sampler = climber = None
        if config.sampler == "learned":
            with keyed("ncfm sampler", self.run.seed):
                sampler = SamplingNetwork(self.dim).to(self.device)
            climber = torch.optim.SGD(sampler.parameters(), config.sampler_lr, momentum=0.5, maximize=True)
            extra |= {"sampler": sampler, "climber": climber}
        rounds = made.classes * (2 if config.calibration else 1)

        def loss(i: int) -> dict[str, Tensor]:
            iteration, at = divmod(i, rounds)
            self._take_networks(iteration)
            drawn = made.generator("augment", i)
            draws = augmentation(config.augment, 1, made.size, drawn)
            if at >= made.classes:
                value = config.calibration * self.calibration_loss(at - made.classes, draws)
                return {"loss": value, "calibration": value}
            noise = torch.randn(
                config.frequencies,
                self.dim,
                generator=generator(self.run.seed, "ncfm", i, device=self.device),
                device=self.device,
            )
            noise = noise * config.frequency_variance**0.5
            if climber is not None:
                climber.zero_grad()
            t = noise if sampler is None else sampler(noise)
            real, synthetic = self.real_images(at, i), self.training_images(at)
            value = match_loss(self.mid, apply(real, draws), apply(synthetic, draws), t, config.alpha, config.beta)
            total.add_(value.detach() / made.classes)
            return {"loss": value, "match": value}

        def after(i: int) -> None:
            at = i % rounds
            if climber is not None and at < made.classes:
                climber.step()
            if at == rounds - 1:
                plateau.step(float(total))
                total.zero_()

        made.learn("ncfm", loss, optimizer=optimizer, extra=extra, after=after, steps=config.iterations * rounds)
        made.figures["distil_iterations"] = float(config.iterations)
        made.figures["distil_seconds_per_iteration"] = made.figures["distil_seconds"] / config.iterations

    def real_images(self, c: int, i: int) -> Tensor:
        """(n, C, H, W) of class c for step i."""
        rows, count = self.made.real.rows[c], self.config.batch_real
        if not self.config.fixed_real:
            rows = rows[torch.randperm(len(rows), generator=self.made.generator("real", i))]
        return self.made.real.images[rows[:count].to(self.device)]

    def training_images(self, c: int) -> Tensor:
        """(ipc * factor^2, C, H, W) of class c, with gradient to the stored images; twice as many with `mirror`."""
        ipc = self.config.ipc
        x = decode(self.made.images[c * ipc : (c + 1) * ipc], self.config.factor)
        return with_mirrors(x, 1) if self.config.mirror else x

    def calibration_loss(self, c: int, draws: Draws) -> Tensor:
        """Cross-entropy of class c in the trained network."""
        x = apply(self.training_images(c), draws)
        return F.cross_entropy(self.final(x), torch.full((len(x),), c, device=self.device))

    def trained_on(self, path: Tensor) -> nn.Module:
        """The trained network of a trajectory."""
        Flat(self.final).load(path[-1].to(self.device))
        self.loaded = -1
        return self.final

    def _take_networks(self, iteration: int) -> None:
        """The networks of an iteration: one of the pool, trained, and a point on its way."""
        if self.loaded == iteration:
            return
        drawn = self.made.generator("pool", iteration)
        path = self.pool[int(torch.randint(len(self.pool), (1,), generator=drawn))]
        share = float(torch.rand((), generator=drawn))
        Flat(self.mid).load(between(path[0], path[-1], share).to(self.device))
        self.trained_on(path)
        self.loaded = iteration

    def _optimizer(self) -> torch.optim.Optimizer:
        c, images = self.config, [self.made.images]
        if c.optimiser == "sgd":
            return torch.optim.SGD(images, c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        return torch.optim.AdamW(images, c.lr, weight_decay=c.weight_decay)
