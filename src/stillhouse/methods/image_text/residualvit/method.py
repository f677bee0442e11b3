"""ResidualViT: between the key frames of a video a frozen CLIP reads a few patches of each frame, with one learned
token that says what the key frame was.

paper: ResidualViT for Efficient Temporally Dense Video Encoding
venue: ICCV 2025
arxiv: 2509.13255
task: image and text
family: inference cost, features
use when: every frame of a video is to be embedded by a CLIP, and neighbouring frames are nearly equal
needs: a CLIP of transformers (or stillhouse:clip) as the teacher; short clips with a caption each, no other labels

Every (`every` + 1)-th frame is read whole; of the others a share `drop` of the patches is not read, and a linear layer
makes one token of the key frame's embedding, which stands after the class token. That layer alone is trained: over the
captions of a batch a partly read frame shall have the softmax that the whole frame has (`loss: ce`; `directions: both`
adds the other direction, which the released script leaves out), or the embedding itself (`mse`). Patches are drawn at
random in training; at inference `mode` says which are read: random, uniform, centre (as released, somewhat above the
centre; exact_centre), motion (given, as a codec knows it, else found by comparing blocks with the frame before),
residual (the difference from the frame before). Instead of dropping, `merge` joins similar tokens in every layer
(ToMe), and `resolution` reads a smaller image; these train as they are used. `cut` makes a key frame of a frame that
differs from the one before by more than that. Clips are made of captioned images: those whose names number them are the
frames of videos (`clips.motion: video`; CamVid's are a second apart in training and test, a fifteenth of one in val),
or a window moves over each (`panned`). Figures: cosine of the embeddings of partly read frames with those of the whole
(`frame_cosine`), and of copies of the key frames' (`copied_cosine`); retrieval, and grounding of captions in the
videos, by whole, interleaved and copied embeddings; multiply-adds and time over those of whole frames. Baselines:
`token: false` (dropping alone), `train: null` (a token that was not trained). The product is the CLIP with the layer:
it embeds images and texts as before, and `encode` embeds a video. The captions of its recipe are written from masks:
what its networks learn is class names, not language.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, ModelSpec, Teacher, TrainSpec
from stillhouse.data import BatchKey, Loader
from stillhouse.data.clips import Clips, Frames, PannedClips, VideoClips, captions_of, clips_of, videos
from stillhouse.data.image_text import ImageTextBundle
from stillhouse.errors import UserError
from stillhouse.methods.image_text.residualvit.encoder import Normalisation, Reduction, VideoEncoder
from stillhouse.methods.image_text.residualvit.evaluation import compared, costs
from stillhouse.methods.image_text.residualvit.losses import Directions
from stillhouse.methods.image_text.residualvit.reduction import Mode
from stillhouse.methods.image_text.residualvit.training import Loss, ResidualTraining
from stillhouse.models.clip import Clip, as_clip
from stillhouse.models.sources import published_normalisation
from stillhouse.models.tokenizer import identity
from stillhouse.models.weights import load_weights
from stillhouse.processes import rank_world
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating
from stillhouse.tasks.base import Task
from stillhouse.tasks.image_text import ImageText


class Config(MethodConfig):
    data: Data = Field(description="Images with texts: frames of videos, or images that a window moves over.")
    clips: Clips = Field(default_factory=Clips, description="How clips are made of them.")
    teacher: Teacher = Field(description="The CLIP.")
    mode: Mode = Field("motion", description="What is read of frames between key frames, at inference.")
    drop: float = Field(0.85, ge=0, lt=1, description="Share of the patches that is not read.")
    every: int = Field(2, ge=0, description="Frames between two key frames.")
    token: bool = Field(True, description="Whether there is a residual token; false: dropping alone.")
    layers: int = Field(1, ge=1, description="Linear layers that make the token.")
    proportional: bool = Field(True, description="merge: attention counts what a token was made of.")
    loss: Loss = Field("ce", description="ce: by the captions of a batch; mse: by the embeddings.")
    directions: Directions = Field("v", description="ce: v: images over captions; both: captions over images too.")
    cut: float | None = Field(
        None, gt=0, description="A frame that differs from the one before by more, on average, is a key frame."
    )
    split: Literal["test", "val"] = Field("test", description="Whose videos figures are of.")
    train: TrainSpec | None = Field(default_factory=TrainSpec, description="Of the token; null: it is not trained.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _token_fits(self) -> Config:
        if not self.token and self.train is not None:
            raise ValueError("token: false leaves nothing to train; set train: null")
        return self

    @property
    def reduction(self) -> Reduction:
        return Reduction(self.mode, self.drop, self.every, self.token, self.layers, self.proportional)


TEACHER = Stage("teacher", "train the CLIP (stored, shared)")
TOKEN = Stage("token", "distil whole frames into the residual token")
PANNED = 9
"""Frames of a clip by which a moving window is judged."""


class ResidualViT(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        check_groups(run.data(config.data, ImageText).task, config.evaluate)
        stages = [TEACHER] if config.teacher.train else []
        if config.train is not None:
            steps = config.train.epochs * len(self.loader(config, run, config.train))
            stages.append(TOKEN.filled(models={"teacher": str(config.teacher.model)}, steps=steps))
        if not stages:
            stages.append(Stage("measure", "read videos with what is there"))
        return stages

    def run(self, config: Config, run: Run) -> VideoProduct:
        task = run.data(config.data, ImageText).task
        clip, own = self.clip(config, run, task)
        facts = (task.normalisation, own)
        with keyed("token", run.seed):
            net = VideoEncoder(clip, config.reduction, *facts).to(run.device)
        figures: dict[str, float] = {}
        if config.train is not None:
            module = ResidualTraining(net, config.loss, config.directions)
            loader = self.loader(config, run, config.train)
            figures["train_seconds"] = run.fit(TOKEN, module, loader, config.train).seconds
        figures |= self.measured(config, run, net.to(run.device).eval())
        spec = ModelSpec(model="stillhouse:clip", options=clip.options)
        plain = run.student(net.eval(), spec, config.data, figures)
        return VideoProduct(plain.module, plain.model, plain.task, plain.figures, config.reduction, facts)

    def clip(self, config: Config, run: Run, task: ImageText) -> tuple[Clip, Normalisation]:
        """The teacher in our form, and the normalisation of the images that it was trained on."""
        spec = config.teacher
        its = run.data(spec.data or config.data, ImageText).task
        if identity(its.tokenizer) != identity(task.tokenizer):
            raise UserError("residualvit: data and teacher.data need the same data.options.tokenizer.")
        model = run.network("teacher", spec, config.data)
        own = published_normalisation(spec.network, model) if spec.pretrained and spec.train is None else None
        found = as_clip(model)
        side = int(len(found.image.positions) - 1) ** 0.5 * int(found.image.patches.kernel_size[0])
        if task.size != (side, side):
            raise UserError(
                f"residualvit: the teacher reads images of {side:g} x {side:g} pixels; set data.image_size to "
                f"{side:g}, not {list(task.size)}."
            )
        return found, own or its.normalisation

    # ---- clips -------------------------------------------------------------------------------------------------------

    def clip_data(self, config: Config, run: Run, split: str, train: bool, frames: int) -> VideoClips | PannedClips:
        """Clips of a split of so many frames."""
        bundle = run.data(config.data, ImageText)
        if config.clips.motion == "panned":
            side = round(config.clips.zoom * bundle.task.size[0])
            bundle = run.data(config.data.model_copy(update={"image_size": side}), ImageText)
            clips, size = config.clips.model_copy(update={"frames": frames}), run.data(config.data).task.size
            return PannedClips(_frames(bundle, split, train), clips, size)
        rows = clips_of(self.videos(config, run, split), frames)
        if not len(rows):
            raise UserError(f"residualvit: no video of '{config.data.name}' ({split}) has {frames} frames.")
        return VideoClips(_frames(bundle, split, train), rows)

    def videos(self, config: Config, run: Run, split: str) -> list[list[int]]:
        """Positions of the frames of each video of a split."""
        names = run.data(config.data, ImageText).named(split)
        if names is None:
            raise UserError(
                f"residualvit: the images of '{config.data.name}' have no names that tell which are frames of one "
                "video; set clips.motion: panned."
            )
        return videos(names)

    def loader(self, config: Config, run: Run, train: TrainSpec) -> Loader:
        clips = self.clip_data(config, run, "train", True, config.clips.frames)
        if train.batch_size > len(clips):
            raise UserError(f"A batch of {train.batch_size} clips is larger than the data, {len(clips)} clips.")
        rank, world = rank_world()
        return Loader(
            clips,
            train.batch_size,
            seed=run.seed,
            shuffle=True,
            drop_last=True,
            workers=config.data.workers,
            rank=rank,
            world=world,
        )

    def measured(self, config: Config, run: Run, net: VideoEncoder) -> dict[str, float]:
        """What embeddings of videos are worth, and what they cost."""
        bundle = run.data(config.data, ImageText)
        images = bundle.dataset(config.split, train=False)
        found: list[tuple[Tensor, Tensor]] = []
        if config.clips.motion == "panned":
            clips = self.clip_data(config, run, config.split, False, PANNED)
            batch = clips.batch(BatchKey(0, np.arange(len(clips)), 0, len(clips)), config.data.seed)
            frames, labels = batch["input"]["pixel_values"], batch["label"]
            found = [(f, label.expand(PANNED)) for f, label in zip(frames, labels)]
        else:
            for rows in self.videos(config, run, config.split):
                batch = images.batch(BatchKey(0, np.array(rows), 0, len(rows)), run.seed)
                found.append((batch["input"]["pixel_values"], batch["label"]))
        tokens, ids = captions_of(bundle.task, images)
        with evaluating(net):
            text = net.get_text_features(**{k: v.to(run.device) for k, v in tokens.items()})
        out = compared(net, found, F.normalize(text.float(), dim=-1).cpu(), ids, config.cut, run.seed)
        longest = max((frames for frames, _ in found), key=len)
        return out | costs(net, longest)


def _frames(bundle: ImageTextBundle, split: str, train: bool) -> Frames:
    """The images of a split without augmentation, with captions as in training."""
    return Frames(bundle.dataset(split, train=False), bundle.dataset(split, train=train).captions, bundle.task)


# ---- the product -----------------------------------------------------------------------------------------------------


@dataclass
class VideoProduct(Student):
    """A CLIP with the layer that makes the residual token.

    Attributes:
        reduction: how frames between key frames are read.
        normalisations: of the images that come, and of those that the CLIP was trained on.
    """

    kind: ClassVar[str] = "stillhouse.methods.image_text.residualvit:VideoProduct"
    reduction: Reduction = field(default_factory=Reduction)
    normalisations: tuple[Normalisation, Normalisation] = (((), ()), ((), ()))

    def extras(self) -> dict[str, Any]:
        return {"video": {"reduction": asdict(self.reduction), "normalisations": self.normalisations}}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> VideoProduct:
        assert isinstance(task, ImageText)
        facts = meta["video"]
        given, own = (_normalisation(n) for n in facts["normalisations"])
        clip = Clip(**spec.options, input_shape=(len(task.mean), *task.size))
        module = VideoEncoder(clip, Reduction(**facts["reduction"]), given, own)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, reduction=module.reduction, normalisations=(given, own))


def _normalisation(saved: Any) -> Normalisation:
    mean, std = saved
    return tuple(mean), tuple(std)


evaluates(VideoProduct.kind)(evaluate)
