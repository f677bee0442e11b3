"""Hybrid Distill: a ViT learns the last features of a supervised or contrastive teacher and the token relations of a
masked autoencoder.

paper: Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners
venue: ICLR 2024
arxiv: 2306.15876
task: pre-training of vision transformers
family: two teachers, features and relations
use when: an encoder should tell classes apart and keep its attention diverse; both kinds of pre-trained ViT are at hand
needs: a supervised or contrastive ViT and an MAE ViT with the student's grid of patches; images without labels

No code was published; [R] marks what the paper leaves open. The student's last tokens, through one linear layer, match
those of the first teacher, standardised over the width (smooth L1, beta 2 [R]); its relations softmax(q k' / sqrt d)
and softmax(v v' / sqrt d) at the second last block [R] match the masked autoencoder's by KL, teacher first. Both weigh
1. While the student runs, its most redundant patches, those with the largest mean cosine similarity to the others, are
dropped before the blocks 0, D/3 and 2D/3 [R], in equal ratios to the share `keep` [R: a half]; teachers see the whole
image, and losses compare the patches that the student still has, the teacher's queries, keys and values being taken
before the softmax. Heads of different number are cut into `relations.heads`. Each teacher may have a normalisation of
its own (`input`). The product is the encoder with a linear probe as its classifier; `accuracy` is that probe's.
`attention_nmi` and `attention_distance` are those of its last block: a low NMI is attention that collapsed onto the
same keys for all queries.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stillhouse.config.specs import InputSpec, Spec, Teacher
from stillhouse.distillation.own_input import OwnInput
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.evaluation.attention import attention_figures
from stillhouse.methods.pretraining.hybrid_distill.losses import FeatureLoss
from stillhouse.methods.pretraining.hybrid_distill.pruning import planned_counts
from stillhouse.methods.pretraining.hybrid_distill.training import HybridTraining, Source, step_times
from stillhouse.nn.masked_vit import as_encoder, check_blocks, grid_of, heads_of
from stillhouse.pretraining.encoder import PretrainingConfig, judged, pretrained, pretraining_stage, tuning_stages
from stillhouse.pretraining.mae import MaskedTeacher, masked_teacher, new_encoder, teacher_stages
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.tasks.classification import Classification


class RelationTeacher(MaskedTeacher):
    """The teacher of relations."""

    input: InputSpec | None = Field(None, description="Its own normalisation; null: the data's.")


class RelationSpec(Spec):
    """Relations of tokens at middle blocks."""

    weight: float = Field(1.0, ge=0, description="0: no relations, and no masked teacher.")
    student_blocks: list[int] | None = Field(None, description="Blocks of the student, from 0; null: the second last.")
    teacher_blocks: list[int] | None = Field(None, description="One for each of them; null: the second last.")
    heads: int | None = Field(None, ge=1, description="Relation heads; null: attention heads, which must be as many.")


class FeatureSpec(Spec):
    """Tokens of the last layer."""

    weight: float = Field(1.0, ge=0, description="0: no features, and no supervised teacher.")
    loss: FeatureLoss = Field("smooth_l1", description="Of standardised tokens.")
    projection: bool = Field(True, description="A linear layer to the teacher's width; false: none.")


class PruningSpec(Spec):
    """Which patches the student drops while it runs."""

    keep: float = Field(0.5, gt=0, le=1, description="Share of the patches left at the end; 1: all.")
    points: list[int] | None = Field(
        None,
        min_length=1,
        description="Blocks before which patches are dropped, rising; null: 0, D/3 and 2D/3.",
    )


class Config(PretrainingConfig):
    contrastive: Teacher = Field(
        description="The teacher of features: a plain ViT with published weights, a checkpoint, or trained here with "
        "labels."
    )
    masked: RelationTeacher = Field(description="The teacher of relations.")
    relations: RelationSpec = Field(default_factory=RelationSpec)
    features: FeatureSpec = Field(default_factory=FeatureSpec)
    pruning: PruningSpec = Field(default_factory=PruningSpec)
    attention_images: int = Field(256, ge=1, description="Images of the judging split on which attention is measured.")

    @model_validator(mode="after")
    def _learns(self) -> Config:
        if not self.relations.weight and not self.features.weight:
            raise ValueError("give relations.weight or features.weight above 0")
        return self


class HybridDistillation(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        stages, losses = [], []
        if config.features.weight:
            does = "train the teacher of features with cross-entropy (stored, shared)"
            stages.append(Stage("teacher", does, {"contrastive": str(config.contrastive.model)}))
            losses.append("the last features of one teacher")
        if config.relations.weight:
            stages += teacher_stages(run, config.masked, config.data)
            losses.append("the relations of a masked autoencoder")
        what = " and ".join(losses)
        if config.pruning.keep < 1:
            what += f", dropping redundant patches to {config.pruning.keep:.0%}"
        return [*stages, pretraining_stage(run, config, what), *tuning_stages(config)]

    def run(self, config: Config, run: Run) -> Student:
        sources = self._sources(config, run)
        uses = {
            **config.model_dump(mode="json", include={"relations", "features", "pruning"}),
            **{name: FrozenTeacher(source.vit).fingerprint() for name, source in sources.items()},
            "inputs": [None if s.input is None else s.input.model_dump() for s in (config.contrastive, config.masked)],
        }
        made = pretrained(run, config, lambda: self._module(config, run, sources), uses, step_times)
        product = judged(run, config, made["weights"], made["figures"])
        run.record["attention"] = attention = self._attention(config, run, product.module, sources)
        for name, found in attention.items():
            of = "" if name == "student" else f"{name}_"
            product.figures |= {f"{of}attention_{what}": by_block[-1] for what, by_block in found.items()}
        return product

    @staticmethod
    def _sources(config: Config, run: Run) -> dict[str, Source]:
        """The teachers that the losses read, by name."""
        bundle, sources = run.data(config.data, Classification), {}

        def source(vit: VisionTransformer, own: InputSpec | None, blocks: Sequence[int] = ()) -> Source:
            frozen, given = vit.to(run.device).eval().requires_grad_(False), (bundle.mean, bundle.std)
            if own is None:
                return Source(frozen, OwnInput(given, given), blocks)
            size = (own.size, own.size) if isinstance(own.size, int) else own.size
            wanted = given if own.mean is None or own.std is None else (own.mean, own.std)
            return Source(frozen, OwnInput(given, wanted, size, own.pool or 1), blocks)

        if config.features.weight:
            network = run.network("contrastive", config.contrastive, config.data, as_saved=True)
            sources["contrastive"] = source(as_encoder(network, "contrastive teacher"), config.contrastive.input)
        if config.relations.weight:
            vit, _ = masked_teacher(run, config.masked, config.data)
            blocks = config.relations.teacher_blocks or [len(vit.blocks) - 2]
            sources["masked"] = source(vit, config.masked.input, blocks)
        return sources

    @staticmethod
    def _attention(
        config: Config,
        run: Run,
        student: nn.Module,
        sources: dict[str, Source],
    ) -> dict[str, dict[str, list[float]]]:
        """Attention of the student and its teachers on whole images, block by block."""
        data, split = run.judging_data()
        images = next(iter(run.loader(data, split, config.attention_images)))["input"].to(run.device)
        networks = {"student": (as_encoder(student, "student"), images)}
        networks |= {name: (source.vit, source.prepare.image(images)) for name, source in sources.items()}
        return {name: attention_figures(vit, [{"input": x}], run.device) for name, (vit, x) in networks.items()}

    @staticmethod
    def _module(config: Config, run: Run, sources: dict[str, Source]) -> HybridTraining:
        student = new_encoder(run, config.student, config.data, "student")
        depth, length = len(student.blocks), grid_of(student)[0] * grid_of(student)[1]
        points = config.pruning.points or [0, depth // 3, 2 * depth // 3]
        check_blocks(points, depth, "pruning.points")
        counts = dict(zip(points, planned_counts(length, config.pruning.keep, len(points))))
        masked = sources.get("masked")
        heads = config.relations.heads or heads_of(student)
        if masked is not None and config.relations.heads is None and heads_of(masked.vit) != heads:
            raise UserError(
                f"The student has {heads} attention heads and the masked teacher {heads_of(masked.vit)}; "
                "set relations.heads to a number that divides both widths."
            )
        with keyed("projection", run.seed):
            return HybridTraining(
                student,
                sources.get("contrastive"),
                masked,
                config.relations.student_blocks or [depth - 2],
                heads,
                counts if config.pruning.keep < 1 else {},
                (config.relations.weight, config.features.weight),
                config.features.loss,
                config.features.projection,
            )
