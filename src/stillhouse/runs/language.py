"""`Language`, the product of a language model or text classifier: the network with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from stillhouse.errors import UserError, unknown
from stillhouse.functional.ragged import Ragged
from stillhouse.models.language import AUTO, left_padded, quietly
from stillhouse.models.tokenizer import encode, marks
from stillhouse.runs.products import Product


@dataclass
class Language(Product):
    """A language model or text classifier with its tokenizer; a folder that transformers loads as well (`model/`).

    Attributes:
        module: the network.
        tokenizer: a transformers tokenizer.
        task: causal, masked, classify or seq2seq.
        context: tokens read at most.
        classes: class names, of a classifier.
        figures: of its training; kept with the run, not with the product.
    """

    kind: ClassVar[str] = "language"
    module: Any  # a `PreTrainedModel`
    tokenizer: Any
    task: str
    context: int
    classes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """`product.json`, and `model/` with the config, `model.safetensors` and the tokenizer."""
        if not hasattr(self.module, "save_pretrained"):
            raise UserError(f"A language product is a transformers model (hf:…), which saves itself; this student is a {type(self.module).__name__}.")
        folder.mkdir(parents=True, exist_ok=True)
        with quietly():
            self.module.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        meta = {"kind": self.kind, "format": 1, "task": self.task, "context": self.context, "classes": self.classes}
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> Language:
        """From a product's folder. Raises `UserError` where the files are not there or are of an unknown task."""
        import transformers

        meta = json.loads((folder / "product.json").read_text())
        if meta["task"] not in AUTO:
            raise unknown("task of a language product", str(meta["task"]), AUTO)
        if not (folder / "model" / "config.json").is_file():
            raise UserError(f"The product in {folder} is incomplete: it has no model/config.json.")
        with quietly():
            model = getattr(transformers, AUTO[meta["task"]]).from_pretrained(folder / "model", use_safetensors=True)
        tokens = transformers.AutoTokenizer.from_pretrained(folder / "model")
        return cls(model.eval(), tokens, meta["task"], meta["context"], meta["classes"])

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 64, **options: Any) -> list[str]:
        """What the model writes after (causal) or for (seq2seq) each prompt, without the prompt.

        Args:
            prompts: texts; a prompt longer than the context loses its beginning.
            max_new_tokens: at most.
            options: of transformers' `generate`, such as do_sample, temperature, top_k; drawn from torch's default generator.

        Raises:
            UserError: a model that does not write.
        """
        if self.task not in ("causal", "seq2seq"):
            raise UserError(f"This product is a {self.task} model, which does not write; use predict.")
        begin = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        room = max(self.context - max_new_tokens, 1) if self.task == "causal" else self.context
        rows = [ids[-room:] or [begin] for ids in encode(self.tokenizer, prompts)]
        x = left_padded(rows, self.tokenizer.pad_token_id, next(self.module.parameters()).device)
        written = self.module.generate(**x, max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **options)
        written = written[:, x["input_ids"].shape[1] :] if self.task == "causal" else written[:, 1:]
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    @torch.no_grad()
    def predict(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """`label` and `probs` (by class name) of each text. Raises `UserError` for a model that is no classifier, or a text beyond the context."""

        if self.task != "classify":
            raise UserError(f"This product is a {self.task} model, which does not classify; use generate.")
        begin, close = marks(self.tokenizer)
        rows = Ragged.of([begin + ids + close for ids in encode(self.tokenizer, texts)])
        if len(rows) and int(rows.lengths.max()) > self.context:
            raise UserError(
                f"Text {int(rows.lengths.argmax())} has {int(rows.lengths.max())} tokens, but the model reads {self.context}; shorten it."
            )
        import numpy as np

        ids = rows.padded(np.arange(len(rows)), self.tokenizer.pad_token_id)
        inside = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(rows.lengths)[:, None]
        device = next(self.module.parameters()).device
        probs = self.module(input_ids=ids.to(device), attention_mask=inside.long().to(device)).logits.float().softmax(-1).cpu().tolist()
        return [{"label": self.classes[p.index(max(p))], "probs": dict(zip(self.classes, p))} for p in probs]
