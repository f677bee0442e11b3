"""Answers of a vision-language model of transformers: the logits of "Yes" and "No" as the first token it would
write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.config.specs import DataSpec
from stillhouse.errors import MissingExtra, UserError
from stillhouse.methods.classification.makd.answers import VisionLanguage
from stillhouse.runs.run import Run


def token_id(tokenizer: Any, word: str) -> int:
    """The id of a word that is one token. Raises `UserError` for one that is not."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"aspects.vision_language: '{word}' is {len(ids)} tokens (or unknown) to this model; choose a spelling "
            "that is one token."
        )
    return int(ids[0])


@torch.no_grad()
def ask(spec: VisionLanguage, questions: list[str], data: DataSpec, run: Run) -> list[Tensor]:
    """(1, Q, 2) logits of yes and no for each training image, in index order.

    Raises:
        UserError: no such folder, no vision-language model in it, or answers that are not one token.
    """
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError:
        raise MissingExtra("aspects.vision_language", "text") from None
    try:
        processor = AutoProcessor.from_pretrained(spec.path, local_files_only=True)
        model: Any = AutoModelForImageTextToText.from_pretrained(spec.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"aspects.vision_language: could not load a model from '{spec.path}': {str(error).splitlines()[0]}"
        ) from None
    model.to(run.device).eval()
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # so that the last position of every row is where the answer starts
    ids = torch.tensor([token_id(tokenizer, spec.yes_word), token_id(tokenizer, spec.no_word)], device=run.device)
    texts = [prompt(processor, spec, q) for q in questions]
    bundle = run.data(data)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (bundle.mean, bundle.std))
    out = []
    for batch in run.loader(data, "train"):
        for x in batch["input"]:
            out.append(
                torch.cat(
                    [
                        _first_token(model, processor, _picture(x * std + mean), texts[i : i + spec.batch_size], ids)
                        for i in range(0, len(texts), spec.batch_size)
                    ]
                )[None]
            )
    return out


def prompt(processor: Any, spec: VisionLanguage, question: str) -> str:
    """The text that asks a question about one image."""
    if getattr(processor, "chat_template", None):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        return str(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    return spec.prompt.format(question=question)


def _first_token(model: Any, processor: Any, picture: Any, texts: list[str], ids: Tensor) -> Tensor:
    """(len(texts), 2) logits."""
    inputs = processor(images=[picture] * len(texts), text=texts, return_tensors="pt", padding=True).to(ids.device)
    return model(**inputs).logits[:, -1, ids].float().cpu()


def _picture(x: Tensor) -> Any:
    """Pixels (C, H, W) in [0, 1] as an RGB image."""
    from torchvision.transforms.v2 import functional as V

    return V.to_pil_image(x.clamp(0, 1)).convert("RGB")
