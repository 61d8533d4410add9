"""A figure as data: panels of lines and points on axes, before anything is drawn of it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sae_lens_e2e.figures.names import tick_number
from sae_lens_e2e.figures.style import Style

# Values that spread over more than this factor are shown on a logarithmic axis.
_WIDE = 30
# From here on, a logarithmic axis has ticks at powers of ten only.
_MANY_TICKS = 300


@dataclass(frozen=True)
class Axis:
    """One axis: its label with the unit, and its scale.

    `ticks` are positions with their labels, if these are not the numbers; `from_zero` says that 0 is on it; `reference` is a
    value worth a thin line across.
    """

    label: str
    scale: Literal["linear", "log"] = "linear"
    from_zero: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None
    reference: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together, drawn in one style and named once in the legend.

    `kind` is a line with markers, points alone, or the steps of a histogram, of which `x` are the edges and `y` the heights,
    the last one twice. `hover` has a text for each point. `faint` is for single SAEs behind the mean of many, `hollow` for
    points that are not the best of their kind.
    """

    label: str
    style: Style
    x: tuple[float, ...]
    y: tuple[float, ...]
    hover: tuple[str, ...]
    kind: Literal["line", "points", "steps"] = "line"
    faint: bool = False
    hollow: bool = False
    in_legend: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes and what is on them."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]

    def ticks(self, name: Literal["x", "y"]) -> tuple[tuple[float, str], ...] | None:
        """Where the ticks of an axis are, and what they say; None for a linear axis that leaves it to the library."""
        axis: Axis = getattr(self, name)
        if axis.ticks is not None or axis.scale == "linear":
            return axis.ticks
        values = [value for series in self.series for value in getattr(series, name)]
        if not values:
            return None
        return tuple((value, tick_number(value)) for value in _round_numbers(min(values), max(values)))


def _round_numbers(low: float, high: float) -> list[float]:
    """Powers of ten around a range, with twice and five times each if the range is small."""
    within = (1.0, 2.0, 5.0) if high < _MANY_TICKS * low else (1.0,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [x for x in (m * 10.0**power for power in powers for m in within) if low / 2 <= x <= 2 * high]


def scaled_axis(label: str, values: Iterable[float], from_zero: bool = True) -> Axis:
    """An axis from zero, or a logarithmic one if the values are all positive and spread widely."""
    known = [value for value in values if math.isfinite(value)]
    if known and min(known) > 0 and max(known) > _WIDE * min(known):
        return Axis(label, "log")
    return Axis(label, from_zero=from_zero and bool(known) and min(known) >= 0)
