"""Where text comes from: tiny Shakespeare, SST-2, CrossNER's passages by domain, a user's plain text, JSONL, JSON, CSV,
TSV or Parquet file, or a Hugging Face data set.

`read` gives a `Corpus`: records by split, mappings with `text`, with `text` and `label`, or with `prompt` and
`completion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stillhouse.config.specs import Spec
from stillhouse.data.labels import read_labels
from stillhouse.data.source import existing
from stillhouse.data.text_files import read_csv, read_json, read_json_lines, read_text
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
    context: int = Field(
        128, ge=2, description="Tokens a model reads at most; of plain text, the length of each sample."
    )
    pack: bool = Field(False, description="causal: several samples in one row of `context` tokens; none sees another.")
    prompt_loss: bool = Field(
        False, description="causal with prompts: the prompt's tokens are learned too, not only the completion's."
    )
    too_long: Literal["refuse", "cut", "drop"] = Field(
        "refuse",
        description="A sample longer than `context`: an error, cut at its end (a prompt: at its beginning), or left "
        "out.",
    )
    empty: Literal["refuse", "drop"] = Field(
        "refuse", description="A sample without a token to learn, such as an empty completion."
    )
    unlabelled: Literal["refuse", "drop"] = Field(
        "refuse", description="classify: a sample without a label: an error, or left out."
    )
    masked_share: float = Field(0.15, gt=0, lt=1, description="masked: share of tokens to be guessed.")
    encoding: str | None = Field(
        None, description="Of text files; default: UTF-8, or UTF-16 where the file begins with its mark."
    )
    columns: Columns = Field(default_factory=Columns, description="Names of columns.")
    test: str | None = Field(
        None, description="A file of test samples; default: a tenth of the samples (of plain text, its last tenth)."
    )
    val: str | None = Field(None, description="A file of validation samples.")
    config: str | None = Field(None, description="hf: the configuration of the data set.")


@dataclass
class Corpus:
    """Records by split (`train`, and `val` and `test` where the source has them), and class names in label order where
    the source has an order."""

    splits: dict[str, Records]
    classes: list[str] | None = None


def read(name: str, options: TextOptions, root: Path) -> Corpus:
    """The records of a source of text.

    Args:
        name: shakespeare | sst2 | crossner | PATH | hf:NAME.
        options: columns, further files.
        root: the folder that holds the data.

    Raises:
        UserError: nothing of that name, a column that is not there, a record that is no text, or a label that is no
            class.
    """
    if name == "shakespeare":
        return Corpus({"train": _plain(existing("text/tiny_shakespeare.txt", root), None)})
    if name == "sst2":
        folder = existing("sst2", root)
        parts = {"train": "train", "val": "dev", "test": "test"}
        return Corpus({split: _sst2(existing(str(folder / f"{part}.tsv"), root)) for split, part in parts.items()})
    if name == "crossner":
        return Corpus({"train": _domains(existing("ner", root))})
    if name.startswith("hf:"):
        return _labelled(_published(name.removeprefix("hf:"), options), options, f"text:{name}")
    if not Path(name).suffix and not Path(name).expanduser().exists():
        raise unknown(
            "text data set",
            f"text:{name}",
            ["text:shakespeare", "text:sst2", "text:crossner", "text:PATH", "text:hf:NAME"],
        )
    files = {
        split: existing(p, root)
        for split, p in (("train", name), ("val", options.val), ("test", options.test))
        if p is not None
    }
    names = _names(files["train"], options.columns.label)
    return _labelled(
        Corpus({split: _file(p, options) for split, p in files.items()}, names), options, f"'{files['train']}'"
    )


def _labelled(corpus: Corpus, options: TextOptions, where: str) -> Corpus:
    """With each record's label as the name of its class; a split other than train in which no sample has one is left
    out."""
    splits = {}
    for split, records in corpus.splits.items():
        if records and "label" in records[0] and options.task in (None, "classify"):
            values = [_named(r["label"], corpus.classes) for r in records]
            absent = [v is None or v == "" or v != v for v in values]
            if all(absent) and split != "train":
                continue
            if options.unlabelled == "drop":
                records = [r for r, none in zip(records, absent) if not none]
                values = [v for v, none in zip(values, absent) if not none]
            what = f"{where} ({split})"
            try:
                labels = read_labels(values, what)
            except UserError as error:
                hint = " To leave them out, set data.options.unlabelled: drop." if any(absent) else ""
                raise UserError(f"{error}{hint}") from None
            records = [{**r, "label": str(v)} for r, v in zip(records, labels)]
        splits[split] = records
    return Corpus(splits, corpus.classes)


def _named(label: Any, names: list[str] | None) -> Any:
    """A ClassLabel's number as its name; -1 is its sign for a sample without a label."""
    if names is None or not isinstance(label, int):
        return label
    return names[label] if 0 <= label < len(names) else None


def _plain(path: Path, encoding: str | None) -> Records:
    return [{"stream": read_text(path, encoding)}]


def _sst2(path: Path) -> Records:
    rows = [line.rsplit("\t", 1) for line in read_text(path).split("\n") if line.strip()]
    return [{"text": text, "label": ("negative", "positive")[int(label)]} for text, label in rows]


def _domains(folder: Path) -> Records:
    """The passages of CrossNER's conversations, each once, with the domain that they are of."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("CrossNER_*.json")):
        for record in read_json(path):
            text = str(record["conversations"][0]["value"]).removeprefix("Text: ")
            found.setdefault(text, path.stem.removeprefix("CrossNER_").lower())
    return [{"text": text, "label": domain} for text, domain in found.items()]


def _names(path: Path, column: str) -> list[str] | None:
    """The class names of a Parquet file that Hugging Face's `datasets` wrote."""
    if path.suffix != ".parquet":
        return None
    from stillhouse.data.parquet import class_names, read_schema

    return class_names(read_schema(str(path)), column)


def _file(path: Path, options: TextOptions) -> Records:
    if path.suffix == ".txt":
        return _plain(path, options.encoding)
    if path.suffix not in SUFFIXES:
        raise UserError(f"data.name: '{path}' is none of {', '.join(SUFFIXES)}.")
    rows: Sequence[Any]
    if path.suffix == ".parquet":
        from stillhouse.data.parquet import read_columns, read_schema

        wanted = _wanted(read_schema(str(path)).names, options.columns, str(path))
        rows = read_columns([str(path)], list(wanted.values())).to_pylist()
    elif path.suffix in (".csv", ".tsv"):
        rows = read_csv(path, options.encoding)
    else:
        rows = (read_json if path.suffix == ".json" else read_json_lines)(path, options.encoding)
    return _chosen(rows, options.columns, str(path))


def _chosen(rows: Sequence[Any], columns: Columns, where: str) -> Records:
    """The columns wanted, under our names."""
    if not rows:
        return []
    strange = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if strange is not None:
        raise UserError(
            f"'{where}' must hold records (mappings of columns), but record {strange} is a "
            f"{type(rows[strange]).__name__}."
        )
    wanted = _wanted(list(dict.fromkeys(column for row in rows for column in row)), columns, where)
    out: Records = []
    for number, row in enumerate(rows):
        record = {ours: row.get(theirs) for ours, theirs in wanted.items()}
        for ours, value in record.items():
            if ours != "label" and not isinstance(value, str):
                raise UserError(f"'{where}', record {number}: '{wanted[ours]}' must be text; given: {value!r}.")
            if ours != "label" and not _is_unicode(value):
                raise UserError(
                    f"'{where}', record {number}: '{wanted[ours]}' holds half a character (a lone surrogate), which "
                    "no tokenizer reads."
                )
        out.append(record)
    return out


def _wanted(there: Sequence[str], columns: Columns, where: str) -> dict[str, str]:
    """Our names of the columns that are there -> theirs. Raises `UserError` where there is no text among them."""
    wanted = {ours: theirs for ours, theirs in columns.model_dump().items() if theirs in there}
    if "text" not in wanted and not {"prompt", "completion"} <= set(wanted):
        close = nearest(columns.text, there)
        raise UserError(
            f"'{where}' has no column '{columns.text}', nor both '{columns.prompt}' and '{columns.completion}'; its "
            f"columns: {', '.join(there)}"
            + (f" (data.options.columns.text: {close[0]}?)." if close else "; name them in data.options.columns.")
        )
    return wanted


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _published(name: str, options: TextOptions) -> Corpus:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("Data hf:", "text") from None
    try:
        found = datasets.load_dataset(name, options.config)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"data.name: could not get 'hf:{name}' (no network, or no such data set?): {lines[0].rstrip('.')}."
        ) from error
    names = {"train": "train", "val": "validation", "test": "test"}
    out = {
        ours: _chosen(found[t].to_list(), options.columns, f"hf:{name} {t}") for ours, t in names.items() if t in found
    }
    if "train" not in out:
        raise UserError(f"data.name: 'hf:{name}' has no split 'train'; it has: {', '.join(found)}.")
    if not out.get("test"):
        out.pop("test", None)
    return Corpus(out, getattr(found["train"].features.get(options.columns.label), "names", None))
