"""Combinations of settings in which every two values meet once, where all of them would be too many."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value an axis, in which every pair of values of two axes occurs, and each about as often as others."""
    rows = list(product(*(range(len(axis)) for axis in axes)))
    left = {pair for row in rows for pair in _pairs(row)}
    used: Counter[Any] = Counter()
    chosen: list[tuple[int, ...]] = []
    while left:
        best = max(rows, key=lambda row: (len(left & _pairs(row)), -sum(used[pair] for pair in _pairs(row))))
        chosen.append(best)
        left -= _pairs(best)
        used.update(_pairs(best))
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in chosen]


def _pairs(row: tuple[int, ...]) -> set[Any]:
    return set(combinations(enumerate(row), 2))
