"""Tokenizers by name, as transformers has them: `bytes`, `characters`, `bpe:SIZE` (trained on the training text and
cached), `hf:NAME`.

All are `PreTrainedTokenizerFast`, so that a product saves them with its model and any library loads both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.files import atomic_write, cache_folder, digest

SPECIALS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
"""Ids 0 to 4 of every tokenizer built here."""
LEGACY_END = 2


def tokenizer(name: str, texts: Sequence[str] = ()) -> Any:
    """A `PreTrainedTokenizerFast` by its name.

    Args:
        name: `bytes` (256 tokens, nothing is unknown), `characters` (those of the texts), `bpe:SIZE` (byte-level pairs
            learned from the texts; SIZE counts the specials), or `hf:NAME` (a folder, or a repository of the Hugging
            Face hub).
        texts: what characters and pairs are learned from.

    Raises:
        UserError: an unknown name, a size that is no number or too small, a folder without a tokenizer, or one that
            cannot pad.
    """
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        return _published(rest)
    if kind == "bpe":
        if not rest.isdigit() or int(rest) < 256 + len(SPECIALS):
            raise UserError(
                f"data.options.tokenizer: bpe needs a size of at least {256 + len(SPECIALS)}, such as bpe:512; given: "
                f"'{name}'."
            )
        return _wrapped(_kept(name, texts, lambda: _pairs(texts, int(rest))))
    if name == "bytes":
        return _wrapped(_pairs((), 256 + len(SPECIALS)))
    if name == "characters":
        return _wrapped(_characters(texts))
    raise unknown("tokenizer", name, ["bytes", "characters", "bpe:512", "hf:NAME"])


def encode(tokens: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens; padding and truncation that the tokenizer was saved with do not
    count."""
    return _called(tokens, list(texts), add_special_tokens=False) if len(texts) else []


def marks(tokens: Any, target: bool = False) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text, as transformers gives them.

    Args:
        tokens: a tokenizer of transformers.
        target: as it encodes what an encoder-decoder writes.

    Raises:
        UserError: a tokenizer that puts them elsewhere.
    """
    for probe in _probes(tokens):
        inner = _called(tokens, [probe], add_special_tokens=False, target=target)[0]
        if inner:
            whole = _called(tokens, [probe], target=target)[0]
            for at in range(len(whole) - len(inner) + 1):
                if whole[at : at + len(inner)] == inner:
                    return whole[:at], whole[at + len(inner) :]
            break
    raise UserError(
        f"data.options.tokenizer: the {type(tokens).__name__} puts special tokens inside a text, which is not "
        "supported."
    )


def _probes(tokens: Any) -> Iterator[str]:
    """Short texts of which a tokenizer knows at least one."""
    yield from ("a", "1", ".")
    yield from tokens.get_vocab()


def with_marks(tokens: Any) -> Any:
    """The tokenizer, which puts special tokens around a text as encoders read it.

    A tokenizer that was saved without a rule for that gets one: `cls_token` and `sep_token` where it has both; of those
        built here, `<bos>` and `<eos>`.
    """
    ours = all(getattr(tokens, name) == token for name, token in SPECIALS.items() if name != "eos_token")
    begin, end = tokens.cls_token, tokens.sep_token
    if ours and not (begin and end):
        begin, end = tokens.bos_token, tokens.eos_token
    if begin and end and marks(tokens) == ([], []):
        template = {"single": f"{begin} $A {end}", "pair": f"{begin} $A {end} $B:1 {end}:1"}
        ids = [(token, tokens.convert_tokens_to_ids(token)) for token in (begin, end)]
        tokens.backend_tokenizer.post_processor = _library().processors.TemplateProcessing(
            **template, special_tokens=ids
        )
    return tokens


def _called(tokens: Any, texts: list[str], *, add_special_tokens: bool = True, target: bool = False) -> list[list[int]]:
    encoded = tokens(
        **{"text_target" if target else "text": texts},
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def size(tokens: Any) -> int:
    """One more than the largest id: the vocabulary that a model needs."""
    return max(tokens.get_vocab().values()) + 1


def decoder_start(name: str, tokens: Any) -> int:
    """The id that a decoder begins with: that of the model which the tokenizer `hf:NAME` comes with, else the beginning
    of a text."""
    if name.startswith("hf:"):
        from transformers import AutoConfig

        try:
            given = getattr(AutoConfig.from_pretrained(name.removeprefix("hf:")), "decoder_start_token_id", None)
        except (OSError, ValueError):  # a folder of a tokenizer alone
            given = None
        if given is not None:
            return int(given)
    return next(int(i) for i in (tokens.bos_token_id, tokens.eos_token_id, tokens.pad_token_id) if i is not None)


def identity(tokens: Any) -> str:
    """A hash of the vocabulary: tokens by id, and which of them are special."""
    return digest(
        sorted(tokens.get_vocab().items(), key=lambda kv: kv[1]), sorted(map(str, tokens.special_tokens_map.items()))
    )


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("Text data", "text") from None
    return tokenizers


def _wrapped(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIALS, clean_up_tokenization_spaces=False)


def _kept(name: str, texts: Sequence[str], make: Any) -> Any:
    library = _library()
    place = cache_folder() / "tokenizers" / f"{name.replace(':', '-')}-{digest(name, library.__version__, *texts)}.json"
    if place.is_file():
        return library.Tokenizer.from_file(str(place))
    tokenizer = make()
    with atomic_write(place) as temporary:
        tokenizer.save(str(temporary))
    return tokenizer


def _pairs(texts: Iterable[str], size: int) -> Any:
    library = _library()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = library.Tokenizer(
        library.models.BPE(vocab={t: i for i, t in enumerate([*SPECIALS.values(), *alphabet])}, merges=[])
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS.values()))
    if size > len(SPECIALS) + len(alphabet):
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIALS.values()),
            initial_alphabet=alphabet,
            show_progress=False,
            min_frequency=2,
        )
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _characters(texts: Iterable[str]) -> Any:
    library = _library()
    found = sorted(set().union(*map(set, texts))) if texts else []
    if not found:
        raise UserError(
            "data.options.tokenizer: 'characters' needs texts to take its characters from, but there are none."
        )
    vocabulary = {t: i for i, t in enumerate([*SPECIALS.values(), *found])}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token=SPECIALS["unk_token"]))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = library.decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIALS.values()))
    return tokenizer


def _published(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("A tokenizer hf:", "text") from None
    folder = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"data.options.tokenizer: could not get 'hf:{name}' (no folder of that name, or no network?): "
            f"{lines[0].rstrip('.')}."
        ) from error
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"data.options.tokenizer: 'hf:{name}' has neither a padding nor an end token; give it one and save it "
                "to a folder."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def texts_padded(tokens: Any, texts: Sequence[str], context: int) -> dict[str, Tensor]:
    """Texts as an encoder reads them: `input_ids` and `attention_mask` (T, L), padded to the longest.

    A text of more than `context` tokens is cut before its end mark, which encoders such as CLIP's pool.
    """
    begin, close = marks(tokens)
    room = context - len(begin) - len(close)
    rows = [begin + ids[:room] + close for ids in encode(tokens, list(texts))]
    length = max(map(len, rows), default=0)
    ids = torch.full((len(rows), length), int(tokens.pad_token_id), dtype=torch.int64)
    inside = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        inside[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": inside}


def with_last_end(tokens: Any) -> Any:
    """The tokenizer with an end mark of the largest id, where it has id 2: CLIP networks of transformers pool the
    largest id of a text where the end mark is 2, and the end mark elsewhere."""
    if tokens.eos_token_id == LEGACY_END:
        tokens.add_special_tokens({"eos_token": "<end>"})
    return tokens


def too_long(tokens: Any, texts: Sequence[str], context: int) -> int:
    """How many texts have more than `context` tokens."""
    begin, close = marks(tokens)
    room = context - len(begin) - len(close)
    doubtful = [t for t in texts if len(t.encode()) > room]  # a token is at least a byte
    return sum(len(ids) > room for ids in encode(tokens, doubtful))
