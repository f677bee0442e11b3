"""Tables for recipes: handwritten digits as categorical columns, and made-up interactions of users and items with ids
as skewed as real ones."""

from __future__ import annotations

import numpy as np


def digits() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 digits as 72 categorical columns: 56 pairs of a pixel and its right neighbour, and 16 pixels
    cut to 3 levels; 10 classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = images.astype(np.int64).reshape(-1, 8, 8)
    columns = {f"pair_{r}_{c}": pixels[:, r, c] * 17 + pixels[:, r, c + 1] for r in range(8) for c in range(7)}
    columns |= {f"level_{r}_{c}": np.minimum(pixels[:, r, c] // 6, 2) for r in range(2, 6) for c in range(2, 6)}
    return {**columns, "label": labels.astype(np.int64)}


def interactions(rows: int = 40_000, users: int = 4000, items: int = 2000, seed: int = 0) -> dict[str, np.ndarray]:
    """Synthetic clicks: users and items by a Zipf law, an item's category, the hour; the odds of a click come from
    latent factors of all four."""
    r = np.random.default_rng(seed)

    def zipf(n: int) -> np.ndarray:
        p = 1 / np.arange(1, n + 1) ** 0.8
        return r.choice(n, rows, p=p / p.sum())

    user, item, hour = zipf(users), zipf(items), r.integers(24, size=rows)
    category = r.integers(40, size=items)[item]
    factors = [r.normal(size=(n, 4)) for n in (users, items, 40, 24)]
    u, i, c, h = (f[ids] for f, ids in zip(factors, (user, item, category, hour)))
    bias = 0.9 * r.normal(size=users)[user] + 0.9 * r.normal(size=items)[item]
    score = bias + 0.5 * (u * i).sum(1) + 0.4 * (u * c).sum(1) + 0.2 * (c * h).sum(1)
    label = (r.uniform(size=rows) < 1 / (1 + np.exp(0.5 - score))).astype(np.int64)
    # raw ids of different columns overlap, as they do in logs: user 7 is not item 7
    return {"user": user, "item": item, "category": category, "hour": hour, "label": label}
