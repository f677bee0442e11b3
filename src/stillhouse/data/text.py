"""Text as batches of tokens: `load` gives a `TextBundle`, which a `Run` uses like any other data (`data: {name:
"text:shakespeare"}`).

A batch's `label` (B, L) stands where its prediction stands: `label[b, t]` is what `logits[b, t]` should say (of a
causal model, the next token), and -100 where nothing is asked (padding, prompts, tokens that are not masked). No loss
has to shift anything. Text to be classified has labels (B,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stillhouse.config.specs import DataSpec
from stillhouse.data.corpus import Records, TextOptions, read
from stillhouse.data.labels import class_order, ids_of
from stillhouse.data.source import located
from stillhouse.data.split import cut, in_balance
from stillhouse.data.splits import Splits
from stillhouse.data.token_dataset import Rows, TokenDataset, packed, taken
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.ragged import RaggedArray
from stillhouse.models.tokenizer import decoder_start, encode, identity, marks, size, tokenizer, with_marks
from stillhouse.tasks.tokens import Tokens


@dataclass
class TextBundle(Splits):
    """Text ready for use; what `DataBundle` is for images.

    Attributes:
        name: as in the recipe.
        task: kind, tokenizer and classes.
        options: as in the recipe.
        fingerprint: a hash of the tokens, their splits and labels.
    """

    name: str
    task: Tokens
    options: TextOptions
    splits: dict[str, Rows] = field(repr=False)
    flip: ClassVar[bool] = False

    def __post_init__(self) -> None:
        task = self.task
        rows = sorted((n, r.identity) for n, r in self.splits.items())
        self.fingerprint = digest(
            task.kind, list(task.classes), identity(task.tokenizer), self.options.masked_share, rows
        )

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""
        return self.task.tokenizer

    @property
    def num_classes(self) -> int:
        """Classes, or tokens."""
        return self.task.num_classes

    @property
    def classes(self) -> list[str]:
        """Names of the classes, of text to be classified."""
        return list(self.task.classes)

    @property
    def evaluation_batch(self) -> int:
        """Samples of a batch for judging, so that its logits fit into memory: about 8,000 tokens."""
        return max(8192 // self.task.context, 1)

    def dataset(self, split: str, *, train: bool = False) -> TokenDataset:
        """A split's rows. Raises `UserError` for a split that is not there."""
        self.require(split)
        task = self.task
        return TokenDataset(
            self.splits[split], task.kind, task.tokenizer, task.decoder_start, self.options.masked_share
        )


def load(rest: str, spec: DataSpec, options: TextOptions, root: Path) -> TextBundle:
    """`text:shakespeare`, `text:sst2`, `text:PATH` or `text:hf:NAME` as a bundle.

    The tokenizer learns from the whole training split, before `size`, `val` and `holdout` are taken from it, so that a
    teacher on more of the same text has the same one.

    Raises:
        UserError: options that do not fit the text, a sample that is too long or empty, a split that holds nothing.
    """
    corpus = read(rest, options, root)
    found = corpus.splits
    labelled = bool(found["train"]) and "label" in found["train"][0]
    task = options.task or ("classify" if labelled else "causal")
    if task == "classify" and not labelled:
        raise UserError(
            f"data.options.task: classify needs labels, but '{spec.name}' has none; name their column in "
            "data.options.columns.label."
        )
    texts = [r[k] for r in found["train"] for k in ("stream", "text", "prompt", "completion") if k in r]
    if not any(texts):
        raise UserError(f"The data set '{spec.name}' holds no text.")
    name: str = located({"model": options.tokenizer}, root)["model"]
    tokens, stream = tokenizer(name, texts), "stream" in found["train"][0]
    if task in ("classify", "masked") and not stream:
        tokens = with_marks(tokens)
    classes = (corpus.classes or class_order(r["label"] for r in found["train"])) if task == "classify" else []
    if task == "classify" and len(classes) < 2:
        raise UserError(f"The data set '{spec.name}' has the one class '{classes[0]}'; a classifier needs two or more.")
    parts = {
        split: _rows(records, task, tokens, options, classes, f"{spec.name} ({split})")
        for split, records in found.items()
    }
    strata = {n: np.zeros(len(r.inputs), np.int64) if r.classes is None else r.classes for n, r in parts.items()}
    portions = cut(strata, spec, len(strata["train"]) // 10, in_balance, ordered=stream)
    rows = {
        n: parts[p.source] if len(p.rows) == len(strata[p.source]) else taken(parts[p.source], p.rows)
        for n, p in portions.items()
    }
    splits = {n: packed(r, options.context) if options.pack else r for n, r in rows.items()}
    start = decoder_start(name, tokens) if task == "seq2seq" else 0
    packs = options.pack and task == "causal"
    facts = Tokens(task, size(tokens), options.context, tokens, tuple(classes), options.tokenizer, start, packs)
    return TextBundle(spec.name, facts, options, splits)


def _rows(records: Records, task: str, tokens: Any, options: TextOptions, classes: list[str], where: str) -> Rows:
    if task == "masked" and tokens.mask_token_id is None:
        raise UserError("data.options.task: masked needs a tokenizer with a mask token.")
    if records and "stream" in records[0]:
        return _blocks(records[0]["stream"], task, tokens, options, where)
    before, after = marks(tokens)
    end = [] if tokens.eos_token_id is None else [tokens.eos_token_id]
    close = after if set(end) <= set(after) else after + end
    if records and "prompt" in records[0]:
        prompts, answers = (encode(tokens, [r[k] for r in records]) for k in ("prompt", "completion"))
    else:
        prompts, answers = [[] for _ in records], encode(tokens, [r["text"] for r in records])
    learned = [bool(a) and (task != "causal" or len(before + p + a + close) > 1) for p, a in zip(prompts, answers)]
    empty = ~np.array(learned, bool)
    _refuse(
        empty,
        options.empty == "refuse",
        where,
        "has an empty completion" if any(prompts) else "is empty",
        "options.empty: drop leaves it out",
    )
    if task == "seq2seq":
        if not any(prompts):
            raise UserError(
                f"{where}: seq2seq needs prompts and completions; name their columns in data.options.columns."
            )
        target, final = marks(tokens, target=True)
        final = final if set(end) <= set(final) else final + end
        prompts = [before + p + after for p in prompts]
        answers = [target + a + final for a in answers]
        fits = _fitted(prompts, options, f"{where}, prompts", ends=(len(before), len(after)))
        keep = np.flatnonzero(~empty & fits & _fitted(answers, options, f"{where}, completions", ends=(len(target), 0)))
        return Rows(RaggedArray.of([prompts[i] for i in keep]), RaggedArray.of([answers[i] for i in keep]))
    if task == "causal":
        whole = [before + p + a + close for p, a in zip(prompts, answers)]
        long = [len(w) for w in whole]
        fits = _fitted(whole, options, where, [len(p) for p in prompts], ends=(len(before), 0), extra=1)
        keep = np.flatnonzero(~empty & fits)
        # a cut takes from the prompt first; what is left of it is not learned
        given = [0 if options.prompt_loss else max(len(p) - (n - len(w)), 0) for p, n, w in zip(prompts, long, whole)]
        given = [max(g + len(before), 1) for g in given]
        labels = RaggedArray.of([[IGNORED] * (given[i] - 1) + whole[i][given[i] :] for i in keep])
        return Rows(RaggedArray.of([whole[i][:-1] for i in keep]), labels)
    whole = [before + p + a + after for p, a in zip(prompts, answers)]
    keep = np.flatnonzero(~empty & _fitted(whole, options, where, ends=(len(before), len(after))))
    inputs = RaggedArray.of([whole[i] for i in keep])
    return (
        Rows(inputs)
        if task == "masked"
        else Rows(inputs, classes=ids_of([records[i]["label"] for i in keep], classes, where))
    )


def _blocks(text: str, task: str, tokens: Any, options: TextOptions, where: str) -> Rows:
    """One long text, cut into samples of `context` tokens, each with the special tokens of a text of its own.

    Of a causal model without a token to begin with, the last token of each sample is the next one's first, so that
    every token is learned.
    """
    if task not in ("causal", "masked"):
        raise UserError(f"data.options.task: {task} needs records; '{where}' is one plain text.")
    ids = np.array(encode(tokens, [text])[0], np.int64)
    before, after = marks(tokens)
    causal = task == "causal"
    length = options.context - len(before) - (0 if causal else len(after)) + (causal and bool(before))
    count = (len(ids) - (causal and not before)) // length if length > 0 else 0
    if count < 1:
        raise UserError(
            f"'{where}' holds {len(ids)} tokens, fewer than one sample of data.options.context {options.context}."
        )
    pieces = ids[: count * length].reshape(count, length)
    if not causal:
        return Rows(
            RaggedArray.of([np.concatenate([before, piece, after]) for piece in pieces])
            if before or after
            else _equal(pieces)
        )
    if not before:
        return Rows(_equal(pieces), _equal(ids[1 : count * length + 1].reshape(count, length)))
    inputs = RaggedArray.of([[*before, *piece[:-1]] for piece in pieces])
    return Rows(inputs, RaggedArray.of([[IGNORED] * (len(before) - 1) + piece.tolist() for piece in pieces]))


def _equal(rows: np.ndarray) -> RaggedArray:
    return RaggedArray(rows.ravel(), np.arange(len(rows) + 1, dtype=np.int64) * rows.shape[1])


def _fitted(
    rows: list[list[int]],
    options: TextOptions,
    where: str,
    prompts: Sequence[int] | None = None,
    ends: tuple[int, int] = (0, 0),
    extra: int = 0,
) -> np.ndarray:
    """Which rows stay; those longer than the context are cut in place, where that is asked for.

    Args:
        rows: tokens.
        options: the context, and what is done with longer rows.
        where: what messages call the rows.
        prompts: tokens of a row that are cut first, from their beginning.
        ends: how many tokens at a row's beginning and end are never cut: the special tokens of the tokenizer.
        extra: 1 for a causal model, which reads one token less than a row has.
    """
    limit = options.context + extra
    long = np.array([len(r) > limit for r in rows], bool)
    longest = max(map(len, rows), default=0)
    _refuse(
        long,
        options.too_long == "refuse",
        where,
        f"is longer than data.options.context {options.context} (the longest has {longest - extra} tokens)",
        "raise it, or set options.too_long to cut or drop",
    )
    if options.too_long == "drop":
        return ~long
    head, tail = ends
    if long.any() and limit <= head + tail:
        raise UserError(
            f"data.options.context {options.context} leaves no room for text between the tokenizer's special tokens; "
            "raise it."
        )
    for i in np.flatnonzero(long):
        row = rows[i]
        front = min(len(row) - limit, prompts[int(i)]) if prompts is not None else 0
        rows[i] = row[:head] + row[head + front : front + limit - tail] + row[len(row) - tail :]
    return np.ones(len(rows), bool)


def _refuse(wrong: np.ndarray, refuse: bool, where: str, what: str, hint: str) -> None:
    if refuse and wrong.any():
        more = f" (and {int(wrong.sum()) - 1} others)" if wrong.sum() > 1 else ""
        raise UserError(f"{where}: sample {int(np.flatnonzero(wrong)[0])}{more} {what}; {hint}.")
