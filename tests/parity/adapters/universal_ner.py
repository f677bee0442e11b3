"""The released scorer, and the tokens, labels and prompt of a conversation, against arrays of `universal_ner`."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from parity.case import Case
from stillhouse.data.conversations import Template, encoded, joined, turns_of
from stillhouse.methods.language.universal_ner.scoring import counted, strict


def evaluate(case: Case) -> None:
    read = {side: [strict(text) for text in json.loads(case.text(side))] for side in ("preds", "golds")}
    for side, items in read.items():
        plain = [[list(i) if isinstance(i, tuple) else i for i in row] for row in items]
        if f"parsed_{side}" in case:
            assert plain == json.loads(case.text(f"parsed_{side}")), side
    for name, value in counted(read["preds"], read["golds"]).items():
        case.close(name, np.float64(value), rtol=1e-9)


def instance_masking(case: Case) -> None:
    p, end = case.params, case.params.get("end", "</s>")
    turns = turns_of(json.loads(case.text("conversation")))
    order = list(range(1, len(turns)))
    random.seed(p["python_random_seed"])
    random.shuffle(order)
    case.close("query_order", np.array([0, *order]))

    def encoder(texts: list[str]) -> list[list[int]]:
        return [[byte + 3 for byte in text.encode()] for text in texts]

    template = Template(system=p["system_train"], spaced=False)
    ids, labels = joined(encoded(template.pieces([turns[i] for i in [0, *order]], end), encoder, [1]))
    length = p["model_max_length"]

    def row(values: list[int], fill: int) -> torch.Tensor:
        return torch.tensor([(values + [fill] * length)[:length]])

    case.close("input_ids", row(ids, 0))
    case.close("labels", row(labels, -100))
    case.close("attention_mask", row([1] * len(ids), 0))
    prompt = Template(system=p["system_inference"]).prompt(turns, end)
    if "inference_prompt" in case:
        assert prompt == case.text("inference_prompt"), prompt


ADAPTERS = {"evaluate": evaluate, "instance_masking": instance_masking}
