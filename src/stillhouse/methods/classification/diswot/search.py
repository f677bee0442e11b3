"""A space of architectures given by genes, the scores of its members, and the search for the best: by evolution, at
random, or all of them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field

from stillhouse.config.reading import set_key
from stillhouse.config.specs import ModelSpec, Spec
from stillhouse.errors import UserError

Combine = Literal["sum", "semantic", "relation", "rank_sum", "parameters"]
Encoding = tuple[int, ...]
TRIES = 1000


class SpaceSpec(Spec):
    """A model of which some options are genes."""

    model: str = Field("stillhouse:resnet_stages", description="A network by name; it may itself be a gene.")
    options: dict[str, Any] = Field(
        default_factory=lambda: {"stem": 16, "widths": [16, 32, 64], "depths": [1, 1, 1]},
        description="Its options, before the genes are set.",
    )
    genes: dict[str, list[Any]] = Field(
        default_factory=lambda: {f"depths.{i}": [1, 3, 5, 7] for i in range(3)},
        description="Option (dotted; or `model`) -> choices. The default is S1: residual nets with 1, 3, 5 or 7 "
        "blocks in each of three stages.",
    )
    embedding: str | None = Field(
        None, description="The classifier submodule of the candidates, where it is not found by itself."
    )
    parameters: int | None = Field(None, ge=1, description="Budget: candidates with more parameters are out.")
    multiply_adds: int | None = Field(
        None, ge=1, description="Budget: candidates with more multiply-adds a sample are out."
    )


class Space:
    """The candidates of a spec; an encoding is the number of the choice for each gene."""

    def __init__(self, spec: SpaceSpec) -> None:
        if not spec.genes or not all(spec.genes.values()):
            raise UserError("space.genes: give at least one gene, each with at least one choice.")
        self.spec, self.choices = spec, list(spec.genes.values())

    def __len__(self) -> int:
        return math.prod(map(len, self.choices))

    def __iter__(self) -> Any:
        return itertools.product(*(range(len(c)) for c in self.choices))

    def model(self, encoding: Encoding) -> ModelSpec:
        """The network that an encoding stands for."""
        tree: dict[str, Any] = {"model": self.spec.model, "options": copy.deepcopy(self.spec.options)}
        for gene, choices, which in zip(self.spec.genes, self.choices, encoding):
            if gene == "model":
                tree["model"] = choices[which]
            else:
                set_key(tree["options"], gene, copy.deepcopy(choices[which]))
        return ModelSpec(**tree, embedding=self.spec.embedding)

    def values(self, encoding: Encoding) -> dict[str, Any]:
        """Gene -> choice."""
        return {gene: choices[which] for gene, choices, which in zip(self.spec.genes, self.choices, encoding)}

    def random(self, generator: np.random.Generator) -> Encoding:
        return tuple(int(generator.integers(len(c))) for c in self.choices)

    def mutate(self, encoding: Encoding, generator: np.random.Generator, genes: int = 1) -> Encoding:
        """Another choice for so many genes that have one."""
        free = [i for i, c in enumerate(self.choices) if len(c) > 1]
        out = list(encoding)
        for i in generator.permutation(free)[:genes]:
            out[i] = int((out[i] + generator.integers(1, len(self.choices[i]))) % len(self.choices[i]))
        return tuple(out)


@dataclass
class Candidates:
    """Candidates in the order in which they were scored, with both metrics (negative distances) and their sizes."""

    encodings: list[Encoding] = field(default_factory=list)
    semantic: list[float] = field(default_factory=list)
    relation: list[float] = field(default_factory=list)
    parameters: list[float] = field(default_factory=list)

    def add(self, encoding: Encoding, semantic: float, relation: float, parameters: float) -> None:
        self.encodings.append(encoding)
        self.semantic.append(semantic)
        self.relation.append(relation)
        self.parameters.append(parameters)

    def scores(self, combine: Combine, members: Sequence[int] | None = None) -> np.ndarray:
        """Higher is better, (n,); a score that is not a number is -inf. Ranks are among the members (default: all)."""
        at = np.arange(len(self.encodings)) if members is None else np.asarray(members)
        s, r, p = (finite(np.asarray(v)[at]) for v in (self.semantic, self.relation, self.parameters))
        if combine == "rank_sum":
            broken = np.isinf(s) | np.isinf(r)
            return np.where(broken, -np.inf, ranks(s) + ranks(r))
        return {"sum": s + r, "semantic": s, "relation": r, "parameters": p}[combine]


def finite(values: np.ndarray) -> np.ndarray:
    """NaN and infinities as -inf: the worst."""
    return np.where(np.isfinite(values), values, -np.inf)


def ranks(values: np.ndarray) -> np.ndarray:
    """0 for the worst; equal values share their mean rank."""
    from scipy.stats import rankdata

    return rankdata(values) - 1.0


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's rank correlation (tau-b) of two lists; NaN where one is constant."""
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)


def search(
    space: Space,
    score: Callable[[Encoding], tuple[float, float, float] | None],
    generator: np.random.Generator,
    *,
    how: Literal["evolution", "random", "all"] = "evolution",
    evaluations: int = 30,
    population: int = 512,
    initial: int = 10,
    parents: int | None = None,
    combine: Combine = "sum",
) -> tuple[Candidates, Encoding]:
    """Score candidates and return all of them with the best.

    Evolution: `initial` random members; then a parent, drawn from the whole population or from its best `parents`, has
    one gene changed (two once there are more than ten members), and while there are more than `population` members the
    worst goes. No candidate is scored twice.

    Args:
        score: encoding -> (semantic, relation, parameters), or None where it is over budget.
        evaluations: candidates to score.

    Raises:
        UserError: no candidate within budget in 1000 tries.
    """
    seen: set[Encoding] = set()
    found = Candidates()
    alive: list[int] = []

    def consider(encoding: Encoding) -> bool:
        if encoding in seen:
            return False
        seen.add(encoding)
        scored = score(encoding)
        if scored is None:
            return False
        found.add(encoding, *scored)
        alive.append(len(found.encodings) - 1)
        return True

    if how == "all":
        for encoding in space:
            consider(encoding)
    tries = 0
    while how != "all" and len(found.encodings) < evaluations and len(seen) < len(space) and tries < TRIES:
        if how == "random" or len(found.encodings) < initial:
            child = space.random(generator)
        else:
            ordered = np.array(alive)[np.argsort(-found.scores(combine, alive), kind="stable")]
            parent = found.encodings[int(generator.choice(ordered[:parents]))]
            child = space.mutate(parent, generator, 1 if len(alive) <= 10 else 2)
        tries = 0 if consider(child) else tries + 1
        while len(alive) > population:
            alive.pop(int(found.scores(combine, alive).argmin()))
    if not found.encodings:
        raise UserError(
            "diswot: no candidate of the space is within budget; raise space.parameters or space.multiply_adds."
        )
    return found, found.encodings[int(found.scores(combine).argmax())]
