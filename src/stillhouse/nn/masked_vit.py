"""A ViT that sees some of an image's patches, and the small decoder that predicts all of them (MAE, arXiv 2111.06377).

The encoder is timm's plain `VisionTransformer`, so that published weights load and products are ordinary networks;
`encode` runs it on given patches, up to a given block. Blocks are counted from 0; the output of a block is the residual
stream after it, before the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.masking import restore_tokens, take_tokens

layer_norm: Any = partial(nn.LayerNorm, eps=1e-6)
"""Layer norm with the epsilon of these networks."""


class EncoderOutput(NamedTuple):
    """What an encoder gives for N = 1 + K tokens, the class token first.

    Attributes:
        latent: (B, N, D) after the final norm; None where the encoder stopped before its end.
        blocks: (B, N, D) outputs of the blocks that were asked for, in their order.
    """

    latent: Tensor | None
    blocks: list[Tensor]

    @property
    def tokens(self) -> Tensor:
        """The latent of an encoder that ran to its end."""
        assert self.latent is not None, "the encoder stopped early"
        return self.latent


def as_encoder(model: nn.Module, role: str) -> VisionTransformer:
    """The model, if it is a ViT whose patches can be masked.

    Raises:
        UserError: another network; one without class token, with further tokens, without learned or fixed positions, or
            with its final norm after pooling.
    """
    plain = type(model) is VisionTransformer and model.num_prefix_tokens == 1 and model.has_class_token
    if not isinstance(model, VisionTransformer) or not plain:
        raise UserError(
            f"The {role} must be a plain ViT of timm with a class token and no others, as its patches are masked: "
            f"timm:vit_small_patch16_224; given: {type(model).__name__}."
        )
    positions = 0 if model.pos_embed is None else model.pos_embed.shape[1]
    if positions != 1 + model.patch_embed.num_patches or model.dynamic_img_size:
        raise UserError(
            f"The {role} must add one position embedding to each token; leave options.pos_embed, "
            "options.no_embed_class and options.dynamic_img_size as they are."
        )
    if isinstance(model.norm, nn.Identity):
        raise UserError(
            f"The {role} normalises after pooling; set options.fc_norm: false, so that its tokens are normalised.",
        )
    return model


def grid_of(vit: VisionTransformer) -> tuple[int, int]:
    """Rows and columns of patches."""
    rows, columns = vit.patch_embed.grid_size
    return int(rows), int(columns)


def heads_of(vit: VisionTransformer) -> int:
    """Attention heads of a block."""
    block = vit.blocks[0]
    assert isinstance(block, Block)
    heads = block.attn.num_heads
    assert isinstance(heads, int)
    return heads


def check_grid(first: VisionTransformer, second: VisionTransformer) -> None:
    """Raise `UserError` where two networks cut an image into different grids, so that their patches are not the
    same."""
    if grid_of(first) != grid_of(second):
        raise UserError(
            f"Teacher and student must see the same patches, but cut an image into {grid_of(second)} and "
            f"{grid_of(first)} of them; give both the same patch size."
        )


def check_blocks(blocks: Sequence[int], depth: int, where: str) -> None:
    """Raise `UserError` for a block that a network of this depth does not have."""
    for block in blocks:
        if not 0 <= block < depth:
            raise UserError(f"{where}: there is no block {block}; the network has blocks 0 to {depth - 1}.")


def sincos_positions(width: int, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """(1, prefix + L, width) fixed 2-D sine-cosine positions, 0 for the `prefix` tokens: the first half of the width
    encodes the column.

    Raises:
        UserError: a width that 4 does not divide.
    """
    if width % 4:
        raise UserError(f"Sine-cosine positions need a width that 4 divides; given: {width}.")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
    return torch.cat([table.new_zeros(prefix, width), table]).float().unsqueeze(0)


def tokens_of(vit: VisionTransformer) -> tuple[nn.Parameter, nn.Parameter]:
    """The class token (1, 1, D) and the positions (1, 1 + L, D) of an encoder."""
    assert vit.cls_token is not None and vit.pos_embed is not None, "see as_encoder"
    return vit.cls_token, vit.pos_embed


def fix_positions(vit: VisionTransformer) -> None:
    """Give an encoder sine-cosine positions that are not trained."""
    _, positions = tokens_of(vit)
    positions.data.copy_(sincos_positions(vit.embed_dim, grid_of(vit)))
    positions.requires_grad_(False)


def embed_patches(vit: VisionTransformer, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
    """(B, 1 + K, D): the class token, and the embedded patches at `ids_keep` (B, K) in that order, or all of them, with
    their positions."""
    start, positions = tokens_of(vit)
    patches = vit.patch_embed(images) + positions[:, 1:]
    if ids_keep is not None:
        patches = take_tokens(patches, ids_keep)
    first = (start + positions[:, :1]).expand(len(images), -1, -1)
    return vit.norm_pre(vit.pos_drop(torch.cat([first.to(patches.dtype), patches], 1)))


def encode(
    vit: VisionTransformer,
    images: Tensor,
    ids_keep: Tensor | None = None,
    outputs_of: Sequence[int] = (),
    stop: bool = False,
) -> EncoderOutput:
    """Run an encoder on given patches.

    Args:
        vit: from `as_encoder`.
        images: (B, C, H, W).
        ids_keep: (B, K) positions of the visible patches; None: all.
        outputs_of: blocks whose outputs are wanted, rising.
        stop: end after the last of them.
    """
    x = embed_patches(vit, images, ids_keep)
    found = []
    for i, block in enumerate(vit.blocks):
        x = block(x)
        if i in outputs_of:
            found.append(x)
            if stop and len(found) == len(outputs_of):
                return EncoderOutput(None, found)
    return EncoderOutput(vit.norm(x), found)


class MaskedDecoder(nn.Module):
    """Transformer blocks over all patches: those that the encoder saw, and a learned token at every other place.

    Args:
        inputs: width of the encoder's tokens.
        width: of the decoder's; 4 divides it.
        depth: blocks.
        heads: attention heads; divide `width`.
        grid: rows and columns of patches.
        outputs: numbers predicted a patch; None: no final norm and no prediction, only `hidden`.
        prefix: tokens before the patches, 1 for a class token.
        mlp_ratio: inner width of the feed-forward over `width`.
    """

    pos_embed: Tensor

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        outputs: int | None,
        prefix: int = 1,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UserError(f"decoder: {heads} heads do not divide a width of {width}.")
        self.prefix = prefix
        self.embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, grid, prefix))
        options = {"qkv_bias": True, "norm_layer": layer_norm}
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, **options) for _ in range(depth))
        self.norm = None if outputs is None else layer_norm(width)
        self.pred = None if outputs is None else nn.Linear(width, outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def hidden(self, latent: Tensor, ids_restore: Tensor, blocks: int | None = None) -> Tensor:
        """(B, prefix + L, width) after so many blocks (all by default), before the final norm.

        Args:
            latent: (B, prefix + K, inputs) the encoder's tokens.
            ids_restore: (B, L), see `Masking`.
            blocks: how many run.
        """
        x = self.embed(latent)
        whole = restore_tokens(x[:, self.prefix :], self.mask_token, ids_restore)
        x = torch.cat([x[:, : self.prefix], whole], 1) + self.pos_embed
        for block in self.blocks[:blocks]:
            x = block(x)
        return x

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """(B, L, outputs) predictions for all patches in raster order."""
        assert self.norm is not None and self.pred is not None, "a decoder without outputs has hidden tokens only"
        return self.pred(self.norm(self.hidden(latent, ids_restore)))[:, self.prefix :]


def decay_groups(module: nn.Module) -> list[dict[str, object]]:
    """A module's trained parameters in two groups: those with weight decay, and vectors (biases, norms), which have
    none."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
