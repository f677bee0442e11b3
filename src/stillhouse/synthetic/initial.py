"""How synthetic images begin: noise, random real images, images near the centres of their class, or several small real
images pasted into one.

And `decode`: a stored image of `factor` x `factor` tiles as that many whole images (as IDC and NCFM store them).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown
from stillhouse.synthetic.real import RealImages

HOW = ("noise", "real", "representative", "mix")


def initial(
    how: str,
    real: RealImages,
    ipc: int,
    generator: torch.Generator,
    features: Callable[[Tensor], Tensor] | None = None,
    factor: int = 2,
) -> Tensor:
    """Images (classes * ipc, C, H, W), class-major, a copy.

    Args:
        how: `noise` (standard normal, as networks see images), `real`, `representative` (see `representative_rows`) or
            `mix` (see `mixed`).
        features: representative: images -> (B, D), such as logits of a trained network; default: the pixels.
        factor: mix: tiles a side.

    Raises:
        UserError: an unknown way, or too few images of a class.
    """
    if how not in HOW:
        raise unknown("way to begin synthetic images", how, HOW)
    if how == "noise":
        shape = (len(real.classes) * ipc, *real.images.shape[1:])
        return torch.randn(shape, generator=generator).to(real.images)
    if how == "real":
        return real.draw(ipc, generator, "images (ipc)").clone()
    if how == "mix":
        return mixed(real, ipc, factor, generator)
    rows = representative_rows(real, ipc, generator, features)
    return real.images[rows.to(real.images.device)].clone()


def representative_rows(
    real: RealImages,
    ipc: int,
    generator: torch.Generator,
    features: Callable[[Tensor], Tensor] | None = None,
    clusters: int = 10,
) -> Tensor:
    """Rows (classes * ipc,), class-major: k-means of each class with min(ipc, clusters) centres, and their nearest
    images in turn."""
    from sklearn.cluster import KMeans

    if ipc > int(real.counts.min()):
        raise UserError(
            f"{ipc} images (ipc) of each class are wanted, but '{real.classes[int(real.counts.argmin())]}' has "
            f"{int(real.counts.min())}."
        )
    seed = int(torch.randint(0, 2**31 - 1, (1,), generator=generator))
    chosen = []
    for rows in real.rows:
        x = embedded(real.images, rows, features)
        centres = KMeans(min(ipc, clusters), n_init=3, random_state=seed).fit(x).cluster_centers_
        chosen.append(rows[nearest_in_turn(torch.from_numpy(x), torch.from_numpy(centres), ipc)])
    return torch.cat(chosen)


def nearest_in_turn(features: Tensor, centres: Tensor, count: int) -> Tensor:
    """Rows (count,) of features (n, D): the nearest of every centre (k, D), then the second of every centre, …; each
    row once.

    Raises:
        UserError: more rows than there are.
    """
    if count > len(features):
        raise UserError(f"{count} images (ipc) of a class are wanted, but it has {len(features)}.")
    return torch.tensor(list(dict.fromkeys(by_distance(features, centres).flatten().tolist()))[:count])


def by_distance(features: Tensor, centres: Tensor) -> Tensor:
    """(n, k): for each centre (k, D) the rows of features (n, D), the nearest first."""
    return torch.cdist(features, centres, compute_mode="donot_use_mm_for_euclid_dist").argsort(dim=0, stable=True)


@torch.no_grad()
def embedded(images: Tensor, rows: Tensor, features: Callable[[Tensor], Tensor] | None, batch: int = 512) -> np.ndarray:
    """(n, D) float32 features of the images at these rows, on the host; without `features`, their pixels."""
    parts = (images[part.to(images.device)] for part in rows.split(batch))
    return torch.cat([(x if features is None else features(x)).flatten(1).float().cpu() for x in parts]).numpy()


def mixed(real: RealImages, ipc: int, factor: int, generator: torch.Generator) -> Tensor:
    """Images of factor x factor tiles, each a real image of the class made small (nearest pixel); factor^2 * ipc real
    images a class are used.

    Where the sides do not divide, the first tiles are a pixel larger.
    """
    height, width = real.images.shape[-2:]
    if factor < 1 or any(
        -(-side // factor) * (factor - 1) >= side for side in (height, width)
    ):  # `decode` would give a tile of padding
        raise UserError(
            f"Images of {height} x {width} pixels cannot be cut into {factor} x {factor} tiles; take a smaller "
            "factor, 1 or more."
        )
    pool = real.draw(factor**2 * ipc, generator, "images (factor^2 * ipc)")
    parts = pool.view(len(real.classes), factor, factor, ipc, *pool.shape[1:])  # class, row, column, image, C, H, W
    heights, widths = ([side // factor + (i < side % factor) for i in range(factor)] for side in (height, width))
    rows = [
        torch.cat(
            [F.interpolate(parts[:, i, j].flatten(0, 1), size=(h, w), mode="nearest") for j, w in enumerate(widths)], -1
        )
        for i, h in enumerate(heights)
    ]
    return torch.cat(rows, -2)


def decode(images: Tensor, factor: int) -> Tensor:
    """Stored images (B, C, H, W) as (factor^2 * B, C, H, W): tiles, row-major, enlarged (bilinear); the first tile of
    every image, then the second, …

    Where the sides do not divide, images are padded right and below by 0.5.
    """
    if factor == 1:
        return images
    height, width = images.shape[-2:]
    tile_h, tile_w = -(-height // factor), -(-width // factor)
    padded = F.pad(images, (0, tile_w * factor - width, 0, tile_h * factor - height), value=0.5)
    tiles = (
        padded.reshape(len(images), -1, factor, tile_h, factor, tile_w)
        .permute(2, 4, 0, 1, 3, 5)
        .reshape(-1, images.shape[1], tile_h, tile_w)
    )
    return F.interpolate(tiles, size=(height, width), mode="bilinear", align_corners=False)
