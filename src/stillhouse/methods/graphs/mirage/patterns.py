"""Frequent itemsets, exact, in falling order of support: the sets of tree classes that occur together in at least so
many graphs.

Best first: a set is extended by the items after its last, and no extension has more support than it; so a heap by
support hands out sets from the most frequent down, and mining may stop at a support, at a count, or whenever enough has
been taken. Transactions are bits of integers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Patterns:
    """Itemsets, most frequent first, with how many transactions hold each; `truncated` where a cap cut the list
    short."""

    itemsets: list[tuple[int, ...]]
    support: list[int]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.itemsets)


def frequent(
    transactions: Sequence[frozenset[int]], threshold: int, longest: int | None = None
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Every non-empty itemset that at least `threshold` transactions hold, with its support; largest support first,
    then shorter, then smaller items.

    Args:
        transactions: the items of each.
        threshold: theta, at least 1.
        longest: itemsets have at most so many items.

    Raises:
        UserError: a threshold below 1.
    """
    if threshold < 1:
        raise UserError(f"mirage: a support threshold must be at least 1 graph; given: {threshold}.")
    if longest is not None and longest < 1:
        raise UserError(f"mirage: itemsets must have at least 1 item; given: {longest}.")
    holders: dict[int, int] = {}
    for number, items in enumerate(transactions):
        for item in items:
            holders[item] = holders.get(item, 0) | (1 << number)
    singles = sorted((i, bits) for i, bits in holders.items() if bits.bit_count() >= threshold)
    heap: list[tuple[int, int, tuple[int, ...], int, int]] = [
        (-bits.bit_count(), 1, (item,), at, bits) for at, (item, bits) in enumerate(singles)
    ]
    heapq.heapify(heap)
    while heap:
        negative, length, itemset, last, bits = heapq.heappop(heap)
        yield itemset, -negative
        if length == longest:
            continue
        for at in range(last + 1, len(singles)):
            both = bits & singles[at][1]
            count = both.bit_count()
            if count >= threshold:
                heapq.heappush(heap, (-count, length + 1, (*itemset, singles[at][0]), at, both))


def mine(
    transactions: Sequence[frozenset[int]], threshold: int, *, longest: int | None = None, most: int | None = None
) -> Patterns:
    """All frequent itemsets; with `most`, the most frequent so many, and `truncated`: there are others.

    See `frequent`.
    """
    found: list[tuple[tuple[int, ...], int]] = []
    for pattern in frequent(transactions, threshold, longest):
        if most is not None and len(found) == most:
            return Patterns([p for p, _ in found], [s for _, s in found], True)
        found.append(pattern)
    return Patterns([p for p, _ in found], [s for _, s in found])


def without_shared(patterns: Sequence[Patterns]) -> list[Patterns]:
    """Each class's patterns without those that are frequent in another class as well."""
    seen: dict[tuple[int, ...], int] = {}
    for one in patterns:
        for items in one.itemsets:
            seen[items] = seen.get(items, 0) + 1
    out = []
    for one in patterns:
        kept = [(p, s) for p, s in zip(one.itemsets, one.support) if seen[p] == 1]
        out.append(Patterns([p for p, _ in kept], [s for _, s in kept], one.truncated))
    return out
