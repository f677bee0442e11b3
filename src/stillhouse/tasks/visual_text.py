"""Visual text: what a language model writes about an image: captions, and answers to questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec, TeacherSpec
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.judge import Meter
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.pictures import normalise, resized, unnormalise, with_channels
from stillhouse.models import accepts, build
from stillhouse.models.tokenizer import encode, identity, size
from stillhouse.signals import Batch, Signals
from stillhouse.tasks.base import Task

GROUPS = ("tokens", "answers")
TOKENIZER = "tokenizer"
CAPTION = "caption"
PROMPTS = {CAPTION: "describe the image :", "name": "what is this ?", "presence": "is there {} in the image ?"}
"""What a user asks, by kind."""
YES, NO = "yes", "no"


@dataclass(frozen=True)
class VisualText(Task):
    """Logits (B, L, V) and labels (B, L) of texts after an image: a label stands where its prediction stands, and is
    -100 in the prompt and in the padding.

    `input` holds `pixel_values` (B, C, H, W), `input_ids` and `attention_mask` (B, L). `kind` (B,) is the place of a
    sample's kind of question in `kinds`; `denied` (B,) whether its right answer is no.

    Attributes:
        size: (H, W) of an image.
        mean, std: the normalisation per channel.
        tokenizer: a transformers tokenizer.
        context: tokens of prompt and answer.
        classes: names that are spoken of.
        kinds: of questions.
    """

    name: ClassVar[str] = "visual_text"
    reads: ClassVar[str] = "images"
    groups: ClassVar[tuple[str, ...]] = GROUPS
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: Any = field(repr=False, compare=False)
    context: int = 24
    classes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = (CAPTION,)

    @property
    def positions(self) -> bool:
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size

    @property
    def vocabulary(self) -> int:
        """Tokens that the tokenizer knows; logits beyond them belong to padded rows, and are cut off."""
        return size(self.tokenizer)

    def build(self, spec: ModelSpec) -> nn.Module:
        options = dict(spec.options)
        if not spec.model.startswith("file:") and not accepts(spec.model, "vocabulary"):
            raise UserError(f"'{spec.model}' writes nothing about images; take stillhouse:visual_language.")
        options.setdefault("vocabulary", self.vocabulary)
        return build(spec.model_copy(update={"options": options}), None, (len(self.mean), *self.size))

    def read(self, output: Any, batch: Batch) -> Signals:
        return Signals(logits=output[..., : self.vocabulary])

    def as_teacher(self, model: nn.Module, spec: TeacherSpec, its: Task) -> nn.Module:
        assert isinstance(its, VisualText)
        if identity(its.tokenizer) != identity(self.tokenizer):
            raise UserError(
                f"The teacher '{spec.model}' reads another tokenizer than the student; give both data sets the same "
                "data.options.tokenizer and the same texts."
            )
        return model

    def meter(self, groups: Sequence[str]) -> Meter:
        return VisualTextMeter(self.kinds, groups)

    def one(self, batch: Batch) -> Batch:
        return {"input": {k: v[:1] for k, v in batch["input"].items()}}

    def example(self) -> Batch:
        ids = torch.zeros(1, self.context, dtype=torch.long)
        images = torch.zeros(1, len(self.mean), *self.size)
        return {"input": {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}}

    # ---- on disk -----------------------------------------------------------------------------------------------------

    def facts(self, folder: Path) -> dict[str, Any]:
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        return {name: getattr(self, name) for name in ("size", "mean", "std", "context", "classes", "kinds")}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], folder: Path) -> VisualText:
        import transformers

        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        return cls(**plain, tokenizer=transformers.AutoTokenizer.from_pretrained(folder / TOKENIZER))

    # ---- for people --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, module: nn.Module, images: Tensor, prompt: str, most: int = 16) -> list[str]:
        """What a network writes after a prompt about each image (B, C, H, W), normalised: always the most probable
        token, until the end mark."""
        before = self.asked([prompt])[0]
        device, number = images.device, len(images)
        ids = torch.tensor([before] * number, device=device)
        ended = torch.zeros(number, dtype=torch.bool, device=device)
        for _ in range(min(most, self.context - len(before))):
            batch = {"input": {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}}
            logits = self.read(self.call(module, batch), batch).require("logits")
            following = logits[:, -1].argmax(-1).masked_fill(ended, self.tokenizer.pad_token_id)
            ended = ended | (following == self.tokenizer.eos_token_id)
            ids = torch.cat([ids, following[:, None]], 1)
        texts: list[str] = self.tokenizer.batch_decode(ids[:, len(before) :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def asked(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of prompts, after each of which an answer follows."""
        return encode(self.tokenizer, [f"{prompt} " for prompt in prompts])

    def named(self, text: str) -> list[int]:
        """The classes that a text names."""
        words = f" {text.replace(',', ' ').replace('.', ' ')} "
        return [i for i, name in enumerate(self.classes) if f" {name} " in words]

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each uint8 image (C, H, W), the `text` that describes it."""
        device, found = next(module.parameters()).device, []
        for image in inputs:
            plain = resized(with_channels(image, len(self.mean)), self.size)
            x = normalise(plain[None], self.mean, self.std).to(device)
            found.append({"text": self.write(module, x, PROMPTS[CAPTION])[0]})
        return found

    def truth(self, batch: Batch) -> list[Tensor]:
        x = unnormalise(batch["input"]["pixel_values"].cpu(), self.mean, self.std)
        times = max(1, 96 // max(self.size))
        return [with_channels(i, 3).repeat_interleave(times, 1).repeat_interleave(times, 2) for i in x]

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        return self.truth(batch)

    def captions(self, batch: Batch, outputs: Signals | None) -> list[str]:
        """The question, with the right answer or, given outputs, the most probable token at each place of it."""
        ids, labels = batch["input"]["input_ids"].cpu(), batch["label"].cpu()
        given = labels if outputs is None else outputs.require("logits").argmax(-1).cpu()
        texts = []
        for row, label, answer in zip(ids, labels, given):
            start = int((label != IGNORED).long().argmax()) + 1
            question = self.tokenizer.decode(row[:start], skip_special_tokens=True)
            texts.append(f"{question} {self.tokenizer.decode(answer[label != IGNORED], skip_special_tokens=True)}")
        return texts

    def disagreement(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        counts = (batch["label"] != IGNORED).float()
        kl = F.kl_div(student.log_probs(), teacher.log_probs(), reduction="none", log_target=True).sum(-1)
        return (kl * counts).sum(-1) / counts.sum(-1).clamp_min(1)


class VisualTextMeter:
    """`tokens`: `perplexity`, `nll` and `accuracy` over all tokens of answers. `answers`: `exact`, the share of answers
    that a network writes word by word, as each token is the most probable after those before; `exact_KIND` of each kind
    of question; and `invented`, the share of things that are not there which it says are there."""

    def __init__(self, kinds: Sequence[str], groups: Sequence[str]) -> None:
        for group in groups:
            if group not in GROUPS:
                raise unknown("evaluation group", group, GROUPS)
        self.kinds, self.groups = tuple(kinds), groups
        self._rows: list[Tensor] = []

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the logits (B, L, V) of a batch, its `label` (B, L), `kind` (B,) and `denied` (B,)."""
        logits, label = outputs.require("logits"), batch["label"]
        counts = label != IGNORED
        losses = F.cross_entropy(logits.flatten(0, 1).float(), label.flatten(), ignore_index=IGNORED, reduction="none")
        right = (logits.argmax(-1) == label) & counts
        exact = (right | ~counts).all(1)
        columns = [losses.view_as(label).double().sum(1), right.sum(1), counts.sum(1), exact]
        self._rows.append(torch.stack([c.double() for c in (*columns, batch["kind"], batch["denied"])], 1))

    def figures(self) -> dict[str, float]:
        """The figures. Raises `UserError` where no token counts, or outputs were NaN."""
        rows = torch.cat(self._rows).cpu() if self._rows else torch.zeros(0, 6)
        if not rows[:, 2].sum() > 0:
            raise UserError("There is no answer to judge by: the loader gave none whose tokens count.")
        loss, right, tokens = rows[:, :3].sum(0).tolist()
        if math.isnan(loss):
            raise UserError("The model's outputs are NaN, so it cannot be judged; train with a lower learning rate.")
        out: dict[str, float] = {}
        if "tokens" in self.groups:
            nll = loss / tokens
            out |= {"perplexity": math.exp(min(nll, 700.0)), "nll": nll, "accuracy": right / tokens}
        if "answers" in self.groups:
            exact, kind, denied = rows[:, 3], rows[:, 4], rows[:, 5] > 0
            out["exact"] = float(exact.mean())
            for i, name in enumerate(self.kinds):
                if (kind == i).any():
                    out[f"exact_{name}"] = float(exact[kind == i].mean())
            if denied.any():
                out["invented"] = float(1 - exact[denied].mean())
        return out
