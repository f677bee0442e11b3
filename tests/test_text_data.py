"""Text as batches: tokenizers, labels where predictions stand, padding and packing that change nothing, and what is
refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, load
from stillhouse.data.text import TextBundle
from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED
from stillhouse.models.tokenizer import encode, marks, size, tokenizer
from stillhouse.signals import call_model, read_logits

pytest.importorskip("transformers", reason="transformers is not installed")
LINES = [
    "a rose is a rose",
    "to be",
    "is it so",
    "all the world is a stage and we are players",
    "go",
    "so be it then",
    "what is in a name",
    "be it so",
]
SMALL = {
    "hf:config:gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16, "attn_pdrop": 0.0},
    "hf:config:llama": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def text(tmp_path: Path) -> Callable[..., TextBundle]:
    """Records, or one plain text, as a bundle."""

    def make(records: list[dict[str, Any]] | str, **options: Any) -> TextBundle:
        path = tmp_path / ("text.txt" if isinstance(records, str) else "text.jsonl")
        path.write_text(records if isinstance(records, str) else "\n".join(map(json.dumps, records)))
        spec = {k: options.pop(k) for k in ("size", "val", "holdout", "seed", "test_size", "mixup") if k in options}
        return load(DataSpec(name=f"text:{path}", options={"tokenizer": "bytes", "context": 96, **options}, **spec))

    return make


def whole(bundle: TextBundle, split: str = "train", epoch: int = 0) -> Any:
    data = bundle.dataset(split)
    return data.batch(BatchKey(epoch, np.arange(len(data)), 0, len(data)), 0)


def small(bundle: TextBundle, name: str = "hf:config:gpt2", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return bundle.task.build(ModelSpec(model=name, options={**SMALL.get(name, {}), **options})).eval()


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    """The loss of every counted token, in order."""
    with torch.no_grad():
        logits = read_logits(call_model(model, batch))
    losses = F.cross_entropy(logits.flatten(0, 1), batch["label"].flatten(), reduction="none", ignore_index=IGNORED)
    return losses[batch["label"].flatten() != IGNORED]


def alone(model: nn.Module, ids: list[int], given: int) -> Tensor:
    """The loss of every token after the first `given` of one text, without padding or labels of ours."""
    x = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=x[:, :-1]).logits[0]
    return F.cross_entropy(logits, x[0, 1:], reduction="none")[max(given - 1, 0) :]


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "characters", "bpe:300"])
def test_a_tokenizer_gives_back_the_text(name: str) -> None:
    made = tokenizer(name, LINES)
    for line, ids in zip(LINES, encode(made, LINES)):
        assert made.decode(ids) == line and max(ids) < size(made)


def test_learned_pairs_are_kept_and_shorten_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    first, plain = tokenizer("bpe:300", LINES), tokenizer("bytes")
    assert (
        tokenizer("bpe:300", LINES).get_vocab() == first.get_vocab()
        and len(list((tmp_path / "tokenizers").iterdir())) == 1
    )
    assert len(encode(first, LINES)[0]) < len(encode(plain, LINES)[0])


@pytest.mark.parametrize(
    "name, said", [("bpe:20", "at least 261"), ("byte", "bytes"), ("hf:/no/such/place", "could not get")]
)
def test_a_tokenizer_that_cannot_be_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tokenizer(name, LINES)


def made(folder: Path, single: str | None, **special: str) -> str:
    """A tokenizer in a folder, whose texts become `single` (a template), that was saved with padding and truncation."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(20))]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single is not None:
        built.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    built.enable_padding(length=64)
    built.enable_truncation(3)
    PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", unk_token="<unk>", **special).save_pretrained(
        folder
    )
    return f"hf:{folder}"


BOTH = {"bos_token": "<bos>", "eos_token": "<eos>"}
TEMPLATES = {
    "<bos> $A": ([1], []),
    "$A <eos>": ([], [2]),
    "<bos> $A <eos>": ([1], [2]),
    "<bos> <bos> $A": ([1, 1], []),
    "$A": ([], []),
}


@pytest.mark.parametrize("single", TEMPLATES)
def test_rows_have_the_special_tokens_that_transformers_gives(text: Any, tmp_path: Path, single: str) -> None:
    name, (before, after) = made(tmp_path / "own", single, **BOTH), TEMPLATES[single]
    plain = [{"text": f"w{i} w1 w2 w3 w4"} for i in range(9)]
    pairs = [{"prompt": f"w{i} w5", "completion": "w6 w7"} for i in range(9)]

    def first(records: Any, task: str) -> tuple[list[int], list[int], list[int]]:
        bundle = text(records, tokenizer=name, task=task, test_size=1)
        sample = bundle.dataset("train")[0]
        number = sample["input"]["input_ids"].tolist()[len(before)]
        own = bundle.task.tokenizer(records[number - 4].get("text", records[number - 4].get("prompt"))).input_ids
        return sample["input"]["input_ids"].tolist(), own, sample["label"].tolist() if sample["label"].ndim else []

    ids, own, label = first(plain, "causal")
    close = after or [2]
    assert ids + label[-1:] == before + own[len(before) :][:5] + close and own[: len(before)] == before
    assert label == [IGNORED] * (len(before) - 1) + ids[max(len(before), 1) :] + close
    ids, own, label = first(pairs, "causal")
    assert (
        ids == before + own[len(before) :][:2] + [10, 11] and label == [IGNORED] * (len(before) + 1) + [10, 11] + close
    )
    ids, own, label = first(pairs, "seq2seq")
    assert ids == own and label == [*before, 10, 11, *close]
    ids, own, _ = first([{**r, "label": i % 2} for i, r in enumerate(plain)], "classify")
    assert ids == own


def test_encoders_without_a_rule_for_special_tokens_get_their_cls_and_sep(text: Any, tmp_path: Path) -> None:
    records = [{"text": f"w{i} w1", "label": i % 2} for i in range(9)]
    for special, ends in [({"cls_token": "<bos>", "sep_token": "<eos>"}, (1, 2)), (BOTH, None)]:
        bundle = text(records, tokenizer=made(tmp_path / "own", None, **special), context=16)
        for row in bundle.dataset("train").batch(BatchKey(0, np.arange(7), 0, 7), 0)["input"]["input_ids"].tolist():
            assert (row[0], row[-1]) == ends if ends else len(row) == 2


def test_a_plain_text_is_cut_into_rows_with_the_special_tokens_of_a_text(text: Any, tmp_path: Path) -> None:
    words = " ".join(f"w{i % 20}" for i in range(101))
    for single, task in [("<bos> $A", "causal"), ("<bos> <bos> $A", "causal"), ("$A", "causal")]:
        bundle = text(words, tokenizer=made(tmp_path / single, single, **BOTH), context=10, task=task)
        rows = [whole(bundle, split) for split in ("train", "test")]
        ids, labels = (
            torch.cat(x).tolist() for x in ([r["input"]["input_ids"] for r in rows], [r["label"] for r in rows])
        )
        before = TEMPLATES[single][0]
        assert all(row[: len(before)] == before and len(row) == 10 for row in ids)
        learned = [i for row in labels for i in row if i != IGNORED]
        everything = [4 + i % 20 for i in range(101)]
        assert learned == everything[: len(learned)] if before else learned == everything[1 : len(learned) + 1]
        assert len(learned) > 90


@pytest.mark.parametrize("task, kept", [("classify", [1, 4, 5, 2]), ("causal", [1, 4, 5, 6])])
def test_a_cut_leaves_the_special_tokens(text: Any, tmp_path: Path, task: str, kept: list[int]) -> None:
    name = made(tmp_path / "own", "<bos> $A <eos>", **BOTH)
    records = [{"text": "w0 w1 w2 w3 w4 w5", "label": i % 2} for i in range(9)]
    bundle = text(records, tokenizer=name, task=task, context=4, too_long="cut")
    assert bundle.dataset("train")[0]["input"]["input_ids"].tolist() == kept
    with pytest.raises(UserError, match="leaves no room for text"):
        text(records, tokenizer=name, task="classify", context=2, too_long="cut")


def test_a_tokenizer_that_was_saved_with_padding_does_not_pad(data_root: Path) -> None:
    tokens = tokenizer(f"hf:{data_root}/pretrained/all-minilm-l6-v2")
    once = encode(tokens, ["hello there"])
    tokens("hello there", padding="max_length", max_length=40, truncation=True)
    assert once == encode(tokens, ["hello there"]) == [[7592, 2045]] and marks(tokens) == ([101], [102])
    bundle = load(
        DataSpec(name="text:sst2", size=20, options={"tokenizer": f"hf:{data_root}/pretrained/all-minilm-l6-v2"}),
        data_root,
    )
    sentence = bundle.task.tokenizer.decode(
        bundle.splits["train"].inputs.values[: bundle.splits["train"].inputs.starts[1]], skip_special_tokens=True
    )
    first = bundle.dataset("train")[0]["input"]
    assert first["input_ids"].tolist() == bundle.task.tokenizer(sentence).input_ids and bool(
        first["attention_mask"].all()
    )


def test_a_classifier_of_our_own_tokenizer_is_saved_with_its_rule(text: Any, tmp_path: Path) -> None:
    import transformers

    bundle = text([{"text": t, "label": len(t) % 2} for t in LINES])
    bundle.task.facts(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("to be").input_ids == [1, *encode(again, ["to be"])[0], 2]


# ---- padding, packing, prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("pack", [False, True])
def test_padded_and_packed_texts_have_the_losses_of_each_alone(text: Any, name: str, pack: bool) -> None:
    bundle = text([{"text": t} for t in LINES], pack=pack, test_size=1)
    model, batch, padded = small(bundle, name), whole(bundle), text([{"text": t} for t in LINES], test_size=1)
    rows = padded.splits["train"].inputs
    end = [bundle.task.tokenizer.eos_token_id]
    texts = [rows.values[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:])]
    expected = torch.cat([alone(model, ids + end, 0) for ids in texts])
    assert torch.allclose(token_losses(model, batch), expected, atol=1e-5)
    assert (len(batch["label"]) < len(texts)) == pack


def test_a_prompt_is_read_and_not_learned(text: Any) -> None:
    records = [{"prompt": f"{t}?", "completion": t[::-1]} for t in LINES]
    bundle = text(records)
    model, batch = small(bundle), whole(bundle)
    losses, at = token_losses(model, batch), 0
    decoded = []
    for ids, label in zip(batch["input"]["input_ids"], batch["label"]):
        counted = label[label != IGNORED]
        decoded.append(bundle.task.tokenizer.decode(counted[:-1]))
        assert counted[-1] == bundle.task.tokenizer.eos_token_id
        given = int((label != IGNORED).int().argmax()) + 1
        expected = alone(model, [*ids[:given].tolist(), *counted.tolist()], given)
        assert torch.allclose(losses[at : at + len(counted)], expected, atol=1e-5)
        at += len(counted)
    assert set(decoded) < {r["completion"] for r in records}
    assert int((whole(text(records, prompt_loss=True))["label"] != IGNORED).sum()) > at


def test_our_labels_give_the_loss_that_transformers_computes(text: Any) -> None:
    bundle = text(" ".join(LINES) * 3, context=16)
    model, batch = small(bundle), whole(bundle)
    ids = torch.cat([batch["input"]["input_ids"], batch["label"][:, -1:]], 1)
    assert torch.allclose(token_losses(model, batch).mean(), model(input_ids=ids, labels=ids).loss, atol=1e-5)
    assert "attention_mask" not in batch["input"]


def test_an_encoder_decoder_reads_its_labels_shifted_right(text: Any) -> None:
    bundle = text([{"prompt": t, "completion": t[::-1]} for t in LINES], task="seq2seq")
    model, batch = small(bundle, "hf:config:t5", **T5), whole(bundle)
    inputs = {k: v for k, v in batch["input"].items() if k != "decoder_input_ids"}
    assert torch.allclose(token_losses(model, batch).mean(), model(**inputs, labels=batch["label"]).loss, atol=1e-5)


def test_masked_tokens_are_drawn_anew_each_epoch_and_every_sample_has_one(text: Any) -> None:
    bundle = text([{"text": t} for t in LINES], task="masked", masked_share=0.3)
    first, again, later = whole(bundle), whole(bundle), whole(bundle, epoch=1)
    assert torch.equal(first["label"], again["label"]) and not torch.equal(first["label"], later["label"])
    counted = first["label"] != IGNORED
    assert bool(counted.any(1).all()) and bool((first["input"]["attention_mask"][counted] == 1).all())
    kept = whole(text([{"text": t} for t in LINES], task="masked", masked_share=1e-9))
    assert bool(((kept["label"] != IGNORED).sum(1) == 1).all())
    restored = torch.where(counted, first["label"], first["input"]["input_ids"])
    assert bundle.task.tokenizer.decode(restored[0], skip_special_tokens=True) in LINES


def test_padding_does_not_move_an_encoders_answer(text: Any) -> None:
    bundle = text([{"text": t, "label": len(t) % 2} for t in LINES])
    model, batch = small(bundle, "hf:config:bert", **ENCODER), whole(bundle)
    with torch.no_grad():
        together = read_logits(call_model(model, batch))
        for row, mask, logits in zip(batch["input"]["input_ids"], batch["input"]["attention_mask"], together):
            assert torch.allclose(model(input_ids=row[None, : int(mask.sum())]).logits[0], logits, atol=1e-5)
    assert bundle.task.kind == "classify" and list(bundle.task.classes) == ["0", "1"] and model.config.num_labels == 2


# ---- real data and users' files --------------------------------------------------------------------------------------


def test_shakespeare_in_blocks_loses_no_token(data_root: Path) -> None:
    bundle = load(DataSpec(name="text:shakespeare", options={"tokenizer": "characters", "context": 100}), data_root)
    train, test = bundle.splits["train"].inputs, bundle.splits["test"].inputs
    assert len(train) + len(test) == (1_115_394 - 1) // 100 and len(test) == len(train.starts) // 9
    batch = whole(bundle, "test")
    assert torch.equal(batch["input"]["input_ids"][:, 1:], batch["label"][:, :-1])
    assert bundle.task.tokenizer.decode(train.values[:13]) == "First Citizen"


def test_sst2_has_its_published_splits(data_root: Path) -> None:
    bundle = load(DataSpec(name="text:sst2", options={"tokenizer": "bpe:512", "context": 160}), data_root)
    assert [len(bundle.splits[s].inputs) for s in ("train", "val", "test")] == [6920, 872, 1821]
    assert list(bundle.task.classes) == ["negative", "positive"] and bundle.num_classes == 2


def test_subsets_are_functions_of_the_seed_and_keep_the_tokenizer(text: Any) -> None:
    records = [{"text": f"line {i} of many"} for i in range(40)]
    one, two, three = (text(records, tokenizer="bpe:300", size=10, val=0.2, seed=s) for s in (0, 0, 1))
    assert one.fingerprint == two.fingerprint != three.fingerprint
    assert [len(one.splits[s].inputs) for s in ("train", "val", "test")] == [8, 2, 4]
    assert one.task.tokenizer.get_vocab() == text(records, tokenizer="bpe:300").task.tokenizer.get_vocab()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_users_file_is_read_by_its_columns(tmp_path: Path, suffix: str) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"sentence": t, "mood": "glad" if i % 2 else "sad"} for i, t in enumerate(LINES)]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix in ("csv", "tsv"):
        with open(path, "w", newline="") as handle:
            writer = csv.DictWriter(handle, ["sentence", "mood"], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    columns = {"text": "sentence", "label": "mood"}
    bundle = load(DataSpec(name=f"text:{path}", options={"tokenizer": "bytes", "columns": columns}))
    assert list(bundle.task.classes) == ["glad", "sad"] and len(bundle.splits["train"].inputs) == 7
    with pytest.raises(UserError, match=r"no column 'text'.*sentence, mood"):
        load(DataSpec(name=f"text:{path}", options={"tokenizer": "bytes"}))


def test_a_hugging_face_data_set_keeps_its_splits_and_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(
            "\n".join(json.dumps({"text": t, "label": str(len(t) % 2)}) for t in LINES)
        )
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    bundle = load(DataSpec(name=f"text:hf:{folder}", options={"tokenizer": "bytes"}))
    assert {s: len(r.inputs) for s, r in bundle.splits.items()} == {"train": 8, "val": 8, "test": 8} and list(
        bundle.task.classes
    ) == ["0", "1"]


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_sample_longer_than_the_context_is_refused_cut_or_dropped(text: Any) -> None:
    records = [{"text": t} for t in LINES]
    with pytest.raises(
        UserError, match=r"sample 3 is longer than data.options.context 20 \(the longest has 43 tokens\)"
    ):
        text(records, context=20)
    cut, dropped = text(records, context=20, too_long="cut"), text(records, context=20, too_long="drop")
    assert whole(cut)["label"].shape[1] == 20
    assert (
        sum(len(r.inputs) for r in cut.splits.values()) == 8
        and sum(len(r.inputs) for r in dropped.splits.values()) == 7
    )


def test_a_cut_takes_the_beginning_of_a_prompt_and_never_its_completion(text: Any) -> None:
    bundle = text(
        [{"prompt": "x" * 30, "completion": "answer"}, {"prompt": "y" * 10, "completion": "answer"}],
        context=20,
        too_long="cut",
        test_size=1,
    )
    for split in ("train", "test"):
        label = whole(bundle, split)["label"]
        counted = label[label != IGNORED]
        assert bundle.task.tokenizer.decode(counted, skip_special_tokens=True) == "answer" and label.shape[1] <= 20


def test_an_empty_completion_is_refused_or_dropped(text: Any) -> None:
    records = [{"prompt": t, "completion": t if i != 2 else ""} for i, t in enumerate(LINES)]
    with pytest.raises(UserError, match="sample 2 has an empty completion"):
        text(records)
    bundle = text(records, empty="drop")
    assert sum(len(r.inputs) for r in bundle.splits.values()) == 7
    assert bool((whole(bundle)["label"] != IGNORED).any(1).all())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"contxt": 5}, "unknown key 'contxt'; did you mean 'context'"),
        ({"task": "classify"}, "has none"),
        ({"task": "seq2seq"}, "needs prompts and completions"),
        ({"mixup": 0.2}, "data.mixup does nothing for 'text:"),
        ({"size": 99}, "holds 7"),
    ],
)
def test_options_that_do_not_fit_are_named(text: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        text([{"text": t} for t in LINES], **options)


def test_what_is_no_text_is_refused(text: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record 1: 'text' must be text; given: 7"):
        text([{"text": "a"}, {"text": 7}])
    with pytest.raises(UserError, match="fewer than one sample"):
        text("short")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load(DataSpec(name=f"text:{tmp_path / 'latin.txt'}"))
    with pytest.raises(UserError, match="did you mean 'text:shakespeare'"):
        load(DataSpec(name="text:shakespear"))


def test_a_model_that_cannot_read_the_context_or_the_tokens_is_refused(text: Any) -> None:
    bundle = text([{"text": t} for t in LINES])
    with pytest.raises(UserError, match="context is 96, but 'hf:config:gpt2' reads at most 32"):
        small(bundle, n_positions=32)
    with pytest.raises(UserError, match="has 100 tokens, but the tokenizer 'bytes' has 261"):
        small(bundle, vocab_size=100)


def test_a_single_class_is_refused(text: Any) -> None:
    with pytest.raises(UserError, match="has the one class 'good'"):
        text([{"text": t, "label": "good"} for t in LINES])
