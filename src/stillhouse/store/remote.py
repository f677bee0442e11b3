"""Asking a server for a whole data set, into a store: answers go to a journal as they come, so that a pass that
is interrupted requests nothing twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.config.specs import StoreSpec
from stillhouse.data.dataset import BatchKey
from stillhouse.errors import UserError
from stillhouse.files import is_full
from stillhouse.signals import Batch
from stillhouse.store.format import index_dtype
from stillhouse.store.reading import Store
from stillhouse.store.server import Answer, Server, TooLong, Vocabulary
from stillhouse.store.writing import StoreWriter, glance, manifest_of
from stillhouse.training.display import Display

TooLongIs = Literal["refuse", "skip"]


def score(
    server: Server,
    dataset: Any,
    folder: str | Path,
    spec: StoreSpec,
    vocabulary: Vocabulary,
    *,
    data_facts: Mapping[str, Any],
    classes: int,
    workers: int = 4,
    too_long: TooLongIs = "refuse",
    rank: int = 0,
    world: int = 1,
    live: Display | None = None,
) -> int:
    """Ask a server for the top log-probabilities at every position of a causal data set whose label is not -100.

    Args:
        dataset: of text (`stillhouse.data.text`), one sample a row.
        spec: what is stored; the server is asked for its `top`, `views` must be 1.
        vocabulary: the data's.
        classes: tokens of the data's vocabulary.
        workers: requests at the same time.
        too_long: what becomes of a sample that the server's context does not hold: an error, or nothing is known of it
            and training passes it over.

    Returns:
        how many shards were written.

    Raises:
        UserError: data that is no causal text, and what `Server.score` and `StoreWriter` raise; answers received before
            are stored.
    """
    k = _check(spec, server, classes)

    def sample(i: int) -> tuple[Tensor, Tensor]:
        batch = dataset.batch(BatchKey(0, np.array([i], dtype=np.int64), 0, 1), spec.seed)
        x, label = batch["input"], batch.get("label")
        if (
            not isinstance(x, Mapping)
            or {"position_ids", "decoder_input_ids"} & set(x)
            or not isinstance(label, Tensor)
            or label.ndim != 2
        ):
            raise UserError(
                "A server scores causal text, one sample a row: data.options.task must be causal and "
                "data.options.pack false."
            )
        inside = (
            x["attention_mask"][0].bool()
            if "attention_mask" in x
            else torch.ones_like(x["input_ids"][0], dtype=torch.bool)
        )
        return x["input_ids"][0][inside], label[0][inside] != -100

    def ask(i: int) -> Answer:
        ids, counted = sample(i)
        answer = server.score(ids.tolist(), vocabulary)
        where = torch.nonzero(counted)[:, 0].tolist() if answer.ids else []
        return Answer([answer.ids[t] for t in where], [answer.log_probs[t] for t in where])

    sample(0)
    teacher = {"model": server.model, "server": server.url, "weights": "not known: behind a server"}
    rows = spec.shard_rows or 64
    manifest = manifest_of(
        spec.model_copy(update={"top": k, "shard_rows": rows}),
        teacher=teacher,
        data=data_facts,
        count=len(dataset),
        classes=classes,
        row_bytes=1,
    )

    def columns(samples: np.ndarray, answers: Sequence[Answer]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        signals, plain = shard_arrays(answers, k, classes)
        seen = np.concatenate(
            [glance(dataset.batch(BatchKey(0, samples[i : i + 1], 0, 1), spec.seed)) for i in range(len(samples))]
        )
        return signals, {**plain, "seen": seen}

    return _asked(
        StoreWriter(folder, manifest),
        ask,
        columns,
        workers,
        too_long,
        f"{server.model} at {server.url}",
        rank,
        world,
        live,
    )


def write(
    server: Server,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    folder: str | Path,
    spec: StoreSpec,
    vocabulary: Vocabulary,
    *,
    classes: int,
    max_tokens: int = 256,
    workers: int = 4,
    too_long: TooLongIs = "refuse",
    rank: int = 0,
    world: int = 1,
    live: Display | None = None,
) -> int:
    """Ask a server for a completion of each prompt (a text, or a chat's messages), and store it with the top
    log-probabilities of its tokens.

    The store holds `tokens` rows besides the signals (`Store.tokens_of`); an empty completion is a row of none.
    `CompletionDataset` trains from it.

    Raises:
        UserError: what `Server.write` and `StoreWriter` raise; answers received before are stored.
    """
    k = _check(spec, server, classes)
    text = [p if isinstance(p, str) else [dict(m) for m in p] for p in prompts]
    digest = hashlib.blake2b(json.dumps([text, max_tokens], sort_keys=True).encode(), digest_size=16).hexdigest()
    manifest = manifest_of(
        spec.model_copy(update={"top": k, "shard_rows": spec.shard_rows or 64}),
        teacher={"model": server.model, "server": server.url, "weights": "not known: behind a server"},
        data={
            "fingerprint": digest,
            "split": "written",
            "spec": {"prompts": len(text), "max_tokens": max_tokens},
            "transform": {},
        },
        count=len(text),
        classes=classes,
        row_bytes=1,
    )

    def columns(samples: np.ndarray, answers: Sequence[Answer]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        signals, plain = shard_arrays(answers, k, classes)
        return signals, {**plain, "tokens": np.array([t for a in answers for t in a.tokens], np.uint32)}

    return _asked(
        StoreWriter(folder, manifest),
        lambda i: server.write(text[i], vocabulary, max_tokens),
        columns,
        workers,
        too_long,
        f"{server.model} at {server.url}",
        rank,
        world,
        live,
    )


class CompletionDataset:
    """Prompts with the completions that a store holds, and its signals: what `Loader` asks of a data set. Samples
    without a completion are left out.

    Args:
        store: that `write` made.
        prompts: token ids of each prompt, in the store's order.
        pad: the id that fills rows up.
    """

    def __init__(self, store: Store, prompts: Sequence[Sequence[int]], pad: int = 0) -> None:
        if len(prompts) != len(store):
            raise UserError(
                f"The store '{store.folder}' holds completions of {len(store)} prompts, but {len(prompts)} are given."
            )
        self.store, self.prompts, self.pad = store, [list(map(int, p)) for p in prompts], pad
        self.tokens = [t.tolist() for t in store.tokens_of(np.arange(len(store)))]
        self.samples = np.array([i for i, t in enumerate(self.tokens) if t], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def labels(self) -> Tensor:
        raise UserError("A completion has no class.")

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`input` (ids and mask), `label` (B, L) (-100 on prompts and padding), `index` (B,) of the prompts, and
        `stored`."""
        index = self.samples[key.indices[key.start : key.stop]]
        rows = [self.prompts[i] + self.tokens[i] for i in index]
        starts = [len(self.prompts[i]) - 1 for i in index]
        length = max(map(len, rows)) - 1  # the last token is only predicted
        ids, label = torch.full((len(rows), length), self.pad), torch.full((len(rows), length), -100)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for b, (row, start) in enumerate(zip(rows, starts)):
            ids[b, : len(row) - 1] = torch.tensor(row[:-1])
            mask[b, : len(row) - 1] = 1
            label[b, start : len(row) - 1] = torch.tensor(row[start + 1 :])
        stored = {self.store.id: self.store.read(index, 0, label != -100)}
        return {
            "input": {"input_ids": ids, "attention_mask": mask},
            "label": label,
            "index": torch.from_numpy(index),
            "stored": stored,
        }


def _check(spec: StoreSpec, server: Server, classes: int) -> int:
    if spec.views != 1 or spec.embedding or spec.taps:
        raise UserError(
            "A server gives the top log-probabilities of text as it is: views must be 1, embedding and taps off."
        )
    if spec.top is not None and spec.top > server.top:
        raise UserError(
            f"The store is to keep the top {spec.top}, but the server is asked for {server.top}; ask for as many."
        )
    return min(spec.top or server.top, classes - 1)


def _asked(
    writer: StoreWriter,
    ask: Callable[[int], Answer],
    columns: Callable[[np.ndarray, Sequence[Answer]], tuple[dict[str, Tensor], dict[str, np.ndarray]]],
    workers: int,
    too_long: TooLongIs,
    what: str,
    rank: int,
    world: int,
    live: Display | None,
) -> int:
    live = live or Display()
    live.start("store", len(range(rank, writer.shards, world)), 0)
    written = 0
    for shard in writer.missing(rank, world):
        _, samples = writer.place(shard)
        journal = Journal(writer.folder / "answers" / f"{shard:06d}.jsonl")
        answers = answered(samples, ask, journal, workers, too_long, what)
        signals, plain = columns(samples, answers)
        writer.write(shard, signals, plain)
        journal.path.unlink(missing_ok=True)
        written += 1
        live.advance(shard // world + 1)
    live.stop("store")
    return written


class Journal:
    """Answers by sample, appended as they come; an incomplete line, left by a kill or a full disk, does not count."""

    def __init__(self, path: Path) -> None:
        self.path, self.answers = path, dict[int, Answer]()
        self._lock = threading.Lock()
        if path.exists():
            text = path.read_bytes()
            for line in text.split(b"\n"):
                try:
                    record = json.loads(line)
                    answer = Answer(record["ids"], record["log_probs"], record["tokens"], record["text"])
                    answer.check()
                    self.answers[int(record["sample"])] = answer
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, sample: int, answer: Answer) -> None:
        line = json.dumps(
            {
                "sample": sample,
                "ids": answer.ids,
                "log_probs": answer.log_probs,
                "tokens": answer.tokens,
                "text": answer.text,
            }
        )
        with self._lock:
            try:
                with open(self.path, "ab") as file:
                    file.write(b"\n" + line.encode())
            except OSError as error:
                if is_full(error):
                    raise UserError(
                        f"Could not write {self.path}: the disk is full. The answers received before are stored; free "
                        "some space and start again."
                    ) from error
                raise
            self.answers[sample] = answer


def answered(
    samples: np.ndarray, ask: Callable[[int], Answer], journal: Journal, workers: int, too_long: TooLongIs, what: str
) -> list[Answer]:
    """The answers to these samples, in order; those that the journal holds are not asked for again.

    Raises:
        UserError: a sample that is too long, unless it is to be skipped (it has then no known position); a server of
            which nothing comes.
    """

    failed = threading.Event()

    def one(sample: int) -> None:
        if sample in journal.answers or failed.is_set():
            return
        try:
            answer = ask(sample)
        except TooLong as error:
            if too_long == "refuse":
                failed.set()
                raise UserError(
                    f"Sample {sample} is too long for {what}: {error}; shorten the samples, or skip those that are "
                    "too long."
                ) from None
            answer = Answer([], [])
        except BaseException:
            failed.set()
            raise
        journal.add(sample, answer)

    with ThreadPoolExecutor(workers) as pool:
        asked = [pool.submit(one, int(s)) for s in samples]
        try:
            for done in asked:
                done.result()
        except BaseException:
            failed.set()  # answers that are on their way are stored
            raise
    out = [journal.answers[int(s)] for s in samples]
    if len(out) > 1 and not any(a.ids for a in out):
        journal.path.unlink(missing_ok=True)
        raise UserError(
            f"{what} gave no log-probabilities for any of {len(out)} samples; start it with log-probabilities on, or "
            "use another server."
        )
    return out


def shard_arrays(
    answers: Sequence[Answer], k: int, classes: int
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """The columns of a shard, from the answers to its samples."""
    parts = [a.arrays(k) for a in answers]
    ids = np.concatenate([p[1] for p in parts])
    if len(ids) and not 0 <= ids.min() <= ids.max() < classes:
        raise UserError(
            f"The server names the token {int(ids.max())}, but the data's vocabulary has {classes} tokens; they must "
            "share one tokenizer."
        )
    plain = {
        "top.indices": ids.astype(index_dtype(classes)),
        "top.tail": np.concatenate([p[2] for p in parts]),
        "offsets": np.cumsum([0, *(len(a.ids) for a in answers)], dtype=np.int64),
    }
    return {"top": torch.from_numpy(np.concatenate([p[0] for p in parts]))}, plain
