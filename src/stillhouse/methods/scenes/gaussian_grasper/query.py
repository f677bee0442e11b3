"""Open-vocabulary queries: the relevancy of lifted features for a text, as LERF (arXiv 2303.09553) scores it, and the
points of the object that is found."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.data.source import located
from stillhouse.errors import UserError
from stillhouse.models.sources import from_transformers
from stillhouse.models.tokenizer import texts_padded, tokenizer
from stillhouse.randomness import generator

CANONICAL = ("object", "things", "stuff", "texture")
LONGEST = 64


@torch.no_grad()
def text_vectors(texts: list[str], encoder: ModelSpec | None, root: Path, dim: int = 384) -> Tensor:
    """(T, D) of length 1: the encoder's mean over the tokens of each text; without one, a fixed random vector for each
    text, which knows no likeness.

    Raises:
        UserError: an encoder that is none of transformers.
    """
    if encoder is None:
        rows = [torch.randn(dim, generator=generator("text", text)) for text in texts]
        return F.normalize(torch.stack(rows), dim=-1)
    name = located({"model": encoder.model}, root)["model"]
    if not name.startswith("hf:"):
        raise UserError(f"language.model: '{name}' is no text encoder; name one of transformers, hf:PATH.")
    network = from_transformers(name.removeprefix("hf:"), None, None, {"task": "features"}, encoder.pretrained).eval()
    batch = texts_padded(tokenizer(name), texts, LONGEST)
    hidden = network(**batch).last_hidden_state
    inside = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * inside).sum(1) / inside.sum(1), dim=-1)


def relevancy(lifted: Tensor, query: Tensor, canonical: Tensor, temperature: float = 10.0) -> Tensor:
    """(...) in [0, 1]: the least, over canonical phrases c, of exp(t v q) / (exp(t v q) + exp(t v c)).

    Args:
        lifted: (..., D), made of length 1 here.
        query: (D,) of length 1.
        canonical: (C, D) of length 1.
    """
    v = F.normalize(lifted, dim=-1, eps=1e-12)
    return torch.sigmoid(temperature * ((v @ query)[..., None] - v @ canonical.T)).amin(-1)


def largest_part(points: Tensor, radius: float = 0.02) -> Tensor:
    """(P,) bool: which of the points (P, 3) are in the largest part whose points lie within `radius` of another."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    if not len(points):
        return torch.zeros(0, dtype=torch.bool)
    pairs = cKDTree(points.detach().cpu().double().numpy()).query_pairs(radius, output_type="ndarray")
    ones = torch.ones(len(pairs)).numpy()
    graph = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(len(points), len(points)))
    part = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    return part == torch.bincount(part).argmax()
