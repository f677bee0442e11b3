"""The masked autoencoder (MAE, He et al., CVPR 2022, arXiv 2111.06377): its training module, and MAE encoders as
teachers, shared stages.

Needs no labels. The pixel target is an image's own normalised input, patch by patch; the loss counts removed patches
only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stillhouse.config.specs import Data, DataSpec, ModelSpec, Spec, TrainSpec
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.functional.masking import Masking, masked_pixel_loss, patchify, random_masking, visible_count
from stillhouse.nn.masked_vit import MaskedDecoder, as_encoder, decay_groups, encode, fix_positions, grid_of, tokens_of
from stillhouse.pretraining.encoder import steps_of, training_data
from stillhouse.pretraining.probing import FineTune, ProbeSpec, fine_tuned, probed
from stillhouse.randomness import keyed
from stillhouse.runs.method import Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule


class DecoderSpec(Spec):
    """The decoder, which is dropped after pre-training."""

    width: int = Field(512, ge=4, description="Of its tokens; 4 divides it.")
    depth: int = Field(8, ge=1, description="Blocks.")
    heads: int = Field(16, ge=1, description="Attention heads; divide the width.")


class MaskedTeacher(ModelSpec):
    """An encoder pre-trained as a masked autoencoder: from weights, or trained here first, once for every recipe with
    the same teacher."""

    train: TrainSpec | None = Field(None, description="Without weights: how it is trained as a masked autoencoder.")
    data: Data | None = Field(None, description="train: what it is trained on; default: the recipe's data.")
    decoder: DecoderSpec = Field(default_factory=DecoderSpec, description="train: its decoder.")
    mask_ratio: float = Field(0.75, ge=0, lt=1, description="train: share of the patches that it does not see.")
    normalise_pixels: bool = Field(False, description="train: predict each patch's pixels standardised.")
    seed: int = Field(0, description="Of its own training; one teacher serves all seeds of a comparison.")

    @property
    def network(self) -> ModelSpec:
        """The encoder alone."""
        return ModelSpec(**self.model_dump(include=set(ModelSpec.model_fields)))


class MAE(TrainingModule):
    """Training module of a masked autoencoder.

    Args:
        student: the encoder, with sine-cosine positions.
        decoder: predicts the pixels of all patches.
        mask_ratio: share of the patches that the encoder does not see.
        normalise_pixels: predict each patch's pixels standardised.
    """

    student: VisionTransformer

    def __init__(
        self,
        student: VisionTransformer,
        decoder: MaskedDecoder,
        mask_ratio: float,
        normalise_pixels: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.decoder = student, decoder
        self.mask_ratio, self.normalise_pixels = mask_ratio, normalise_pixels
        self.patches = grid_of(student)[0] * grid_of(student)[1]
        self.patch = int(student.patch_embed.patch_size[0])
        visible_count(self.patches, mask_ratio)

    def param_groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, vectors without."""
        return decay_groups(self)

    def draw(self, images: Tensor) -> Masking:
        """A random mask for each image."""
        return random_masking(torch.rand(len(images), self.patches, device=images.device), self.mask_ratio)

    def pixel_loss(self, latent: Tensor, images: Tensor, masking: Masking) -> Tensor:
        """Squared error of the decoder's prediction on removed patches."""
        predicted = self.decoder(latent, masking.ids_restore)
        return masked_pixel_loss(predicted, patchify(images, self.patch), masking.mask, self.normalise_pixels)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["input"]
        masking = self.draw(images)
        return {"loss": self.pixel_loss(encode(self.student, images, masking.ids_keep).tokens, images, masking)}


def new_encoder(run: Run, spec: ModelSpec, data: DataSpec, role: str) -> VisionTransformer:
    """An encoder as MAE initialises it (Xavier, fixed sine-cosine positions), or with the weights that its spec names.

    Raises:
        UserError: a network whose patches cannot be masked.
    """
    vit = as_encoder(run.model(spec, data, role=role), role)
    if not spec.pretrained and spec.checkpoint is None:
        with keyed("encoder", role, run.seed):
            for module in vit.blocks.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
            nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))
            nn.init.normal_(tokens_of(vit)[0], std=0.02)
        fix_positions(vit)
    tokens_of(vit)[1].requires_grad_(False)
    return vit


def new_decoder(run: Run, vit: VisionTransformer, spec: DecoderSpec, outputs: int | None, role: str) -> MaskedDecoder:
    """A decoder for an encoder's tokens."""
    with keyed("decoder", role, run.seed):
        return MaskedDecoder(vit.embed_dim, spec.width, spec.depth, spec.heads, grid_of(vit), outputs)


def pixels_of_patch(vit: VisionTransformer) -> int:
    """Numbers in one patch, over all channels."""
    projection = vit.patch_embed.proj
    return int(projection.in_channels * projection.kernel_size[0] * projection.kernel_size[1])


def teacher_stages(run: Run, spec: MaskedTeacher, data: DataSpec) -> list[Stage]:
    """The plan's line of the stage `teacher`."""
    if spec.train is None:
        return [Stage("teacher", "probe the teacher (stored, shared)", {"teacher": spec.model})]
    does = "train a masked autoencoder as the teacher (stored, shared)"
    return [Stage("teacher", does, {"teacher": spec.model}, steps=steps_of(run, spec.data or data, spec.train))]


def masked_teacher(run: Run, spec: MaskedTeacher, data: DataSpec) -> tuple[VisionTransformer, MaskedDecoder | None]:
    """A frozen MAE encoder in evaluation mode, and its decoder where it was trained here.

    Trained as the stage `teacher`, shared by every recipe with the same teacher and data, where the spec says how.

    Raises:
        UserError: neither weights nor `train`.
    """
    if spec.train is None and not spec.pretrained and spec.checkpoint is None:
        raise UserError(
            f"The teacher ({spec.model}) has no weights: give it `checkpoint`, `pretrained: true`, or `train`.",
        )
    with run.seeded(spec.seed):
        vit = new_encoder(run, spec.network, data, "teacher")
        decoder = new_decoder(run, vit, spec.decoder, pixels_of_patch(vit), "teacher")
    if spec.train is not None:
        stored = _trained(run, spec, spec.train, spec.data or data)
        heads = {name: value for name, value in vit.state_dict().items() if name.startswith("head.")}
        vit.load_state_dict({**stored["encoder"], **heads})  # an untrained classifier, of the data's own classes
        decoder.load_state_dict(stored["decoder"])
    vit.to(run.device).eval().requires_grad_(False)
    return vit, None if spec.train is None else decoder.to(run.device).eval().requires_grad_(False)


def _trained(run: Run, spec: MaskedTeacher, train: TrainSpec, data: DataSpec) -> dict[str, Any]:
    """The stage `teacher`: {"encoder": weights, "decoder": weights}."""

    def make() -> dict[str, Any]:
        with run.seeded(spec.seed):
            vit = new_encoder(run, spec.network, data, "teacher")
            decoder = new_decoder(run, vit, spec.decoder, pixels_of_patch(vit), "teacher")
            module = MAE(vit, decoder, spec.mask_ratio, spec.normalise_pixels)
            run.fit("teacher", module, run.loader(data, "train", train.batch_size, train=True), train)
        return {"encoder": state_on_cpu(vit), "decoder": state_on_cpu(decoder)}

    uses = {
        "teacher": spec.model_dump(mode="json", exclude={"train", "data"}),
        "train": train.identity(),
        **training_data(run, data),
    }
    return run.stage("teacher", make, uses)


def teacher_figures(
    run: Run,
    teacher: VisionTransformer,
    spec: ModelSpec,
    data: DataSpec,
    probe: ProbeSpec,
) -> dict[str, float]:
    """A teacher's figures under the probes of its student, as the stage `teacher.probe`; the teacher stays as it is."""
    uses = {
        "teacher": FrozenTeacher(teacher),
        "probe": probe,
        "split": run.judging_data()[1],
        "data": run.data(data),
    }
    found = run.stage("teacher.probe", lambda: probed(run, copy.deepcopy(teacher), data, probe, spec.embedding), uses)
    return {f"teacher_{name}": value for name, value in found.items()}


def fine_tuned_teacher(
    run: Run,
    spec: MaskedTeacher,
    teacher: VisionTransformer,
    data: DataSpec,
    tune: FineTune,
) -> tuple[FrozenTeacher, float]:
    """A copy of the teacher, fine-tuned with labels as the stage `fine_tuned_teacher` (shared), and its accuracy."""

    def make() -> dict[str, Any]:
        with run.seeded(spec.seed):
            model, figures = fine_tuned(run, "fine_tuned_teacher", spec.network, state_on_cpu(teacher), data, tune)
        return {"weights": state_on_cpu(model), "figures": figures}

    few = tune.data(data, run.data(data).num_classes)
    options = {**tune.model_dump(mode="json"), "train": tune.train.identity()}
    uses = {"tune": options, "from": FrozenTeacher(teacher).fingerprint(), "seed": spec.seed, **training_data(run, few)}
    stored = run.stage("fine_tuned_teacher", make, uses)
    model = run.model(spec.network.model_copy(update={"checkpoint": None, "pretrained": False}), data)
    model.load_state_dict(stored["weights"])
    return FrozenTeacher(model.to(run.device)), stored["figures"]["accuracy"]
