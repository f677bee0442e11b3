"""IMDN: a light network for super-resolution that sets finished channels aside inside each block.

paper: Lightweight Image Super-Resolution with Information Multi-distillation Network
venue: ACM Multimedia 2019
arxiv: 1909.11856
task: restoration
family: architecture
use when: images must be enlarged or restored on a device, by a network of 0.7 M parameters or less
needs: photographs, or pairs of damaged and true images

Inside a block, a quarter of the channels is set aside after each 3x3 convolution and the rest is refined; the four
quarters are weighed by contrast-aware channel attention (mean plus standard deviation over the image), fused by a 1x1
convolution and added to the input. Six blocks, whose outputs are fused once more, and a rearrangement of channels into
pixels; the loss is the mean absolute error. There is no teacher: what is distilled are the channels.

`stillhouse:imdn` is the network of a scale; the published weights load by their own names, and give the published
figures. `stillhouse:imdn_as` restores an image that was enlarged to the wanted size before (`data.options.enlarged`),
so that one network serves any scale; its maps have a quarter of the size, and an image whose sides 4 does not divide
goes through it in four overlapping crops (adaptive cropping; a small image is mirrored up to the next multiple).
`stillhouse:imdn_rtc` and `stillhouse:imdn_rte` are the authors' small challenge entries at scale 2. The options
`attention: false` and `splitting: false` are the ablations; without splitting a block has four plain convolutions of
about as many weights. Any of them is a student or teacher of the general method too (see the recipe imdn_kd).

The equations and the released code agree. The released code's deviation has no epsilon, so that a constant channel's
gradient is infinite; here it is 0 there, and the output is the same to 1e-6. Its figures round luma to whole levels
(`psnr_uint8`, about 0.1 dB lower); `psnr` and `ssim` are those of the paper's tables. `start` takes the weights of
another scale, as the authors begin scales 3 and 4; layers that do not fit are new.
"""

from __future__ import annotations

from pydantic import Field

from stillhouse.config.specs import Data, MethodConfig, Model, ModelSpec, Objectives, ObjectiveSpec, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.methods.distillation import describe
from stillhouse.models import weights
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.tasks.restoration import Restoration


class Config(MethodConfig):
    data: Data = Field(description="Pairs of images, such as restore:PATH.")
    student: Model = Field(
        default_factory=lambda: ModelSpec(model="stillhouse:imdn"), description="The network; its scale is the data's."
    )
    start: str | None = Field(
        None, description="Weights to start from, of another scale, say: those that fit are taken, the rest is new."
    )
    objectives: Objectives = Field(
        default_factory=lambda: [ObjectiveSpec(name="l1")], description="The losses, whose weighted sum is minimised."
    )
    train: TrainSpec | None = Field(
        default_factory=TrainSpec, description="How it is fitted; null: judge the checkpoint of `student` as it is."
    )
    evaluate: list[str] = Field(
        default_factory=lambda: ["quality", "cost"],
        description="Groups of figures: restoration (of luma, as published), protocols (luma rounded, RGB), baseline "
        "(bicubic), quality for all of them, and cost.",
    )


NETWORK = Stage("student", "train the network on crops of the photographs")
JUDGED = Stage("student", "judge the published network as it is")


class IMDN(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        task = run.data(config.data, Restoration).task
        check_groups(task, config.evaluate)
        if config.train is None and config.student.checkpoint is None:
            raise UserError("train: null judges a network as it is; name its weights in student.checkpoint.")
        models = {"student": describe(config.student.model, run.model(config.student, config.data))}
        if config.train is None:
            return [JUDGED.filled(models=models)]
        batches = len(run.loader(config.data, "train", config.train.batch_size, train=True))
        return [NETWORK.filled(models=models, steps=config.train.epochs * batches)]

    def run(self, config: Config, run: Run) -> Student:
        network = run.model(config.student, config.data)
        if config.start is not None:
            weights.load_fitting(network, run.weights_file(config.start), owner="student")
        if config.train is None:
            return run.student(network, config.student, config.data, {})
        objectives = [objective_from_spec(o) for o in config.objectives]
        module = Distillation(network, None, objectives, seed=run.seed, task=run.data(config.data).task)
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        fitted = run.fit(
            NETWORK,
            module,
            loader,
            config.train,
            evaluate=run.validating(config.data),
            splits=run.splits(config.data),
        )
        module.close()
        return run.student(network, config.student, config.data, {"train_seconds": fitted.seconds})
