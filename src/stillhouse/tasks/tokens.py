"""Tokens: language models (causal, masked, seq2seq) and classifiers of text, of transformers, with their tokenizer.

A model is named as everywhere: `hf:config:TYPE` (fresh, `options` are its config's), `hf:FOLDER` or `hf:NAME` with
`pretrained: true`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from stillhouse.config.specs import ModelSpec, TeacherSpec
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.classification import ClassificationMeter
from stillhouse.evaluation.judge import Meter
from stillhouse.evaluation.language import TokenMeter
from stillhouse.evaluation.writing import writing_figures
from stillhouse.functional import heads
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.heads import Head
from stillhouse.functional.ragged import RaggedArray
from stillhouse.models import build
from stillhouse.models.class_names import put_in_order, set_names
from stillhouse.models.language import (
    as_teacher,
    body_and_output,
    check_headless,
    headless,
    keeps_apart,
    left_padded,
    own_tokenizer,
    prompt_rows,
    quietly,
)
from stillhouse.models.tokenizer import encode, marks, size, with_marks
from stillhouse.models.writing import Generation, TextWriter
from stillhouse.signals import Batch, Signals, read_logits, to_device
from stillhouse.tasks.base import Task

HEADS = {"causal": "causal", "masked": "masked", "classify": "text", "seq2seq": "seq2seq"}
"""Kind -> options.task of a transformers model."""
AUTO = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classify": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
WRITING = "writing"
JUDGED = 512  # samples whose answers are written to be judged
MODEL = "model"  # the folder, inside a product, that transformers loads as well


@dataclass(frozen=True)
class Tokens(Task):
    """Logits (B, L, V) and labels (B, L), or, of a text classifier, logits (B, C) and labels (B,).

    Attributes:
        kind: causal, masked, seq2seq or classify.
        vocabulary: how many tokens the tokenizer knows; logits beyond them belong to padded rows of an embedding, and
            are cut off.
        context: tokens read at most.
        tokenizer: a transformers tokenizer; None inside other libraries' loops, where nothing is built, saved or
            predicted.
        classes: class names, of a classifier.
        tokenizer_name: as in the recipe, for messages.
        decoder_start: the id that a decoder begins with, of seq2seq.
        packed: whether rows hold several samples, which a model must keep apart.
        without_head: networks are called without their output layer; `hidden`, `output_weight` and `output_bias` stand
            in the place of logits.
    """

    name: ClassVar[str] = "tokens"
    reads: ClassVar[str] = "texts"
    parts: ClassVar[Mapping[str, str]] = {
        "hidden": "(B, L, D) last hidden states",
        "output_weight": "(V, D) matrix of the output layer",
        "output_bias": "(V,) its bias, where it has one",
    }
    kind: str
    vocabulary: int
    context: int = 0
    tokenizer: Any = field(default=None, repr=False, compare=False)
    classes: tuple[str, ...] = ()
    tokenizer_name: str = ""
    decoder_start: int = 0
    packed: bool = False
    without_head: bool = False

    @property
    def positions(self) -> bool:
        return self.kind != "classify"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def num_classes(self) -> int:
        """Classes, or tokens."""
        return self.vocabulary if self.positions else len(self.classes)

    def build(self, spec: ModelSpec) -> nn.Module:
        """A network for the kind and vocabulary.

        Raises:
            UserError: what `stillhouse.models.build` raises; a vocabulary smaller than the tokenizer's; a context
                longer than the model's positions.
        """
        options = dict(spec.options)
        if spec.model.startswith("hf:"):
            options.setdefault("task", HEADS[self.kind])
            if spec.model.startswith("hf:config:"):
                tokens = self.tokenizer
                options.setdefault("vocab_size", size(tokens))
                plain = _plain_config(spec.model.removeprefix("hf:config:"))
                for name in SPECIAL:
                    if getattr(tokens, name) is not None and hasattr(plain, name):
                        options.setdefault(name, getattr(tokens, name))
        model = build(spec.model_copy(update={"options": options}), self.num_classes, None)
        put_in_order(model, self.classes, spec.model)
        config = getattr(model, "config", None)
        rows = getattr(config, "vocab_size", None)
        if rows is not None and rows < self.vocabulary:
            raise UserError(
                f"'{spec.model}' has {rows} tokens, but the tokenizer '{self.tokenizer_name}' has {self.vocabulary}; "
                "take the model's own "
                f"tokenizer (data.options.tokenizer: hf:NAME)."
            )
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < self.context:
            raise UserError(
                f"data.options.context is {self.context}, but '{spec.model}' reads at most {positions} tokens; lower "
                "it."
            )
        if self.kind == "seq2seq":
            _start(model, self.decoder_start, spec.model)
        if self.packed and self.kind == "causal" and not keeps_apart(model):
            raise UserError(
                f"'{spec.model}' lets packed samples see each other (its attention takes no note of position_ids); "
                "set data.options.pack: false."
            )
        return model

    def call(self, model: nn.Module, batch: Batch, *, losses: bool = False) -> Any:
        return headless(model, batch["input"]) if self.without_head else super().call(model, batch)

    def read(self, output: Any, batch: Batch) -> Signals:
        if isinstance(output, Head):
            bias = {} if output.bias is None else {"output_bias": output.bias[: self.vocabulary]}
            return Signals(parts={"hidden": output.hidden, "output_weight": output.weight[: self.vocabulary], **bias})
        logits = read_logits(output)
        return Signals(
            logits=logits[..., : self.vocabulary] if self.positions and logits.shape[-1] > self.vocabulary else logits
        )

    def compiled_part(self, model: nn.Module) -> nn.Module:
        return body_and_output(model)[0] if self.without_head else model

    def as_teacher(self, model: nn.Module, spec: TeacherSpec, its: Task) -> nn.Module:
        """A teacher for students of this tokenizer; its own is that of the folder it comes from, or of the text that it
        was trained on."""
        assert spec.model is not None and isinstance(its, Tokens)
        return as_teacher(model, own_tokenizer(spec.model) or its.tokenizer, self.tokenizer, self.kind)

    @property
    def prefers_chunks(self) -> bool:
        return self.positions and self.vocabulary >= heads.BIG_VOCABULARY

    def chunked(self, models: Mapping[str, nn.Module], probe: Batch) -> Task | str:
        if not self.positions:
            return "the student is a classifier"
        for owner, model in models.items():
            if not isinstance(probe["input"], Mapping):
                return f"the {owner} is no language model of transformers"
            try:
                check_headless(model, probe["input"])
            except UserError as reason:
                return f"of the {owner}, {reason}"
        return dataclasses.replace(self, without_head=True)

    def meter(self, groups: Sequence[str]) -> Meter:
        return TokenMeter() if self.positions else ClassificationMeter(groups)

    @property
    def slow_groups(self) -> tuple[str, ...]:
        return (WRITING,) if self.kind in ("causal", "seq2seq") else ()

    def own_figures(self, module: nn.Module, loader: Iterable[Batch], groups: Sequence[str]) -> dict[str, float]:
        """With `writing`: what the network writes after or for the prompts of the first `JUDGED` samples, word by word
        the most probable, compared with what stands there (see `stillhouse.evaluation.writing`)."""
        if WRITING not in groups:
            return {}
        how = Generation(temperature=0, max_new_tokens=self.context)
        writer = TextWriter(self.tokenizer, self.kind, self.context, how, self.vocabulary)
        device = next(module.parameters()).device
        written: list[str] = []
        right: list[str] = []
        for batch in loader:
            batch = to_device(batch, device)
            answers = writer.answers(module, batch)
            for answer, label in zip(answers, batch["label"].cpu()):
                wanted = label[label != IGNORED]
                if self.kind == "causal" and label[0] != IGNORED:  # of a text without a prompt, its beginning was given
                    wanted = wanted[how.prompt - 1 :]
                if len(wanted):
                    written.append(self.tokenizer.decode(answer, skip_special_tokens=True))
                    right.append(self.tokenizer.decode(wanted.tolist(), skip_special_tokens=True))
            if len(right) >= JUDGED:
                break
        return writing_figures(written[:JUDGED], right[:JUDGED])

    # ---- on disk -----------------------------------------------------------------------------------------------------

    def facts(self, folder: Path) -> dict[str, Any]:
        """Kind, context and classes; the tokenizer goes into the folder that transformers loads."""
        self.tokenizer.save_pretrained(folder / MODEL)
        return {"kind": self.kind, "context": self.context, "classes": list(self.classes)}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], folder: Path) -> Tokens:
        import transformers

        if facts["kind"] not in AUTO:
            raise unknown("kind of language model", str(facts["kind"]), AUTO)
        if not (folder / MODEL / "config.json").is_file():
            raise UserError(f"The product in {folder} is incomplete: it has no {MODEL}/config.json.")
        tokens = transformers.AutoTokenizer.from_pretrained(folder / MODEL)
        if facts["kind"] in ("classify", "masked"):
            tokens = with_marks(tokens)  # of products that were saved without them
        return cls(facts["kind"], size(tokens), facts["context"], tokens, tuple(facts["classes"]))

    def save_module(self, module: nn.Module, folder: Path) -> None:
        save: Any = getattr(module, "save_pretrained", None)
        if save is None:
            raise UserError(
                "A language product is a transformers model (hf:…), which saves itself; this student is a "
                f"{type(module).__name__}."
            )
        set_names(module, self.classes)
        with quietly():
            save(folder / MODEL)

    def load_module(self, spec: ModelSpec, folder: Path) -> nn.Module:
        import transformers

        with quietly():
            model: nn.Module = getattr(transformers, AUTO[self.kind]).from_pretrained(
                folder / MODEL, use_safetensors=True
            )
        return model.eval()

    def weights_file(self, folder: Path) -> Path:
        return folder / MODEL / "model.safetensors"

    # ---- for people --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, module: Any, prompts: Sequence[str], max_new_tokens: int = 64, **options: Any) -> list[str]:
        """What the model writes after (causal) or for (seq2seq) each prompt, without the prompt.

        Args:
            prompts: texts; a prompt longer than the context loses its beginning.
            max_new_tokens: at most.
            options: of transformers' `generate`, such as do_sample, temperature, top_k; drawn from torch's default
                generator.

        Raises:
            UserError: a model that does not write.
        """
        if self.kind not in ("causal", "seq2seq"):
            raise UserError(f"This is a {self.kind} model, which does not write; use predict.")
        room = max(self.context - max_new_tokens, 1) if self.kind == "causal" else self.context
        rows = prompt_rows(self.tokenizer, prompts, self.kind, room)
        x = left_padded(rows, self.tokenizer.pad_token_id, next(module.parameters()).device)
        written = module.generate(
            **x, max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **options
        )
        written = written[:, x["input_ids"].shape[1] :] if self.kind == "causal" else written[:, 1:]
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    @torch.no_grad()
    def predict(self, module: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Of a classifier, `label` and `probs` (by class name) of each text; of a model that writes, the `text` that
        follows each prompt.

        Raises:
            UserError: a masked language model, or a text beyond the context.
        """
        if self.kind != "classify":
            return [{"text": text} for text in self.generate(module, inputs)]
        begin, close = marks(self.tokenizer)
        rows = RaggedArray.of([begin + ids + close for ids in encode(self.tokenizer, inputs)])
        if len(rows) and int(rows.lengths.max()) > self.context:
            raise UserError(
                f"Text {int(rows.lengths.argmax())} has {int(rows.lengths.max())} tokens, but the model reads "
                f"{self.context}; shorten it."
            )
        ids = rows.padded(np.arange(len(rows)), self.tokenizer.pad_token_id)
        inside = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(rows.lengths)[:, None]
        device = next(module.parameters()).device
        probs = (
            module(input_ids=ids.to(device), attention_mask=inside.long().to(device))
            .logits.float()
            .softmax(-1)
            .cpu()
            .tolist()
        )
        return [{"label": self.classes[p.index(max(p))], "probs": dict(zip(self.classes, p))} for p in probs]


def _start(model: Any, start: int, name: str) -> None:
    """Settle the id that a decoder begins with; a trained decoder has one already."""
    given = getattr(model.config, "decoder_start_token_id", None)
    if given is None:
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = start
    elif given != start:
        raise UserError(
            f"'{name}' begins to write with token {given}, but the data with {start}; take its own tokenizer "
            "(data.options.tokenizer: hf:NAME)."
        )


def _plain_config(kind: str) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(kind) if kind in transformers.CONFIG_MAPPING else None
