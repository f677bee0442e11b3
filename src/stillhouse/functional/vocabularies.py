"""Two vocabularies compared: the same tokens padded to other sizes, the same tokens under other ids, or different ones
(refused).

Models of one family share a tokenizer but pad their embeddings to different sizes (Qwen2.5: 152,064 rows or 151,936,
for 151,665 tokens); rows that no token owns are cut off before losses. Where the tokens themselves differ, positions do
not correspond, and only what the teacher writes can teach (sequence-level distillation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.errors import UserError


@dataclass(frozen=True)
class TokenMap:
    """The teacher's id of each of the student's tokens."""

    ids: Tensor  # (V_student,) int64
    same: bool  # whether both number tokens alike


def mapped(student: Mapping[str, int], teacher: Mapping[str, int]) -> TokenMap:
    """The teacher's ids of the student's tokens, matched by their strings.

    Args:
        student, teacher: token -> id, as `tokenizer.get_vocab()` gives.

    Raises:
        UserError: a token of the student that the teacher lacks; ids with gaps.

    >>> mapped({"a": 0, "b": 1}, {"b": 0, "c": 1, "a": 2}).ids
    tensor([2, 0])
    """
    if all(teacher.get(token) == at for token, at in student.items()):
        return TokenMap(torch.arange(max(student.values()) + 1), True)
    missing = [t for t in student if t not in teacher]
    if missing:
        shown = ", ".join(repr(t) for t in sorted(missing, key=student.__getitem__)[:3])
        raise UserError(
            f"The student has {len(student)} tokens and the teacher {len(teacher)}, and {len(missing)} of the "
            f"student's are not the teacher's ({shown}"
            f"{', …' if len(missing) > 3 else ''}), so their tokens do not correspond; use one tokenizer for both, or "
            "distil what the teacher writes "
            f"(method: sequence_kd)."
        )
    if sorted(student.values()) != list(range(len(student))):
        raise UserError(
            f"The student's tokenizer has {len(student)} tokens but ids up to {max(student.values())}; ids must be "
            "without gaps."
        )
    ids = torch.empty(len(student), dtype=torch.int64)
    for token, at in student.items():
        ids[at] = teacher[token]
    return TokenMap(ids, False)


def trimmed(student_logits: Tensor, teacher_logits: Tensor, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Both logits (…, V) over the same tokens: columns beyond `tokens`, which no token owns, are cut off.

    Args:
        student_logits, teacher_logits: (…, V_s), (…, V_t), of models that share a tokenizer.
        tokens: how many tokens the tokenizer has; without it, widths must be equal.

    Raises:
        UserError: different widths without `tokens`, or a width below `tokens`.
    """
    widths = student_logits.shape[-1], teacher_logits.shape[-1]
    if tokens is None:
        if widths[0] != widths[1]:
            raise UserError(
                f"The student scores {widths[0]} tokens and the teacher {widths[1]}: if both have one tokenizer, say "
                "how many tokens it has; "
                f"if not, their tokens do not correspond."
            )
        return student_logits, teacher_logits
    if min(widths) < tokens:
        raise UserError(
            f"The tokenizer has {tokens} tokens, but the student scores {widths[0]} and the teacher {widths[1]}."
        )
    return student_logits[..., :tokens], teacher_logits[..., :tokens]
