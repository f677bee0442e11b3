"""TopKLD in NumPy, float64, position by position: the card's sums written out, and the gradient by its formula."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

KIND = "topkld"
PARAMS = {"k": 3, "top": "reverse"}


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    logits = {name: draw.normal(0, 2, (2, 4, 9)).astype(np.float32) for name in ("student_logits", "teacher_logits")}
    return {**logits, "mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=bool)}


def reference(
    student_logits: np.ndarray, teacher_logits: np.ndarray, mask: np.ndarray, k: int, top: str
) -> dict[str, np.ndarray]:
    log_q, log_p = (log_softmax(z.astype(np.float64), axis=-1) for z in (student_logits, teacher_logits))
    q, p = np.exp(log_q), np.exp(log_p)
    rows, gradient = np.zeros(mask.shape), np.zeros(q.shape)
    for place in np.ndindex(*mask.shape):
        chosen = np.argsort(-teacher_logits[place], kind="stable")[:k]
        derivative = np.zeros(q.shape[-1])
        for i in range(q.shape[-1]):
            a, b, ratio = q[place][i], p[place][i], log_q[place][i] - log_p[place][i]
            if (i in chosen) == (top == "reverse"):
                rows[place] += a * ratio - a + b
                derivative[i] = ratio
            else:
                rows[place] += -b * ratio - b + a
                derivative[i] = 1 - b / a
        gradient[place] = q[place] * (derivative - (q[place] * derivative).sum())
    count = mask.sum()
    return {
        "rows": rows.astype(np.float32),
        "loss": np.float32(rows[mask].sum() / count),
        "grad:student_logits": (gradient * mask[..., None] / count).astype(np.float32),
    }
