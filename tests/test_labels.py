"""Labels that are no classes, text files as other tools write them, and class names of pretrained classifiers."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stillhouse
from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import adapt, load
from stillhouse.data.labels import class_order, read_labels, whole_numbers
from stillhouse.data.text import TextBundle
from stillhouse.errors import UserError

pytest.importorskip("transformers", reason="transformers is not installed")
NAN = float("nan")


@pytest.fixture
def text(tmp_path: Path) -> Callable[..., TextBundle]:
    """Records, or the bytes of a file, as a bundle."""

    def make(given: list[Any] | bytes, name: str = "rows.jsonl", **options: Any) -> Any:
        path = tmp_path / name
        path.write_bytes(given if isinstance(given, bytes) else "\n".join(map(json.dumps, given)).encode())
        return load(DataSpec(name=f"text:{path}", options={"tokenizer": "bytes", **options}))

    return make


def records(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"line {i}", "label": label} for i, label in enumerate(labels)]


def texts(bundle: TextBundle) -> list[str]:
    rows = [r for split in bundle.splits.values() for r in np.split(split.inputs.values, split.inputs.starts[1:-1])]
    return sorted(bundle.task.tokenizer.batch_decode(rows, skip_special_tokens=True))


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a", None, "b"], r"sample 1 has no label \(1 of 3 have none\)"),
        (["a", "", "b"], "sample 1 has no label"),
        ([0, NAN, 1], "sample 1 has no label"),
        ([0.5, 1.0], "sample 0 is the real number 0.5; there is no regression"),
        (["1", "0.25"], "sample 1 is the real number 0.25"),
        (torch.tensor([1.0, 2.5]), "sample 1 is the real number 2.5"),
        ([[0, 1], [1]], r"sample 0 is \[0, 1\], several values"),
        (np.eye(3), "several values"),
        ([torch.zeros(4), torch.zeros(4)], "several values"),
        ([{"class": 1}], "several values"),
    ],
)
def test_what_is_no_class_is_refused_with_the_sample(values: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{words}"):
        read_labels(values, "here")


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ([0, 1.0, np.int64(2), torch.tensor([3]), np.array([4])], [0, 1, 2, 3, 4]),
        (["1.0", "0.0", "2"], [1, 0, 2]),
        (["007", "1"], ["007", "1"]),
        ([b"cat", "dog"], ["cat", "dog"]),
        (torch.tensor([2, 0]), [2, 0]),
    ],
)
def test_whole_numbers_and_words_are_classes(values: Any, read: list[Any]) -> None:
    assert read_labels(values, "here") == read


def test_ids_that_are_no_count_of_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="labels must be whole numbers, one a sample; given: 'cat'"):
        whole_numbers(["cat"], "here")
    with pytest.raises(UserError, match="is no class id"):
        whole_numbers([2**70], "here")
    (tmp_path / "own.py").write_text("def ids(split):\n    return [([1.0], 10**9 * i) for i in range(9)]\n")
    with pytest.raises(UserError, match="27 samples have labels up to 8000000000; class ids must count from 0"):
        load(DataSpec(name=f"file:{tmp_path}/own.py:ids"))


@pytest.mark.parametrize("column", [[0.5, 1.5] * 5, [None, 1] * 5, [[0, 1]] * 10, ["a", None] * 5])
def test_parquet_columns_of_labels_that_are_no_classes_are_refused(tmp_path: Path, column: list[Any]) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    pq.write_table(pa.table({"image": [out.getvalue()] * len(column), "label": column}), tmp_path / "train.parquet")
    pytest.importorskip("datasets")
    for scheme in ("parquet", "hf"):
        with pytest.raises(UserError, match=r"real number|no label|several values"):
            load(DataSpec(name=f"{scheme}:{tmp_path}"))


@pytest.mark.parametrize("label", ["torch.rand(3)", "0.5", "None", "[0, 1]", "torch.tensor(0.5)"])
def test_labels_of_a_users_function_that_are_no_classes_are_refused(tmp_path: Path, label: str) -> None:
    (tmp_path / "own.py").write_text(
        f"import torch\n\ndef pairs(split):\n    return [(torch.zeros(2), {label}) for _ in range(9)]\n"
    )
    with pytest.raises(UserError, match=r"real number|no label|several values"):
        load(DataSpec(name=f"file:{tmp_path}/own.py:pairs"))


@pytest.mark.parametrize("rows", [[[1.0, 1, 0]] * 4, [[0.0, 0, 0]] * 4, [[0.5, 0.5, 0], [3.2, -1, 0.1]]])
def test_multi_hot_and_real_targets_are_no_soft_labels(rows: list[list[float]]) -> None:
    batch = (torch.randn(len(rows), 5), torch.tensor(rows))
    with pytest.raises(UserError, match=r"row \d sums to .* Several classes a sample"):
        stillhouse.distill(nn.Linear(5, 3), nn.Linear(5, 3), [batch], ["ce", "kd"], train={"epochs": 1}, progress=False)


def test_probabilities_are_soft_labels() -> None:
    soft = torch.softmax(torch.randn(4, 3), 1).half()
    assert next(adapt([(torch.randn(4, 5), soft)]).batches())["label"] is soft


def test_class_order_is_that_of_numbers_where_all_are_numbers() -> None:
    assert class_order(map(str, range(20))) == [str(i) for i in range(20)]
    assert class_order(["10", "9", "x"]) == ["10", "9", "x"]


def test_texts_without_a_label_are_refused_or_left_out(text: Any) -> None:
    rows = records([None if i % 5 == 0 else "ab"[i % 2] for i in range(40)])
    with pytest.raises(UserError, match=r"\(8 of 40 have none\).*data.options.unlabelled: drop"):
        text(rows)
    bundle = text(rows, unlabelled="drop")
    assert bundle.classes == ["a", "b"] and sum(len(r.inputs) for r in bundle.splits.values()) == 32
    first_without = [{"text": "no label at all"}, *records(["a", "b"] * 4)]
    with pytest.raises(UserError, match="sample 0 has no label"):
        text(first_without)


@pytest.mark.parametrize("labels", [[i / 7 for i in range(20)], [[i % 2, 1] for i in range(20)], [{"a": 1}] * 20])
def test_texts_with_labels_that_are_no_classes_are_refused(text: Any, labels: list[Any]) -> None:
    with pytest.raises(UserError, match=r"real number|several values"):
        text(records(labels))


def test_whole_real_numbers_of_a_spreadsheet_are_the_classes_that_they_say(text: Any) -> None:
    raw = b"text,label\n" + b"".join(b"line %d,%d.0\n" % (i, i % 11) for i in range(44))
    assert text(raw, "rows.csv").classes == [str(i) for i in range(11)]


def test_a_hugging_face_set_keeps_the_order_of_its_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["zebra", "ant", "mule"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    made = datasets.Dataset.from_dict(
        {"text": [f"line {i}" for i in range(24)], "label": [i % 3 for i in range(24)]}, features=features
    )
    none = datasets.Dataset.from_dict({"text": ["x"] * 4, "label": [-1] * 4}, features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(str(tmp_path / "set" / "train.parquet"))
    none.to_parquet(str(tmp_path / "set" / "test.parquet"))
    options = {"tokenizer": "bytes"}
    for name in (f"text:hf:{tmp_path}/set", f"text:{tmp_path}/set/train.parquet"):
        bundle = load(DataSpec(name=name, options=options))
        assert bundle.classes == names
        assert [int(c) for c in bundle.dataset("train").labels().unique()] == [0, 1, 2]
    assert (
        len(load(DataSpec(name=f"text:hf:{tmp_path}/set", options=options)).splits["test"].inputs) == 2
    )  # a tenth: its own has no labels


# ---- text files ------------------------------------------------------------------------------------------------------

LONG = "x" * 300_000
AWKWARD = [
    "first\u2028second\u0085third\x0b",
    'café, “quoted” "text"',
    "two\nlines",
    "tab\there",
    LONG,
    "ends with a comma,",
]
CLASSES = ["a", "b"] * 3


def table(delimiter: str, **options: Any) -> str:
    import csv
    import io

    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, **options)
    writer.writerow(["text", "label"])
    writer.writerows(zip(AWKWARD, CLASSES))
    return out.getvalue()


FILES = {
    "plain.csv": table(",").encode(),
    "bom.csv": codecs.BOM_UTF8 + table(",").encode(),
    "semicolons.csv": table(";").encode("utf-8-sig"),
    "excel.csv": table("\t").encode("utf-16"),
    "spreadsheet.tsv": codecs.BOM_UTF16_LE + table("\t").encode("utf-16-le"),
    "lines.jsonl": b"\n".join(
        json.dumps({"text": t, "label": c}, ensure_ascii=False).encode() for t, c in zip(AWKWARD, CLASSES)
    ),
    "windows.jsonl": codecs.BOM_UTF8
    + b"\r\n".join(json.dumps({"text": t, "label": c}).encode() for t, c in zip(AWKWARD, CLASSES)),
    "list.json": codecs.BOM_UTF8 + json.dumps([{"text": t, "label": c} for t, c in zip(AWKWARD, CLASSES)]).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_text_survives_the_file_that_a_tool_wrote(text: Any, name: str) -> None:
    bundle = text(FILES[name], name, context=310_000)
    assert bundle.classes == ["a", "b"] and texts(bundle) == sorted(AWKWARD)


def test_another_encoding_is_read_when_it_is_named(text: Any) -> None:
    raw = b"text;label\n" + "café;gut\nthé;schlecht\n".encode("latin-1") * 4
    with pytest.raises(
        UserError,
        match=r"is not UTF-8 text \(byte 14, line 2\); name its encoding in data.options.encoding, such as latin-1",
    ):
        text(raw, "rows.csv")
    assert texts(text(raw, "rows.csv", encoding="latin-1")) == ["café"] * 4 + ["thé"] * 4
    with pytest.raises(UserError, match="there is no encoding 'latn'"):
        text(raw, "rows.csv", encoding="latn")


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("cut.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", "la', "line 2, is not JSON: .*; was it cut off"),
        ("cut.json", b'[{"text": "a", "label": "x"}, {"te', "is not JSON: .*; was it cut off"),
        ("deep.jsonl", b"[" * 200_000, "line 1, is JSON that cannot be read"),
        ("digits.jsonl", b'{"text": "a", "label": ' + b"9" * 9000 + b"}", "line 1, is JSON that cannot be read"),
        ("mixed.jsonl", b'{"text": "a", "label": "x"}\n[1, 2]', "record 1 is a list"),
        ("half.jsonl", b'{"text": "a\\ud800", "label": "x"}', "record 0: 'text' holds half a character"),
        ("short.csv", b"text,label\na,x\nb", "line 3, has 1 fields for 2 columns; was the file cut off"),
        (
            "comma.csv",
            b"text,label\na,x\none, two,y\n",
            "line 3, has 3 fields for 2 columns; put a field that holds a separator into quotes",
        ),
        ("quote.csv", b'text,label\n"a,x\nb,y\n', "is not CSV: unexpected end of data"),
        ("empty.csv", b"", "holds no text"),
        ("nothing.parquet", b"PAR1", "parquet: cannot read"),
    ],
)
def test_a_file_that_is_cut_off_or_broken_is_told_with_its_line(text: Any, name: str, raw: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        text(raw, name)


def test_quotes_of_a_table_with_tabs_are_only_characters_where_they_do_not_pair(text: Any) -> None:
    raw = b'text\tlabel\n"good" film\ta\n"never ends\tb\nplain\ta\nlast\tb\n'
    assert texts(text(raw, "rows.tsv")) == ['"good" film', '"never ends', "last", "plain"]


def test_a_small_parquet_file_that_holds_more_than_fits_is_refused(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x" * 10_000] * 20_000, "label": ["a", "b"] * 10_000}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    memory = {"SC_PHYS_PAGES": 10_000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    with pytest.raises(UserError, match="holds more than half of this machine's memory"):
        load(DataSpec(name=f"text:{tmp_path}/bomb.parquet"))


# ---- class names of pretrained classifiers ---------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VIT = {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1}
HEADS = {
    "bert": SMALL,
    "roberta": SMALL,
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0},
    "vit": VIT,
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "num_channels": 1},
}


def saved(folder: Path, kind: str, names: list[str], **options: Any) -> Any:
    import transformers

    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    vocabulary = {"vocab_size": 261} if kind in ("bert", "roberta", "gpt2") else {}
    config = transformers.AutoConfig.for_model(kind, **{**HEADS[kind], **vocabulary, **options}, **labels)
    auto = (
        transformers.AutoModelForSequenceClassification if vocabulary else transformers.AutoModelForImageClassification
    )
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def bundle(text: Any, tmp_path: Path) -> Callable[[str, list[str]], Any]:
    """Data of these classes, in this order, for a model of a kind."""

    def make(kind: str, names: list[str]) -> Any:
        if kind in ("bert", "roberta", "gpt2"):
            return text(records(sorted(names) * 4), context=16)
        (tmp_path / "own.py").write_text(f"""
import torch

class Pairs(list):
    classes = {names!r}

def pairs(split):
    return Pairs((torch.zeros(1, 8, 8, dtype=torch.uint8), i % {len(names)}) for i in range(20))
""")
        return load(DataSpec(name=f"file:{tmp_path}/own.py:pairs"))

    return make


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    "names", [["World", "sports", "Business"], [str(i) for i in (3, 0, 2, 1)], [f"c{i}" for i in range(15, -1, -1)]]
)
def test_a_classifier_gets_the_order_of_the_data(tmp_path: Path, bundle: Any, kind: str, names: list[str]) -> None:
    theirs = saved(tmp_path / "model", kind, names)
    data = bundle(kind, sorted(n.lower() for n in names))
    ours = data.task.build(ModelSpec(model=f"hf:{tmp_path}/model")).eval()
    sample = (
        {"input_ids": torch.tensor([[5, 9, 30]])}
        if kind in ("bert", "roberta", "gpt2")
        else {"pixel_values": torch.randn(1, 1, 8, 8)}
    )
    with torch.no_grad():
        before, after = theirs(**sample).logits[0], ours(**sample).logits[0]
    for name, score in zip(names, before):
        assert torch.allclose(after[data.classes.index(name.lower())], score, atol=1e-5)
    assert list(ours.config.id2label.values()) == data.classes


def teach(tmp_path: Path, **teacher: Any) -> dict[str, float]:
    recipe = {
        "data": {"name": f"text:{tmp_path}/rows.jsonl", "options": {"tokenizer": "bytes", "context": 16}},
        "teacher": {"model": f"hf:{tmp_path}/model", "pretrained": True, **teacher},
        "student": {"model": "hf:config:bert", "options": SMALL},
        "objectives": ["kd"],
        "train": {"epochs": 1, "batch_size": 8},
    }
    from stillhouse.runs.execution import execute
    from stillhouse.runs.recipe import load as read

    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return execute(read(tmp_path / "recipe.yaml"), tmp_path / "out", cpu=True)


def test_a_teacher_of_other_classes_is_refused_unless_the_user_vouches(
    tmp_path: Path, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    saved(tmp_path / "model", "bert", ["entailment", "contradiction"])
    text(records(["yes", "no"] * 10), context=16)
    with pytest.raises(
        UserError,
        match=r"are 'entailment', 'contradiction', but those of the data are 'no', 'yes'; .*options.id2label: null",
    ):
        teach(tmp_path)
    import shutil

    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    teach(tmp_path, options={"id2label": None})
    import transformers

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "product" / "model")
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}


def test_numbers_and_missing_names_leave_a_model_as_it_is(tmp_path: Path, bundle: Any) -> None:
    names = [f"LABEL_{i}" for i in range(3)]
    theirs = saved(tmp_path / "model", "bert", names)
    ours = bundle("bert", ["c", "a", "b"]).task.build(ModelSpec(model=f"hf:{tmp_path}/model"))
    assert torch.equal(ours.classifier.weight, theirs.classifier.weight) and ours.config.id2label == {
        0: "a",
        1: "b",
        2: "c",
    }


def test_a_product_of_images_holds_the_names_of_its_classes(tmp_path: Path, bundle: Any) -> None:
    from stillhouse.runs.products import Student

    data = bundle("vit", ["cat", "dog"])
    saved(tmp_path / "model", "vit", ["dog", "cat"])
    for name, options in [(f"hf:{tmp_path}/model", {}), ("hf:config:vit", VIT)]:
        spec = ModelSpec(model=name, options=options)
        Student(data.task.build(spec), spec, data.task).save(tmp_path / "product")
        assert stillhouse.load(tmp_path / "product").config.id2label == {0: "cat", 1: "dog"}
        config = tmp_path / "product" / "config" / "config.json"
        if config.is_file():
            assert json.loads(config.read_text())["label2id"] == {"cat": 0, "dog": 1}
            (tmp_path / "product").rename(tmp_path / "first")
