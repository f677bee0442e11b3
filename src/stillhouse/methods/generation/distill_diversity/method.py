"""Distilling diversity and control: a base model takes the first step of its few-step student and gives back variety;
adapters move between both.

paper: Distilling Diversity and Control in Diffusion Models
venue: 2025
arxiv: 2503.10637
task: generation
family: step distillation
use when: a few-step student gives nearly the same sample for every seed, or sliders of its base model are to be reused
needs: a diffusion model and a few-step student of it, with one schedule; here both are trained first, on images

Few-step students decide in their first step what a sample will be; the base model spreads that over many. So the base
takes the student's first k steps (k = 1 in the paper) in the student's own sampler, without guidance, and the student
the rest: no weights change. The clean samples that each network sees on the way are shown (DT-visualisation), with
their correlation with the final one. A slider is an adapter of low rank whose scale moves one attribute, here how thick
strokes are: it is trained on one network by images with more and with less of it, and used on the other as it is.

The student is made by trajectory distribution matching (as in video_blade), with guidance learned. Variety is counted
in modes: a prompt means several classes, and a classifier trained on the data says which of them a sample is.

Departures. The paper's students (DMD2, Lightning, Turbo, LCM) and its SDXL are not loaded; LCM and Euler samplers are
there, and are compared with its code. Variety is not measured by DreamSim. Where a problem is small, the decision does
not lie in the first step alone, so the whole curve of k is reported.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.functional.diffusion import denoising_loss
from stillhouse.generation.config import DenoiserSpec, GenerationConfig, Prompts, SamplerSpec
from stillhouse.generation.denoising import Denoiser, base_model, base_stage
from stillhouse.generation.judging import PROBE, Probe
from stillhouse.generation.product import SHOWN, Generator, Look, write_grids
from stillhouse.generation.trajectory import (
    STUDENT,
    MatchingSpec,
    check_matching,
    matched_student,
    student_sampler,
    trajectory_times,
)
from stillhouse.methods.generation.distill_diversity.adapters import attached, rank_correlation
from stillhouse.methods.generation.distill_diversity.hybrid import check_states, correlations, stop_index, variation
from stillhouse.methods.generation.distill_diversity.product import AdapterSpec, HybridGenerator, HybridSpec
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.tasks.classification import Classification

SLIDER = Stage("slider", "train a slider on one network (stored, shared)")
STRIPS = 3  # samples of a prompt whose clean samples are shown
AT_MOST = 64  # samples of a prompt by which they are compared


class SliderSpec(Spec):
    """A slider of how thick strokes are."""

    steps: int = Field(200, ge=0, description="Of its training on either network; 0: there is none.")
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0, description="Of AdamW.")
    scales: list[float] = Field(
        default_factory=lambda: [-2.0, -1.0, 0.0, 1.0, 2.0], description="At which it is measured."
    )
    samples: int = Field(64, ge=1, description="Of each prompt, at each scale.")
    adapter: AdapterSpec = Field(default_factory=AdapterSpec)


class Config(GenerationConfig):
    base: DenoiserSpec = Field(description="The base model; the student begins as its copy.")
    base_sampler: SamplerSpec = Field(
        default_factory=lambda: SamplerSpec(steps=50), description="Of the base model alone, for comparison."
    )
    match: MatchingSpec = Field(default_factory=MatchingSpec, description="How the student is made.")
    hybrid: HybridSpec = Field(default_factory=HybridSpec)
    slider: SliderSpec = Field(default_factory=SliderSpec)


class DistillDiversity(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        Prompts.read(config.prompts, run.data(config.data, Classification).classes)
        check_slider(config)
        schedule = config.base.schedule.build()
        check_matching(config.match, schedule)
        own = student_sampler(config.match).build(schedule, config.base.predicts)
        its = own if config.hybrid.base_sampler is None else config.hybrid.base_sampler.build(schedule, own.kind)
        check_states(its, own)
        stop_index(its.steps, own.steps, config.hybrid.begin)
        stages = [
            base_stage(run, config.base, config.data),
            STUDENT.filled(steps=config.match.iterations, models={"student": config.base.model}),
            PROBE,
        ]
        return [*stages, SLIDER.filled(steps=2 * config.slider.steps)] if config.slider.steps else stages

    def run(self, config: Config, run: Run) -> HybridGenerator:
        bundle = run.data(config.data, Classification)
        prompts = Prompts.read(config.prompts, bundle.classes)
        base = base_model(run, config.base, config.data, prompts)
        student: nn.Module = copy.deepcopy(base.module)
        trained = matched_student(run, STUDENT, config.base, config.match, base, bundle.input_shape)
        student.load_state_dict(trained)
        student.to(run.device).eval().requires_grad_(False)
        product = HybridGenerator(
            student,
            config.base.network,
            prompts,
            Look.of(bundle.task),
            config.base.predicts,
            config.base.schedule,
            student_sampler(config.match),
            base=base.module,
            hybrid=config.hybrid,
            adapter=config.slider.adapter,
        )
        probe = Probe(run, config)
        figures = _curve(config, product, probe, run) | _seen(config, product, probe, run)
        if config.slider.steps:
            figures |= _sliders(config, run, product, probe)
        probe.close()
        product.figures = figures
        return product


def _curve(config: Config, product: HybridGenerator, probe: Probe, run: Run) -> dict[str, float]:
    """Figures by k, `modes_k0` (the student) to `modes_kn` (the base in as many steps), and of the base in many steps,
    `modes_base`, with what the student lost of its modes (`modes_lost`); and the report's pictures."""
    figures: dict[str, float] = {}
    pictures = {"truth": probe.real_samples(8)}
    for k in range(config.match.steps + 1):
        samples = probe.drawn(lambda noise, label, k=k: product.sampled(noise, label, k).x)  # type: ignore[misc]
        figures |= {f"{name}_k{k}": value for name, value in probe.figures(samples).items()}
        pictures[f"student after {k} of the base" if k else "student"] = samples
    alone = Generator(
        product.base,
        product.model,
        product.prompts,
        product.look,
        product.predicts,
        product.schedule,
        config.base_sampler,
    )
    many = probe.drawn(alone.draw)
    write_grids(run, product.look, product.prompts, {**pictures, "base": many})
    figures |= {f"{name}_base": value for name, value in probe.figures(many).items()}
    return figures | {"modes_lost": figures["modes_base"] - figures["modes_k0"]}


def _seen(config: Config, product: HybridGenerator, probe: Probe, run: Run) -> dict[str, float]:
    """DT-visualisation: how far each step's clean sample is the final one already, by correlation, and how much of the
    final variety the first holds, of student, hybrid, and the base in its many steps; strips of them go into the run's
    folder."""
    from torchvision.io import write_png

    count, many = len(product.prompts.names), replace(product, sampler=config.base_sampler, module=product.base)
    figures: dict[str, float] = {}
    for name, drawing in (("student", product), ("hybrid", product), ("base", many)):
        begin = product.hybrid.begin if name == "hybrid" else 0
        rows, correlated, shares = [], [], []
        for number in range(count):
            noise = probe.noise(number)[:AT_MOST]
            drawn = drawing.sampled(noise, torch.full((len(noise),), number, device=noise.device), begin)
            seen = torch.cat([drawn.base_sees, drawn.student_sees])
            correlated.append(correlations(seen, drawn.x))
            shares.append(variation(seen[0]) / max(variation(drawn.x), 1e-12))
            shown = torch.linspace(0, len(seen) - 1, min(len(seen), SHOWN)).round().long()
            rows += [product.look.grid(seen[shown, i]) for i in range(min(STRIPS, len(noise)))]
        of_step = torch.stack(correlated).mean(0).tolist()
        if name == "base":
            places = {"first": 0, "quarter": len(of_step) // 4, "half": len(of_step) // 2}
            figures |= {f"dt_base_{place}": of_step[i] for place, i in places.items()}
        else:
            figures |= {f"dt_{name}_{i + 1}": value for i, value in enumerate(of_step)}
        figures[f"first_variety_{name}"] = sum(shares) / count
        write_png(torch.cat(rows, -2), str(run.folder / f"seen-{name}.png"))
    figures["dt_first_gain"] = figures["dt_student_1"] - figures["dt_base_first"]
    return figures


# ---- control -------------------------------------------------------------------------------------------------------


def thicker(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in which what is bright has grown: the mean of each pixel and the brightest around it."""
    return (images + F.max_pool2d(images, 3, 1, 1)) / 2


def thinner(images: Tensor) -> Tensor:
    """Images in which it has shrunk: the mean of each pixel and the darkest around it."""
    return (images - F.max_pool2d(-images, 3, 1, 1)) / 2


def ink(images: Tensor) -> Tensor:
    """(B,) mean brightness of uint8 images, in [0, 1]."""
    return images.float().flatten(1).mean(1) / 255


def train_slider(
    run: Run, network: Denoiser, spec: SliderSpec, config: Config, times: list[int] | None, stage: str
) -> dict[str, Tensor]:
    """A slider of a network by images: at scale 1 it must denoise thick ones, at -1 thin ones (visual sliders).

    Args:
        times: the steps at which the network is used; None: all.
        stage: name of the training.
    """
    bundle, device = run.data(config.data, Classification), run.device
    prompts = Prompts.read(config.prompts, bundle.classes)
    with keyed("slider", run.seed):
        adapters = spec.adapter.build(network.module).to(device)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=spec.lr, weight_decay=0.0)
    loader = run.loader(config.data, "train", spec.batch_size, train=True)
    per_epoch = len(loader)
    batches: Any = None
    known = None if times is None else torch.tensor(times, device=device)

    def step(i: int) -> dict[str, Tensor]:
        nonlocal batches
        if batches is None:
            batches = iter(loader.batches(*divmod(i, per_epoch), -(-spec.steps // per_epoch)))
        batch = next(batches)
        images, label = batch["input"].to(device), prompts.labels(batch["label"]).to(device)
        label = label.masked_fill(label < 0, network.prompts)
        t = torch.randint(network.schedule.steps, (len(images),), device=device)
        t = t if known is None else known[t % len(known)]
        x0 = torch.cat([thicker(images), thinner(images)])
        scale = torch.cat([torch.ones(len(images)), -torch.ones(len(images))]).to(device)
        t, label = torch.cat([t, t]), torch.cat([label, label])
        noise = torch.randn_like(images)
        eps = torch.cat([noise, noise])
        levels = network.schedule.at(t, x0)
        with attached(network.module, dict(adapters.items()), scale):
            output = network.output(levels[0] * x0 + levels[1] * eps, t, label)
        loss = denoising_loss(network.predicts, output, x0, eps, *levels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    run.loop(stage, {"adapters": adapters, "optimizer": optimizer}, step, spec.steps)
    return state_on_cpu(adapters)


def _sliders(config: Config, run: Run, product: HybridGenerator, probe: Probe) -> dict[str, float]:
    """Sliders of base and student, each used on both: by how much the ink changes from the lowest to the highest scale
    (`slide_base_to_student`), and Spearman's correlation of scale and ink (`slide_order_base_to_student`)."""
    spec, schedule = config.slider, product.denoiser.schedule
    grid = trajectory_times(schedule.steps, config.match.steps)[1:]
    networks = {"base": product.base, "student": product.module}
    figures: dict[str, float] = {}
    for name, module in networks.items():
        network = Denoiser(module, product.predicts, schedule, len(product.prompts.names))
        stage = f"{SLIDER}.{name}"
        uses = {
            "network": module,
            "predicts": config.base.predicts,
            "schedule": config.base.schedule,
            "slider": spec.model_dump(mode="json", include={"steps", "batch_size", "lr", "adapter"}),
            "times": grid if name == "student" else None,
            "data": run.data(config.data),
            "prompts": [list(product.prompts.names), list(product.prompts.of_class)],
            "seed": run.seed,
        }
        times = grid if name == "student" else None
        weights = run.stage(stage, lambda n=network, t=times, s=stage: train_slider(run, n, spec, config, t, s), uses)  # type: ignore[misc]
        slider = spec.adapter.build(module).to(run.device)
        slider.load_state_dict(weights)
        slider.requires_grad_(False)
        if name == "base":
            product.slider = slider
        for other in networks:
            begin = 0 if other == "student" else config.match.steps
            figures |= _slid(product, probe, spec, slider, begin, f"{name}_to_{other}")
    return figures


def _slid(
    product: HybridGenerator, probe: Probe, spec: SliderSpec, slider: nn.ModuleDict, begin: int, name: str
) -> dict[str, float]:
    """What a slider does to samples that begin at the same noise."""
    own, product.slider = product.slider, slider
    means = []
    try:
        for scale in spec.scales:
            inks = []
            for number in range(len(product.prompts.names)):
                noise = probe.noise(number)[: spec.samples]
                label = torch.full((len(noise),), number, device=noise.device)
                inks.append(ink(product.look.images(product.sampled(noise, label, begin, slide=scale).x)))
            means.append(float(torch.cat(inks).mean()))
    finally:
        product.slider = own
    return {
        f"slide_{name}": means[spec.scales.index(max(spec.scales))] - means[spec.scales.index(min(spec.scales))],
        f"slide_order_{name}": rank_correlation(spec.scales, means),
    }


def check_slider(config: Config) -> None:
    """Raises `UserError` for scales that say nothing."""
    if len(set(config.slider.scales)) < 2 or len(set(config.slider.scales)) != len(config.slider.scales):
        raise UserError("slider.scales: two or more, and none twice.")
