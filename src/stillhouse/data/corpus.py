"""Where text comes from: tiny Shakespeare, SST-2, a user's plain text, JSONL, JSON, CSV, TSV or Parquet file, or a Hugging Face data set.

`read` gives records by split: mappings with `text`, with `text` and `label`, or with `prompt` and `completion`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stillhouse.config.specs import Spec
from stillhouse.data.source import existing
from stillhouse.errors import MissingExtra, UserError, nearest, unknown

Records = list[dict[str, Any]]
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Columns(Spec):
    """The columns of a file or data set that hold what."""

    text: str = Field("text", description="The text; of seq2seq, what is read.")
    label: str = Field("label", description="classify: the class, a word or a number.")
    prompt: str = Field("prompt", description="causal, seq2seq: what is given.")
    completion: str = Field("completion", description="causal, seq2seq: what is to be written.")


class TextOptions(Spec):
    """data.options of `text:` data."""

    task: Literal["causal", "masked", "classify", "seq2seq"] | None = Field(
        None, description="What is learned; default: classify where the records have labels, else causal."
    )
    tokenizer: str = Field("bpe:512", description="bytes | characters | bpe:SIZE | hf:NAME")
    context: int = Field(128, ge=2, description="Tokens a model reads at most; of plain text, the length of each sample.")
    pack: bool = Field(False, description="causal: several samples in one row of `context` tokens; none sees another.")
    prompt_loss: bool = Field(False, description="causal with prompts: the prompt's tokens are learned too, not only the completion's.")
    too_long: Literal["refuse", "cut", "drop"] = Field(
        "refuse", description="A sample longer than `context`: an error, cut at its end (a prompt: at its beginning), or left out."
    )
    empty: Literal["refuse", "drop"] = Field("refuse", description="A sample without a token to learn, such as an empty completion.")
    masked_share: float = Field(0.15, gt=0, lt=1, description="masked: share of tokens to be guessed.")
    columns: Columns = Field(default_factory=Columns, description="Names of columns.")
    test: str | None = Field(None, description="A file of test samples; default: a tenth of the samples (of plain text, its last tenth).")
    val: str | None = Field(None, description="A file of validation samples.")
    config: str | None = Field(None, description="hf: the configuration of the data set.")


def read(name: str, options: TextOptions, root: Path) -> dict[str, Records]:
    """Records by split (`train`, and `val` and `test` where the source has them).

    Args:
        name: shakespeare | sst2 | PATH | hf:NAME.
        options: columns, further files.
        root: the folder that holds the data.

    Raises:
        UserError: nothing of that name, a column that is not there, or a record that is no text.
    """
    if name == "shakespeare":
        return {"train": _plain(existing("text/tiny_shakespeare.txt", root))}
    if name == "sst2":
        folder = existing("sst2", root)
        return {s: _sst2(existing(str(folder / f"{f}.tsv"), root)) for s, f in (("train", "train"), ("val", "dev"), ("test", "test"))}
    if name.startswith("hf:"):
        return _published(name.removeprefix("hf:"), options)
    if not Path(name).suffix and not Path(name).expanduser().exists():
        raise unknown("text data set", f"text:{name}", ["text:shakespeare", "text:sst2", "text:PATH", "text:hf:NAME"])
    files = {"train": name, "val": options.val, "test": options.test}
    return {split: _file(existing(path, root), options.columns) for split, path in files.items() if path is not None}


def _plain(path: Path) -> Records:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.start}); convert it first.") from None
    return [{"stream": text}]


def _sst2(path: Path) -> Records:
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"text": text, "label": ("negative", "positive")[int(label)]} for text, label in rows]


def _file(path: Path, columns: Columns) -> Records:
    if path.suffix == ".txt":
        return _plain(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"data.name: '{path}' is none of {', '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows: Sequence[Any] = pq.read_table(path).to_pylist()
    elif path.suffix in (".csv", ".tsv"):
        with open(path, encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ","))
    else:
        rows = _json(path)
    return _chosen(rows, columns, str(path))


def _json(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise UserError(f"'{path}' must hold a list of records, but holds a {type(rows).__name__}.")
        return rows
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"'{path}', line {number}, is not JSON: {error.msg}.") from None
    return rows


def _chosen(rows: Sequence[Any], columns: Columns, where: str) -> Records:
    """The columns wanted, under our names."""
    if not rows:
        return []
    if not isinstance(rows[0], Mapping):
        raise UserError(f"'{where}' must hold records (mappings of columns), but its first is a {type(rows[0]).__name__}.")
    there = list(rows[0])
    wanted = {ours: theirs for ours, theirs in columns.model_dump().items() if theirs in there}
    if "text" not in wanted and not {"prompt", "completion"} <= set(wanted):
        close = nearest(columns.text, there)
        raise UserError(
            f"'{where}' has no column '{columns.text}', nor both '{columns.prompt}' and '{columns.completion}'; its columns: {', '.join(there)}"
            + (f" (data.options.columns.text: {close[0]}?)." if close else "; name them in data.options.columns.")
        )
    out: Records = []
    for number, row in enumerate(rows):
        record = {ours: row.get(theirs) for ours, theirs in wanted.items()}
        for ours, value in record.items():
            if ours != "label" and not isinstance(value, str):
                raise UserError(f"'{where}', record {number}: '{wanted[ours]}' must be text; given: {value!r}.")
        out.append(record)
    return out


def _published(name: str, options: TextOptions) -> dict[str, Records]:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("Data hf:", "text") from None
    try:
        found = datasets.load_dataset(name, options.config)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"data.name: could not get 'hf:{name}' (no network, or no such data set?): {said[0].rstrip('.')}.") from error
    names = {"train": "train", "val": "validation", "test": "test"}
    out = {}
    for ours, theirs in names.items():
        if theirs in found:
            rows = found[theirs]
            feature = rows.features.get(options.columns.label)
            labels = getattr(feature, "names", None)
            records = _chosen(rows.to_list(), options.columns, f"hf:{name} {theirs}")
            if labels:
                records = [{**r, "label": labels[r["label"]] if r["label"] >= 0 else None} for r in records]
            out[ours] = [r for r in records if "label" not in r or r["label"] is not None] if labels else records
    if "train" not in out:
        raise UserError(f"data.name: 'hf:{name}' has no split 'train'; it has: {', '.join(found)}.")
    if not out.get("test"):
        out.pop("test", None)
    return out
