"""Video-BLADE: a video diffusion transformer learns to sample in few steps with sparse attention, without videos.

paper: Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation
venue: ICLR 2026
arxiv: 2508.10774
task: generation
family: step distillation
use when: a diffusion transformer of long token sequences must sample faster, and its training videos are not at hand
needs: a trained diffusion transformer with its prompts; here it is trained first, on small clips

The student is sparse from its first step: each block of queries attends to the blocks of keys that its own queries and
keys say matter (a few sampled tokens of each block are compared), tokens are ordered along a Hilbert curve so that a
block is compact in space and time, and means over windows stand for all the rest. It learns by trajectory distribution
matching: its samples are diffused, and it follows the difference between the clean samples of the dense, frozen teacher
and those of a `fake` network, which is trained in turn to denoise what the student makes. Only prompts are read.

Departures. The whole student is trained, not a low-rank adapter. The released index keeps one block less than the
paper describes (`sparsity.inclusive: true` keeps it). Where the released code for flows leaves an update of the fake
network out because its loss is above 2, its gradient is set to 0 here, so that no value is read in a step. Samples are
drawn by the student's own roll-out, not by UniPC. Clips are small: 8 frames of 16 x 16 pixels, so blocks have 4 tokens;
the paper's networks and its scores in VBench are out of reach of this recipe, and block-sparse kernels are not used:
the kept blocks are gathered, which is timed against dense attention. In the one run that was looked at, the recipe's
base model followed its prompts hardly above chance (31 % of samples; a quarter is chance): attention can be judged by
it, its samples cannot, until it is trained for longer.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.generation.config import DenoiserSpec, GenerationConfig, Prompts, SamplerSpec
from stillhouse.generation.denoising import Denoiser, base_model, base_stage
from stillhouse.generation.judging import PROBE, Probe
from stillhouse.generation.product import Look, write_grids
from stillhouse.generation.trajectory import STUDENT, MatchingSpec, check_matching, matched_student, student_sampler
from stillhouse.methods.generation.video_blade.attention import AdaptiveAttention
from stillhouse.methods.generation.video_blade.measuring import attended_to, error_curves, jerk, timed
from stillhouse.methods.generation.video_blade.product import SparseGenerator, SparsitySpec, as_dit, make_sparse
from stillhouse.randomness import generator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.tasks.classification import Classification

MEASURED = 16  # clips in which attention is compared


class TimingSpec(Spec):
    """Timing of gathered blocks against dense attention."""

    tokens: list[int] = Field(default_factory=list, description="Lengths of the sequences; none: not timed.")
    heads: int = Field(4, ge=1)
    width: int = Field(64, ge=1, description="Of a head.")
    repeats: int = Field(3, ge=1, description="Of which the median counts.")
    sparsity: SparsitySpec = Field(
        default_factory=SparsitySpec, description="The published settings, unless told otherwise."
    )


class Config(GenerationConfig):
    base: DenoiserSpec = Field(description="The dense teacher; the student begins as its copy.")
    base_sampler: SamplerSpec = Field(
        default_factory=lambda: SamplerSpec(steps=50, guidance=2.0), description="By which the teacher is judged."
    )
    match: MatchingSpec = Field(default_factory=MatchingSpec)
    sparsity: SparsitySpec = Field(default_factory=SparsitySpec)
    sparse: Literal["in_training", "afterwards", "never"] = Field(
        "in_training", description="afterwards: a dense student, whose attention is made sparse without training."
    )
    train_student: bool = Field(True, description="false: the teacher itself, in the student's few steps.")
    timing: TimingSpec = Field(default_factory=TimingSpec)


class VideoBlade(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        task = run.data(config.data, Classification).task
        Prompts.read(config.prompts, task.classes)
        check_frames(config)
        check_matching(config.match, config.base.schedule.build())
        stages = [base_stage(run, config.base, config.data), PROBE]
        if config.train_student:
            stages.insert(1, STUDENT.filled(steps=config.match.iterations, models={"student": config.base.model}))
        return stages

    def run(self, config: Config, run: Run) -> SparseGenerator:
        bundle = run.data(config.data, Classification)
        prompts = Prompts.read(config.prompts, bundle.classes)
        teacher = base_model(run, config.base, config.data, prompts)
        net = as_dit(teacher.module)
        config.sparsity.mix(net.grid)  # a mistake in it is told before anything is trained
        module: nn.Module = copy.deepcopy(teacher.module)
        if config.train_student:
            sparse = config.sparse == "in_training"
            prepare = (lambda student: make_sparse(student, config.sparsity)) if sparse else None
            uses = {"sparsity": config.sparsity if sparse else None}
            trained = matched_student(
                run, STUDENT, config.base, config.match, teacher, bundle.input_shape, prepare, uses
            )
            module.load_state_dict(trained)
        module.to(run.device).eval().requires_grad_(False)
        if config.sparse != "never":
            make_sparse(module, config.sparsity)
        return _product(config, run, teacher, module, prompts, net.frames)


def _product(
    config: Config, run: Run, teacher: Denoiser, module: nn.Module, prompts: Prompts, frames: int
) -> SparseGenerator:
    """The student with what must be measured while the teacher is there."""
    task = run.data(config.data, Classification).task
    look = Look.of(task, frames)
    guidance = 0.0 if config.train_student else config.base_sampler.guidance
    sampler = student_sampler(config.match) if config.train_student else SamplerSpec(steps=config.match.steps)
    sparsity = None if config.sparse == "never" else config.sparsity
    facts = (prompts, look, config.base.predicts, config.base.schedule)
    product = SparseGenerator(
        module,
        config.base.network,
        *facts,
        sampler.model_copy(update={"guidance": guidance}),
        sparsity=sparsity,
    )
    base = SparseGenerator(teacher.module, config.base.network, *facts, config.base_sampler)
    probe = Probe(run, config)
    real = probe.real_samples(max(config.judge.samples, 2))
    mine, theirs = probe.drawn(product.draw), probe.drawn(base.draw)
    figures = {f"{name}_teacher": value for name, value in probe.figures(theirs).items()}
    figures |= {"jerk": jerk(look.images(mine.flatten(0, 1)), frames)}
    figures |= {"jerk_teacher": jerk(look.images(theirs.flatten(0, 1)), frames)}
    figures |= {"jerk_data": jerk(look.images(real.flatten(0, 1)), frames)}
    if sparsity is not None:
        net = as_dit(product.module)
        mixes = [a.mix for a in net.attentions if isinstance(a.mix, AdaptiveAttention)]
        kept = torch.stack([m.kept for m in mixes if m.kept is not None]).mean()
        window = sparsity.window
        figures |= {"blocks_kept": float(kept), "sparsity": 1 - float(kept) - (1 / window if window else 0.0)}
        figures |= error_curves(sparsity, net.grid, _calls(teacher, run, real, prompts))
    for tokens in config.timing.tokens:
        timing = config.timing
        figures |= timed(tokens, timing.heads, timing.width, timing.sparsity, timing.repeats, run.device)
    probe.close()
    write_grids(run, look, prompts, {"truth": real, "student": mine, "teacher": theirs})
    product.figures = figures
    return product


def _calls(teacher: Denoiser, run: Run, real: Tensor, prompts: Prompts) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of the teacher for clips of the data, at times all along."""
    count = len(prompts.names)
    chosen = real[:, : max(1, MEASURED // count)].flatten(0, 1).to(run.device)
    label = torch.arange(count, device=run.device).repeat_interleave(len(chosen) // count)
    t = torch.linspace(0, teacher.schedule.steps - 1, len(chosen), device=run.device).long()
    noise = torch.randn(chosen.shape, generator=generator("noise of measured clips")).to(chosen)
    return attended_to(teacher, teacher.schedule.add_noise(chosen, noise, t), t, label)


def check_frames(config: Config) -> None:
    """Raises `UserError` where data and network differ in the frames of a clip."""
    given, known = config.data.options.get("frames"), config.base.options.get("frames", 1)
    if given is not None and given != known:
        raise UserError(f"data.options.frames is {given}, but base.options.frames is {known}; give both the same.")
