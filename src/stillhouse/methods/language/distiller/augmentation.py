"""More text for the teacher to judge: copies of the training texts with tokens swapped, dropped or replaced, and word
embeddings mixed in both networks alike (Distiller, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.data.dataset import BatchKey
from stillhouse.data.token_dataset import TokenDataset
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Context
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.functional.ragged import RaggedArray
from stillhouse.models.tokenizer import marks
from stillhouse.randomness import key as keys
from stillhouse.signals import Batch
from stillhouse.training.context import Progress

Operator = Literal["swap", "delete", "unigram"]


class AugmentSpec(Spec):
    """Copies of the training texts, changed by a chain of operators. The published ones, a masked language model and
    translation there and back, need large models; these need none."""

    chain: list[Operator] = Field(
        ["swap"],
        description="In this order: swap (tokens change places), delete, unigram (tokens are replaced by others, as "
        "often as these occur).",
    )
    p: float = Field(0.3, gt=0, lt=1, description="Share of the tokens that an operator changes.")
    every: int = Field(3, ge=1, description="Epochs after which the copies are drawn anew.")


def augmented(
    ids: np.ndarray, chain: Sequence[Operator], p: float, unigram: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """Tokens (L,) after a chain of operators; at least one is left.

    Args:
        ids: without special tokens.
        chain: operators in their order.
        p: share of the tokens that each changes.
        unigram: ids to replace tokens by, each as often as it shall come.
    """
    out = ids.copy()
    for operator in chain:
        chosen = np.flatnonzero(draw.random(len(out)) < p)
        if operator == "swap":
            for i in chosen:
                j = int(draw.integers(len(out)))
                out[i], out[j] = out[j], out[i]
        elif operator == "unigram":
            out[chosen] = draw.choice(unigram, len(chosen))
        elif len(chosen) < len(out):
            out = np.delete(out, chosen)
    return out


class AugmentedTexts:
    """A split of text to be classified and as many changed copies of it, whose labels are those of their originals.

    Args:
        base: the split.
        spec: the operators.
    """

    def __init__(self, base: TokenDataset, spec: AugmentSpec) -> None:
        self.base, self.spec = base, spec
        before, after = marks(base.tokenizer)
        self.before, self.after = np.array(before, np.int64), np.array(after, np.int64)
        inputs = base.rows.inputs
        self.unigram = np.concatenate([self._inner(i) for i in range(len(inputs))])

    def _inner(self, index: int) -> np.ndarray:
        inputs = self.base.rows.inputs
        row = inputs.values[inputs.starts[index] : inputs.starts[index + 1]]
        return row[len(self.before) : len(row) - len(self.after)]

    def __len__(self) -> int:
        return 2 * len(self.base)

    def labels(self) -> Tensor:
        """(2 N,) classes."""
        return self.base.labels().repeat(2)

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """As of the split; an index of N or more is a changed copy."""
        which, count = key.indices[key.start : key.stop], len(self.base)
        rows = []
        for index in which.tolist():
            inner = self._inner(index % count)
            if index >= count:
                draw = np.random.default_rng(keys(seed, "text", key.epoch // self.spec.every, index))
                inner = augmented(inner, self.spec.chain, self.spec.p, self.unigram, draw)
            rows.append(np.concatenate([self.before, inner, self.after]))
        ragged, every = RaggedArray.of(rows), np.arange(len(rows))
        ids = ragged.padded(every, self.base.tokenizer.pad_token_id)
        inside = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(ragged.lengths)[:, None]
        classes = self.base.rows.classes
        assert classes is not None
        return {
            "input": {"input_ids": ids, "attention_mask": inside.long()},
            "label": torch.from_numpy(classes[which % count]),
            "index": torch.from_numpy(which),
        }


class MixedDistillation(Distillation):
    """A distillation whose batches are followed by as many texts that are mixed from two: the word embeddings of both
    networks with one weight and one partner each. The teacher judges the mixture; labels are those of the plain half.

    Args:
        mixup: both parameters of the Beta distribution of the weight; 0: no mixing.
        The rest is `Distillation`'s.

    Raises:
        UserError: a teacher or student without word embeddings.
    """

    def __init__(self, *args: Any, mixup: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mixup = mixup
        self._mixture: tuple[float, Tensor] | None = None
        self._hooks: list[Any] = []
        if mixup:
            networks = [self.student, *(t.model for t in self.teachers.values() if isinstance(t, FrozenTeacher))]
            self._hooks = [embeddings_of(n).register_forward_hook(self._mix) for n in networks]

    def _mix(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._mixture is None:
            return None
        weight, partner = self._mixture
        plain, copy = output.chunk(2)
        return torch.cat([plain, weight * copy + (1 - weight) * copy[partner]])

    def before_step(self, batch: Batch, ctx: Context) -> None:
        """Doubles the batch in place."""
        if self.mixup:
            x = dict(batch["input"])
            ids = x["input_ids"]
            partner = torch.randperm(len(ids)).to(ids.device)
            weight = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
            mask = x.get("attention_mask", torch.ones_like(ids))
            x["input_ids"] = ids.repeat(2, 1)
            x["attention_mask"] = torch.cat([mask, torch.maximum(mask, mask[partner])])
            batch["input"] = x
            self._mixture = weight, partner
        super().before_step(batch, ctx)

    def after_step(self, batch: Batch, progress: Progress, stepped: bool) -> None:
        self._mixture = None
        super().after_step(batch, progress, stepped)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        super().close()


def embeddings_of(network: nn.Module) -> nn.Module:
    """The word embeddings of a network of transformers."""
    get: Any = getattr(network, "get_input_embeddings", None)
    if get is None:
        raise UserError(f"mixup mixes word embeddings, which a {type(network).__name__} does not have.")
    found: nn.Module = get()
    return found
