"""How texts that a model wrote compare with the right ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stillhouse.errors import UserError


def rouge_l(written: str, right: str) -> float:
    """ROUGE-L (Lin 2004): the harmonic mean of the shares of both texts' words that their longest common subsequence
    has. Words are runs of letters and digits, in lower case; 1 for two texts without any.

    >>> round(rouge_l("the cat sat", "The cat sat down."), 4)
    0.8571
    """
    a, b = (re.findall(r"[^\W_]+", text.lower()) for text in (written, right))
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for word in a:
        last = 0  # of the row above, one to the left
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = last + 1 if word == other else max(above, row[j - 1])
            last = above
    return 2 * row[-1] / (len(a) + len(b))


def writing_figures(written: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """`rouge_l`, the mean over the texts, and `exact_match`, the share that is right to the letter, but for spaces
    around it. Raises `UserError` without texts."""
    if not written:
        raise UserError("There is no text to judge by: the loader gave no prompt with a right answer.")
    return {
        "rouge_l": sum(map(rouge_l, written, right)) / len(written),
        "exact_match": sum(a.strip() == b.strip() for a, b in zip(written, right)) / len(written),
    }
