"""Distil a causal language model into a smaller one of the same tokenizer, token by token.

Take your own models, and batches as transformers' collators make them: `input_ids`, `labels` (shifted for you; -100
where
none counts), `attention_mask`. Needs: pip install 'stillhouse[text]'.
"""

import inspect
import math

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import stillhouse

torch.manual_seed(0)
text = inspect.getsource(torch.nn.functional)  # 200,000 characters of a regular language: Python
tokens = torch.tensor(list(text.encode("utf-8")[:80_000]))
blocks = tokens.view(-1, 40)
train_blocks, test_blocks = blocks[:1800], blocks[1800:]


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def gpt2(width: int) -> GPT2LMHeadModel:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=width, n_layer=1, n_head=4, **dropout))


def perplexity(model: GPT2LMHeadModel) -> float:
    with torch.inference_mode():
        logits = model.cpu()(input_ids=test_blocks[:, :-1]).logits
    return math.exp(torch.nn.functional.cross_entropy(logits.transpose(1, 2), test_blocks[:, 1:]))


def options(epochs: int, rate: float) -> dict[str, object]:
    return {"epochs": epochs, "optimizer": {"name": "adamw", "lr": rate}, "clip": 1.0}


loader = DataLoader(list(train_blocks), batch_size=32, shuffle=True, collate_fn=collate)
teacher = stillhouse.distill(None, gpt2(64), loader, ["ce"], train=options(6, 5e-3))
objectives = [
    {"name": "ce", "weight": 0.5},
    {"name": "gkd", "beta": 0.0, "weight": 0.5},
]  # beta 0: forward KL, 1: reverse
student = stillhouse.distill(teacher, gpt2(16), loader, objectives, train=options(3, 1e-2))

print(f"perplexity of a byte: teacher {perplexity(teacher):.2f}, student {perplexity(student):.2f}")
student.save_pretrained("student")  # an ordinary transformers model
