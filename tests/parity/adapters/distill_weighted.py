"""PARC with exact ties, against the arrays of `distill_weighted`."""

from __future__ import annotations

import torch

from parity.case import Case
from stillhouse.methods.classification.distill_weighted import parc


def scores(case: Case) -> None:
    labels = case["labels"].numpy()
    found = torch.tensor([parc(features.numpy(), labels) for features in case["features"]], dtype=torch.float64)
    name = "parc_exact_ties" if "parc_exact_ties" in case else "parc"
    case.close(name, found, rtol=0, atol=1e-6)


ADAPTERS = {"parc": scores}
