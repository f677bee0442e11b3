"""Claims of a recipe and their verdicts: whether the figures over seeds show what the paper says.

A comparison is shown where the 95 % t interval of the difference, paired by seed and positive where the row is
better, lies above max(by, 0), and contradicted where it lies below 0. With `within` both bars are -within. A bound is
shown where the interval of the mean lies on its side of the bound, and contradicted where it lies on the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from stillhouse import catalog
from stillhouse.config.messages import spell
from stillhouse.config.reading import named_values, variants_of
from stillhouse.config.specs import ClaimSpec
from stillhouse.errors import UserError, nearest, unknown
from stillhouse.evaluation.quantities import known, known_names, quantity
from stillhouse.evaluation.statistics import mean, mean_interval, paired_difference
from stillhouse.reporting.rows import unequal
from stillhouse.reporting.verdicts import CONTRADICTED, NOT_MEASURED, NOT_SHOWN, SHOWN, Verdict, better

BASE = "base"
"""The name of the row without a variant, as `stillhouse bench --variants` takes it."""

Rows = Sequence[Mapping[str, Any]]


def read_claims(tree: Mapping[str, Any], where: str = "recipe") -> list[ClaimSpec]:
    """The claims of a raw recipe.

    Raises:
        UserError: a key, row or figure that does not exist, with the nearest that does; a figure without a better
            direction.
    """
    variants_of(tree, where)
    named_values(tree, "groups", where)
    given = tree.get("claims")
    if given is not None and not isinstance(given, list):
        wanted = "each entry has says, figure, of, and one of over, at_least, at_most"
        raise UserError(f"{where}: 'claims' must be a list; {wanted}.")
    claims = []
    for i, entry in enumerate(given or ()):
        try:
            claim = ClaimSpec.model_validate(entry)
        except ValidationError as error:
            raise spell(error, ClaimSpec, where, ["claims", i]) from None
        _check(claim, tree, f"{where}: claims.{i}")
        claims.append(claim)
    return claims


def _check(claim: ClaimSpec, tree: Mapping[str, Any], where: str) -> None:
    if not known(claim.figure) and claim.better is None:
        error = unknown("figure", claim.figure, known_names())
        raise UserError(f"{where}.figure: {error} A figure of your own needs `better: higher` or `better: lower`.")
    if claim.paper is not None and claim.paper not in catalog.cards():
        raise UserError(f"{where}.paper: {unknown('card', claim.paper, catalog.cards())}")
    if claim.over is not None and not better(claim.figure, claim.better):
        hint = "add `better: higher` or `better: lower`"
        raise UserError(f"{where}: '{claim.figure}' has no direction that is better; {hint}.")
    variants, groups = _variants(tree), _groups(tree)
    for key in ("of", "over"):
        name = getattr(claim, key)
        if name is None:
            continue
        row = row_name(name, tree)
        if row.variant not in variants:
            close = nearest(row.variant, variants)
            hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(variants)}."
            raise UserError(f"{where}.{key}: no row '{name}'; {hint}")
        if row.group is not None and row.group not in groups:
            raise UserError(f"{where}.{key}: {unknown('group', row.group, groups)}")
    groups_of = [None if name is None else row_name(name, tree).group for name in (claim.of, claim.over)]
    if groups_of[0] is None and groups_of[1] is not None:
        raise UserError(f"{where}: `over` names a group, so `of` must too, as VARIANT/GROUP.")


def _variants(tree: Mapping[str, Any]) -> list[str]:
    return [BASE, *(tree.get("variants") or {})]


def _groups(tree: Mapping[str, Any]) -> list[str]:
    """The names of a recipe's groups, in order."""
    return [str(name) for values in (tree.get("groups") or {}).values() for name in values]


@dataclass(frozen=True)
class RowName:
    """A row of a comparison: its variant, and its group where there are groups."""

    variant: str
    group: str | None


def row_name(name: str, tree: Mapping[str, Any]) -> RowName:
    """`VARIANT`, or `VARIANT/GROUP` of a recipe that has groups."""
    groups = _groups(tree)
    variant, slash, group = name.rpartition("/")
    return RowName(variant, group) if slash and groups else RowName(name, None)


def judge(tree: Mapping[str, Any], evidence: Mapping[str, Rows], where: str = "recipe") -> list[Verdict]:
    """The verdicts of a recipe's claims, in order; of a claim that names no group, one for every group of the recipe.

    Args:
        tree: the recipe, raw.
        evidence: rows that this recipe gave, as in the results of a bench, by the name of the comparison that they
            are in. Each claim is judged within one comparison: the one with the most seeds of both rows.
    """
    out = []
    for claim in read_claims(tree, where):
        for of, over in _pairs(claim, tree):
            per_file = [(_judge(claim, of, over, tree, rows), name) for name, rows in evidence.items()]
            verdict, name = max(per_file, key=lambda v: v[0].seeds, default=(_without_rows(claim, of.group), ""))
            out.append(replace(verdict, evidence=name or None) if verdict.seeds else verdict)
    return out


def _pairs(claim: ClaimSpec, tree: Mapping[str, Any]) -> Iterator[tuple[RowName, RowName | None]]:
    """The rows that a claim compares, group by group."""
    groups = _groups(tree)
    of, over = row_name(claim.of, tree), None if claim.over is None else row_name(claim.over, tree)
    for group in [of.group] if of.group is not None or not groups else groups:
        yield replace(of, group=group), over if over is None or over.group is not None else replace(over, group=group)


def _judge(claim: ClaimSpec, of: RowName, over: RowName | None, tree: Mapping[str, Any], rows: Rows) -> Verdict:
    verdict, scale = _without_rows(claim, of.group), quantity(claim.figure).scale
    mine, other = _find(of, tree, rows), None if over is None else _find(over, tree, rows)
    values = _values(mine, claim.figure)
    if over is None:
        return _against_bound(claim, verdict, [scale * v for v in values.values()])
    theirs = _values(other, claim.figure)
    both = sorted(set(values) & set(theirs))
    if mine is None or other is None or not both:
        return verdict
    sign = scale * better(claim.figure, claim.better)
    gain = paired_difference([sign * values[s] for s in both], [sign * theirs[s] for s in both])
    verdict = replace(verdict, verdict=NOT_SHOWN, mean=gain.mean, seeds=gain.n, note=None)
    reason = unequal(mine, other) or varied_network(mine) or varied_network(other)
    if reason or math.isnan(gain.low):
        return replace(verdict, note=f"No interval: {reason}" if reason else "No interval: one seed")
    high_bar, low_bar = (max(claim.by, 0.0), 0.0) if claim.within is None else (-claim.within, -claim.within)
    word = SHOWN if gain.low > high_bar else CONTRADICTED if gain.high < low_bar else NOT_SHOWN
    if word == NOT_SHOWN and gain.mean > high_bar and claim.because is None:
        verdict = replace(verdict, note="The mean is above what is asked, so more seeds may decide it")
    because = None if word == SHOWN else claim.because
    return replace(verdict, verdict=word, low=gain.low, high=gain.high, because=because)


def _without_rows(claim: ClaimSpec, group: str | None) -> Verdict:
    note = None if claim.because else "There are no results of these rows yet"
    return Verdict(**claim.model_dump(exclude={"better"}), group=group, verdict=NOT_MEASURED, note=note)


def _against_bound(claim: ClaimSpec, verdict: Verdict, values: Sequence[float]) -> Verdict:
    if not values:
        return verdict
    low, high = mean_interval(values)
    verdict = replace(verdict, verdict=NOT_SHOWN, mean=mean(values), seeds=len(values), note=None)
    if math.isnan(low):
        return replace(verdict, note="No interval: one seed")
    if claim.at_least is not None:
        word = SHOWN if low >= claim.at_least else CONTRADICTED if high < claim.at_least else NOT_SHOWN
    else:
        assert claim.at_most is not None, "one of over, at_least, at_most is given"
        word = SHOWN if high <= claim.at_most else CONTRADICTED if low > claim.at_most else NOT_SHOWN
    return replace(verdict, verdict=word, low=low, high=high, because=None if word == SHOWN else claim.because)


def _find(name: RowName, tree: Mapping[str, Any], rows: Rows) -> Mapping[str, Any] | None:
    """The row of a name; the recipe itself, and a variant that overrides nothing, are one row."""
    variants = tree.get("variants") or {}
    plain = lambda variant: BASE if variant is None or not variants.get(variant, True) else variant  # noqa: E731
    group = None if name.group is None else str(name.group)
    return next((r for r in rows if plain(r.get("variant")) == plain(name.variant) and r.get("group") == group), None)


def _values(row: Mapping[str, Any] | None, figure: str) -> dict[int, float]:
    """The values of a figure by seed, without failed ones."""
    if row is None:
        return {}
    pairs = zip(row["seeds"], row["metrics"].get(figure) or ())
    return {seed: float(v) for seed, v in pairs if v is not None and not math.isnan(v)}


def varied_network(row: Mapping[str, Any]) -> str | None:
    """Why the seeds of a row are not one network; None where they are, or where the row's method searches for its
    network."""
    counts = sorted(set(row["metrics"].get("parameters") or ()))
    if len(counts) < 2 or row.get("searches"):
        return None
    span = f"from {counts[0]:,.0f} to {counts[-1]:,.0f} parameters"
    return f"the network of '{row['label']}' differs between seeds, {span}"
