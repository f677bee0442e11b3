"""What the attention of a plain ViT looks like: how far it reaches, and how much its targets depend on the query."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stillhouse.functional.relations import relation_heads, relation_scores
from stillhouse.nn.masked_vit import heads_of
from stillhouse.signals import Batch, Taps, evaluating, to_device


def attention_distance(attention: Tensor, grid: tuple[int, int], patch: float) -> Tensor:
    """(B, H) sum over keys of attention times the distance between query and key in pixels, mean over queries.

    Args:
        attention: (B, H, L, L) over patches in raster order; each row sums to 1.
        grid: rows and columns of patches.
        patch: pixels a side of a patch.
    """
    axes = [torch.arange(n, device=attention.device, dtype=attention.dtype) for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 2) * patch
    return (attention * torch.cdist(places, places)).sum(-1).mean(-1)


def attention_nmi(attention: Tensor) -> Tensor:
    """(B, H) normalised mutual information of query and key positions, I(q, k) / sqrt(H(q) H(k)), queries being equally
    likely.

    0 where all queries look at the same keys (attention collapse), 1 where each looks at a key of its own.

    Args:
        attention: (B, H, N, N); each row sums to 1.
    """
    count = attention.shape[-1]
    joint = attention.double() / count
    keys = joint.sum(-2)
    entropy = -torch.xlogy(keys, keys).sum(-1)
    information = torch.xlogy(joint, joint).sum((-2, -1)) + entropy + math.log(count)
    return information / (entropy * math.log(count)).sqrt().clamp_min(1e-12)


def attention_figures(vit: VisionTransformer, batches: Iterable[Batch], device: torch.device) -> dict[str, list[float]]:
    """`distance` (pixels) and `nmi` of each block's attention among patches, mean over heads and images.

    Attention to the class token is left out, and rows are normalised again.

    Args:
        vit: a plain ViT on the device.
        batches: images, a few hundred in all.
        device: where it runs.
    """
    taps = Taps(vit, [f"blocks.{i}.attn.qkv" for i in range(len(vit.blocks))])
    rows, columns = vit.patch_embed.grid_size
    heads, patch = heads_of(vit), float(vit.patch_embed.patch_size[0])
    sums = torch.zeros(2, len(vit.blocks), dtype=torch.float64)
    count = 0
    try:
        for loaded in batches:
            images = to_device(loaded["input"], device)
            with evaluating(vit), taps.capture() as found:
                vit.forward_features(images)
            for i, name in enumerate(taps.names):
                q, k, _ = (relation_heads(x[:, vit.num_prefix_tokens :], heads) for x in found[name].chunk(3, -1))
                attention = relation_scores(q, k).softmax(-1)
                sums[0, i] += float(attention_distance(attention, (rows, columns), patch).mean(1).sum())
                sums[1, i] += float(attention_nmi(attention).mean(1).sum())
            count += len(images)
    finally:
        taps.remove()
    distance, nmi = (sums / max(count, 1)).tolist()
    return {"distance": distance, "nmi": nmi}
