"""ALBEF: image and text are aligned before they are fused, and a moving average of the network gives soft answers next
to captions that may be wrong.

paper: Align before Fuse: Vision and Language Representation Learning with Momentum Distillation
venue: NeurIPS 2021
arxiv: 2107.07651
task: image and text
family: self-distillation, momentum teacher
use when: a network for image and text is trained from captions that are noisy, as those of the web are
needs: images with texts, no labels

Three losses train one network (stillhouse:fusion). Contrast: the embeddings of image and text, before they are fused,
among the batch and two queues of embeddings of the moving average; over many processes the batch is that of all, with
gradient. Matching: whether an image and a text belong together, read by the fusion from the tokens of both, with an
image and a text of the batch as negatives that are drawn the more often the more similar they are. Masked words, read
from the rest of the text and the image. Momentum distillation: the targets of contrast and of masked words are
(1 - alpha) * what the caption says + alpha * the softmax of the moving average; alpha rises from 0 over the first
epoch, and matching has none. `alpha: 0` is the method without it, `alpha_words: 0` with it in the contrast alone.
`targets: pairs` takes each caption as right for its own image alone, `ids` as right for all images that have it;
captions that are written from labels repeat, so its recipe takes ids. After that `finetune` trains for retrieval, with
contrast and matching, on `data`; the pre-training may have other data of its own, of another size. Retrieval ranks by
cosines; the `rerank` nearest are ranked again by matching (`matched_…`). Figures besides: accuracy of matching, and of
every word that tells captions apart, masked alone (`masked_accuracy`, with the probability of the right one on test and
on training images, whose captions were wrong in training). Not as in the released code: the average is in evaluation
mode, without dropout; negatives are drawn by the Gumbel trick, so that vanishing weights do no harm; a sample whose
negatives are all of its own id has none; and `random_until` has random negatives in the first epochs, without which
matching was not seen to learn in a small network that begins fresh. Other uses of the paper (questions with an answer
decoder, entailment, pairs of images, grounding) are not here. The captions of its recipe are written from labels and
from the look of the images, and a share of their words is wrong.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from stillhouse.config.specs import Data, DataSpec, MethodConfig, Model, ModelSpec, Spec, TrainSpec
from stillhouse.errors import UserError
from stillhouse.methods.image_text.albef.evaluation import (
    Collected,
    collected,
    masked_words,
    matching_accuracy,
    ranked_again,
)
from stillhouse.methods.image_text.albef.training import FusionTraining, Terms
from stillhouse.models import build
from stillhouse.models.fusion import FusedEncoders, begin_from
from stillhouse.models.tokenizer import identity, marks
from stillhouse.randomness import keyed
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.tasks.image_text import ImageText


class Begin(Spec):
    """Published weights to begin from."""

    image: ModelSpec | None = Field(None, description="A plain vision transformer of timm.")
    text: ModelSpec | None = Field(None, description="A BERT of transformers.")


class Finetune(Spec):
    """Training for retrieval, after the pre-training."""

    alpha: float = Field(0.4, ge=0, le=1, description="Share of the moving average's answers in the contrast.")
    targets: Literal["ids", "pairs"] = Field("ids", description="What is right for a sample, as in the pre-training.")
    queue: int | None = Field(None, ge=0, description="Default: that of the pre-training.")
    train: TrainSpec = Field(default_factory=TrainSpec)


class Config(MethodConfig):
    data: Data = Field(description="Images with texts, which the network is for.")
    pretraining: Data | None = Field(
        None, description="Images with texts of the pre-training; null: the same as data. `finetune` trains on data."
    )
    student: Model = Field(description="stillhouse:fusion, with its shape.")
    begin: Begin | None = Field(None, description="Published weights to begin from; null: a fresh network.")
    alpha: float = Field(0.4, ge=0, le=1, description="Share of the moving average's answers in the contrast.")
    alpha_words: float | None = Field(None, ge=0, le=1, description="In the masked words; null: as alpha.")
    ramp: float = Field(1.0, ge=0, description="Epochs over which both rise from 0.")
    momentum: float = Field(0.995, ge=0, le=1, description="What of the moving average stays in a step.")
    queue: int = Field(65536, ge=0, description="Embeddings in each queue; 0: the batch alone.")
    mask: float = Field(0.15, gt=0, le=1, description="Share of words that are masked.")
    targets: Literal["ids", "pairs"] = Field(
        "pairs", description="What is right for a sample: all captions of its id, or its own alone."
    )
    negatives: Literal["hard", "random"] = Field("hard", description="How the negatives of matching are drawn.")
    random_until: float = Field(
        0.0,
        ge=0,
        description="Epochs in which negatives are random before they are hard: for a network that begins fresh.",
    )
    contrast_weight: float = Field(1.0, ge=0)
    matching_weight: float = Field(1.0, ge=0)
    words_weight: float = Field(1.0, ge=0)
    train: TrainSpec = Field(default_factory=TrainSpec)
    finetune: Finetune | None = None
    rerank: int = Field(128, ge=1, description="Candidates that matching ranks again.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _something_is_learned(self) -> Config:
        if not (self.contrast_weight or self.matching_weight or self.words_weight):
            raise ValueError("all weights are 0: there is nothing to learn")
        if self.pretraining is not None and self.finetune is None:
            raise ValueError("pretraining is other data than `data`, so `finetune` must say how it is trained on these")
        return self

    @property
    def first(self) -> DataSpec:
        """What is pre-trained on."""
        return self.pretraining or self.data

    @property
    def terms(self) -> Terms:
        """Of the pre-training."""
        return Terms(
            alpha=self.alpha,
            alpha_words=self.alpha if self.alpha_words is None else self.alpha_words,
            contrast=self.contrast_weight,
            matching=self.matching_weight,
            words=self.words_weight,
            targets=self.targets,
            negatives=self.negatives,
            random_until=self.random_until,
            mask_share=self.mask,
            ramp=self.ramp,
        )


PRETRAIN = Stage("pretrain", "learn contrast, matching and masked words under the moving average")
FINETUNE = Stage("finetune", "train for retrieval: contrast and matching")
LOOKED_AT = 1000
"""Images of the training split by which the probability of masked words is measured."""


class Albef(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        check_groups(run.data(config.data, ImageText).task, config.evaluate)

        def steps(data: DataSpec, train: TrainSpec) -> int:
            return train.epochs * len(run.loader(data, "train", train.batch_size, train=True))

        first, last = (run.data(spec, ImageText).task for spec in (config.first, config.data))
        if identity(first.tokenizer) != identity(last.tokenizer):
            raise UserError(
                "albef: data and pretraining need the same data.options.tokenizer, of a vocabulary of its own."
            )
        stages = [PRETRAIN.filled(models={"student": config.student.model}, steps=steps(config.first, config.train))]
        if config.finetune is not None:
            stages.append(FINETUNE.filled(steps=steps(config.data, config.finetune.train)))
        return stages

    def run(self, config: Config, run: Run) -> Student:
        first, data = config.first, config.data
        net = self.network(config, run, first)
        _mask_of(run.data(first).task)
        if config.begin is not None:
            begin_from(net, *(_published(spec, net) for spec in (config.begin.image, config.begin.text)))
        module = self.training(config, run, net, config.terms, config.queue, first)
        seconds = self.fitted(run, PRETRAIN, module, first, config.train)
        if config.finetune is not None:
            tuned = config.finetune
            net = self.resized(config, run, net)
            net.word_head.requires_grad_(False)
            terms = Terms(alpha=tuned.alpha, words=0.0, targets=tuned.targets, ramp=config.ramp)
            queue = config.queue if tuned.queue is None else tuned.queue
            module = self.training(config, run, net, terms, queue, data)
            seconds += self.fitted(run, FINETUNE, module, data, tuned.train)
            net.word_head.requires_grad_(True)
        figures = {"train_seconds": seconds, **self.measured(config, run, net.eval())}
        return run.student(net, config.student, data, figures)

    def network(self, config: Config, run: Run, data: DataSpec) -> FusedEncoders:
        net = run.model(config.student, data)
        if not isinstance(net, FusedEncoders):
            raise UserError(
                f"albef: '{config.student.model}' has no fusion of image and text; give student.model: "
                "stillhouse:fusion."
            )
        return net

    def training(
        self, config: Config, run: Run, net: FusedEncoders, terms: Terms, queue: int, data: DataSpec
    ) -> FusionTraining:
        task = run.data(data).task
        with keyed("queues", run.seed):
            return FusionTraining(net, terms, queue, config.momentum, _begin_of(task), _mask_of(task))

    def fitted(self, run: Run, stage: Stage, module: FusionTraining, data: DataSpec, train: TrainSpec) -> float:
        loader = run.loader(data, "train", train.batch_size, train=True)
        return run.fit(stage, module, loader, train, evaluate=run.validating(data)).seconds

    def resized(self, config: Config, run: Run, net: FusedEncoders) -> FusedEncoders:
        """The network for images of another size than those of its pre-training; itself where they are of the same."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        if run.data(config.first).task.size == run.data(config.data).task.size:
            return net
        larger, state = self.network(config, run, config.data), dict(net.state_dict())
        name = "visual_encoder.pos_embed"
        grid = larger.visual_encoder.patch_embed.grid_size
        state[name] = resample_abs_pos_embed(state[name], list(grid))
        larger.load_state_dict(state)
        return larger

    def measured(self, config: Config, run: Run, net: FusedEncoders) -> dict[str, float]:
        """Retrieval ranked again, matching, and masked words of the test split and of training images."""
        data, task = config.data, run.data(config.data).task
        assert isinstance(task, ImageText)
        net = net.to(run.device)
        _, split = run.judging_data()

        def read(split: str, most: int | None = None) -> Collected:
            return collected(net, run.loader(data, split), run.device, task.context, task.tokenizer.pad_token_id, most)

        test = read(split)
        out = ranked_again(net, test, config.rerank, run.device) | matching_accuracy(net, test, run.device)
        if config.words_weight:
            words = (_mask_of(task), task.tokenizer.all_special_ids, run.device)
            out |= masked_words(net, test, *words)
            trained = masked_words(net, read("train", LOOKED_AT), *words)
            out |= {f"{name}_train": value for name, value in trained.items()}
        return out


def _mask_of(task: ImageText) -> int:
    mask = task.tokenizer.mask_token_id
    if mask is None:
        raise UserError(
            "albef: words are masked, but this tokenizer has no mask token; take data.options.tokenizer: bytes, "
            "bpe:SIZE, or that of a BERT (hf:NAME)."
        )
    return int(mask)


def _begin_of(task: ImageText) -> int:
    begin, _ = marks(task.tokenizer)
    if not begin:
        raise UserError("albef: this tokenizer puts no mark before a text, at which it is pooled; take another.")
    return begin[0]


def _published(spec: ModelSpec | None, net: FusedEncoders) -> nn.Module | None:
    """A trained encoder."""
    if spec is None:
        return None
    if spec.model.startswith("hf:"):
        return build(spec.model_copy(update={"options": {"task": "masked", **spec.options}}))
    size = net.visual_encoder.patch_embed.img_size
    return build(spec, 0, (net.visual_encoder.patch_embed.proj.in_channels, *size))
