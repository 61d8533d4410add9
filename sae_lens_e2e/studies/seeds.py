"""How much of a difference may be chance: means and ranges over SAEs that differ in their seed only."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

SEED = "seed"
"""The column of a frame that has it."""


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    n: int
    """How many seeds."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The mean and range of one figure a seed."""
        return cls(sum(values) / len(values), min(values), max(values), len(values))


def differs_beyond_seeds(one: Spread, other: Spread) -> bool | None:
    """Whether two means are further apart than the larger of the two ranges over seeds; None if either has one seed only."""
    if min(one.n, other.n) < 2:
        return None
    return abs(one.mean - other.mean) > max(one.high - one.low, other.high - other.low)


def by_seed(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each seed, where all seeds have equally many, and at least two; else all rows, in one."""
    if SEED not in rows or rows[SEED].isna().any():
        return [rows]
    found = [of_seed for _, of_seed in rows.groupby(SEED)]
    sizes = {len(of_seed) for of_seed in found}
    return found if len(sizes) == 1 and min(sizes) > 1 else [rows]


def spreads(frame: pd.DataFrame, by: str, measures: Sequence[str]) -> dict[str, dict[str, Spread]]:
    """For each value of the column `by`, in their order, every measure over its rows, which differ in their seed only."""
    return {
        str(kind): {measure: Spread.of([float(value) for value in rows[measure]]) for measure in measures}
        for kind, rows in frame.groupby(by, sort=False)
    }
