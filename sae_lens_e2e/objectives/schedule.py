"""A coefficient that changes as training goes on."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Schedule:
    """A coefficient's values at fractions of the training done, as (fraction, value); linear in between.

    Before the first point it has the first's value, after the last the last's. The fraction is that of the whole run, from 0 to 1,
    whatever its stages. For a `..._coefficient` of an objective its points are enough: `E2E(kl_coefficient=[(0, 0.1), (0.5, 1)])`.
    Raises ValueError for points that are none, not in order, out of range, or no numbers.
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        if not isinstance(self.points, list | tuple) or not self.points:
            raise ValueError(f"{self.points!r} must be points (fraction, value), at least one")
        for point in self.points:
            if not isinstance(point, list | tuple) or len(point) != 2 or not all(map(_is_number, point)):
                raise ValueError(f"{point!r} is no point; write (fraction, value), such as (0.5, 1.0)")
            if not 0 <= point[0] <= 1:
                raise ValueError(f"the fraction {point[0]!r} must be between 0 and 1")
            if point[1] < 0:
                raise ValueError(f"the value {point[1]!r} must not be negative")
        fractions = [fraction for fraction, _ in self.points]
        if any(later <= earlier for earlier, later in pairwise(fractions)):
            raise ValueError(f"the fractions {fractions} must rise from point to point")
        # A frozen dataclass should be hashable, whatever kind of sequences it was given.
        object.__setattr__(self, "points", tuple((fraction, value) for fraction, value in self.points))

    def at(self, fraction: float) -> float:
        """The value when a fraction of the training is done."""
        after = bisect_right(self.points, fraction, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return float(self.points[min(after, len(self.points) - 1)][1])
        (start, low), (end, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (fraction - start) / (end - start)

    def to_list(self) -> list[list[float]]:
        """Its points, JSON-ready."""
        return [list(point) for point in self.points]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
