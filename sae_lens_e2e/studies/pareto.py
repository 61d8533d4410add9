"""Which SAEs are the best of their kind, and how the kinds compare at equal cost or at equal sparsity.

Braun et al. (2024), figures 1, 4 and 5: at the same CE loss increase, how many features does each objective need; at the same
L0, how much does each cost.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.studies.seeds import Spread, by_seed, differs_beyond_seeds

HEADLINE = (("l0", "ce_loss_increase"), ("n_alive", "ce_loss_increase"), ("ce_loss_increase", "l0"))
"""The paper's comparisons: a measure, and what it is compared at equal values of."""

FRONT = ("l0", "ce_loss_increase")


@dataclass(frozen=True)
class AtValue:
    """Two groups' measures where both have the same `value` of something else, and `ratio`, other / baseline.

    A measure is None where the value is outside its group's range; `reason` says so, and why there is no ratio. Of groups with several
    seeds they are the means, and `other_range` and `baseline_range` the lowest and highest of a seed.
    """

    value: float
    other: float | None
    baseline: float | None
    ratio: float | None
    reason: str | None = None
    other_range: tuple[float, float] | None = None
    baseline_range: tuple[float, float] | None = None
    beyond_seeds: bool | None = None
    """Whether the difference is larger than the larger of the two ranges; None where either group has one seed only."""


@dataclass(frozen=True)
class Comparison:
    """The `measure` of one group against that of another, `baseline`, at equal values of `equal`.

    `low` and `high` bound what both fronts cover, and `points` lie inside it unless they were asked for. `at_median` is at the
    median of those inside; None, with the `reason`, if there is none.
    """

    measure: str
    equal: str
    other: str
    baseline: str
    low: float | None
    high: float | None
    points: tuple[AtValue, ...]
    at_median: AtValue | None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "points": [asdict(point) for point in self.points]}


def pareto(frame: pd.DataFrame, x: str = "l0", y: str = "ce_loss_increase", group: str = "objective") -> pd.DataFrame:
    """The front of each group: its SAEs than which no other of the group is smaller in both `x` and `y`.

    `frame` is an `evaluation_frame`, one row an SAE. Gives those rows of it, group by group, by rising `x`. A group that is
    missing is named 'unknown'. Raises ValueError if a column is missing, there are no rows, a value is not finite, or the SAEs
    sit at different hooks or in different models.
    """
    checked = comparable(frame, x, y, group=group)
    return pd.concat([_front(rows, x, y) for _, rows in checked.groupby(group, sort=False)], ignore_index=True)


def compare_at_equal(
    frame: pd.DataFrame,
    other: str,
    baseline: str = "local",
    *,
    measure: str = "l0",
    equal: str = "ce_loss_increase",
    at: Sequence[float] | None = None,
    front: tuple[str, str] = FRONT,
    group: str = "objective",
) -> Comparison:
    """How much of `measure` one group has for each unit of another's, at equal values of `equal`.

    Each group's front is that of the two columns in `front`, of which `equal` is one; any measure is read along it, between
    its neighbouring SAEs. Interpolation is linear in the logarithm of `equal` and of the measure, each if all its values on
    both fronts are positive, and otherwise linear in the values. Nothing is extrapolated: outside of a group's range its
    measure is None, and the result says why.

    Where the frame has a column `seed`, and each seed of a group equally many SAEs (two or more), each seed has a front of its own, what
    is compared are the means over them, and `beyond_seeds` says whether the difference is larger than the seeds' range.

    Compared are the values in `at`, or else those of the baseline's own SAEs inside the overlap of the two fronts (of the
    other's, if the baseline has none there). Raises ValueError as `pareto` does, and for a group that is not in the frame.
    """
    if equal not in front:
        raise ValueError(
            f"equal={equal!r} is no axis of front={front}; give a front with it, as front=('l0', {equal!r})"
        )
    if other == baseline:
        raise ValueError(f"other={other!r} is the baseline itself; name another {group}")
    columns = list(dict.fromkeys((*front, measure)))
    checked = comparable(frame, *columns, group=group)
    groups = dict(iter(checked.groupby(group, sort=False)))
    for name in (other, baseline):
        if name not in groups:
            raise ValueError(f"there is no {group} {name!r} to compare; there are {', '.join(map(str, groups))}")
    fronts = {name: [_front(rows, *front) for rows in by_seed(groups[name])] for name in (other, baseline)}
    curves = _curves(fronts, equal, measure)
    reason = _incomparable(*curves[0], *curves[1])
    if reason is not None:
        points = tuple(AtValue(float(value), None, None, None, reason) for value in at or ())
        return Comparison(measure, equal, other, baseline, None, None, points, None, reason)
    low, high = _overlap(*curves[0], *curves[1])
    own = (
        sorted({float(value) for curve in of_group for value in curve.along if low <= value <= high})
        for of_group in reversed(curves)
    )
    values = next(filter(None, own)) if at is None else list(map(float, at))
    inside = [value for value in values if low <= value <= high]
    at_median = _at_value(median(inside), *curves) if inside else None
    reason = f"outside the range of both, {_range(low, high, equal)}" if at_median is None else at_median.reason
    points = tuple(_at_value(value, *curves) for value in values)
    return Comparison(measure, equal, other, baseline, low, high, points, at_median, reason)


def headline(frame: pd.DataFrame, baseline: str = "local", group: str = "objective") -> tuple[Comparison, ...]:
    """The paper's headline for every group against the baseline: L0 and alive features at equal CE increase, and that at equal L0.

    Raises ValueError as `compare_at_equal` does.
    """
    checked = comparable(frame, group=group)
    names = list(dict.fromkeys(checked[group]))
    if baseline not in names:
        raise ValueError(f"there is no {group} {baseline!r} to compare with; there are {', '.join(map(str, names))}")
    return tuple(
        compare_at_equal(frame, name, baseline, measure=measure, equal=equal, group=group)
        for name in names
        if name != baseline
        for measure, equal in HEADLINE
    )


def comparison_frame(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """Every value compared on a row, and a row with the reason for what could not be compared at all.

    Columns: measure, equal, other, baseline, value (of `equal`), other_value, baseline_value (of `measure`), ratio, is_median,
    reason, and of several seeds beyond_seeds, other_low, other_high, baseline_low and baseline_high. The median is a row of its own where no SAE has just this value.
    """
    rows = []
    for found in comparisons:
        of = {name: getattr(found, name) for name in ("measure", "equal", "other", "baseline")}
        points = list(found.points)
        if found.at_median is not None and found.at_median not in points:
            points.append(found.at_median)
        rows += [
            {
                **of,
                "value": point.value,
                "other_value": point.other,
                "baseline_value": point.baseline,
                "ratio": point.ratio,
                "is_median": point == found.at_median,
                "reason": point.reason,
                "beyond_seeds": point.beyond_seeds,
                **_bounds("other", point.other_range),
                **_bounds("baseline", point.baseline_range),
            }
            for point in points
        ] or [{**of, "is_median": False, "reason": found.reason}]
    numbers = ["value", "other_value", "baseline_value", "ratio"]
    ranges = [*_bounds("other", None), *_bounds("baseline", None)]
    columns = ["measure", "equal", "other", "baseline", *numbers, "is_median", "reason", "beyond_seeds", *ranges]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys([*numbers, *ranges], float))


def _bounds(of: str, bounds: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = bounds or (None, None)
    return {f"{of}_low": low, f"{of}_high": high}


def sentence(comparison: Comparison) -> str:
    """The comparison in words: 'At a CE loss increase of 0.12 nats, e2e_ds has 0.48 times the L0 of local.'"""
    found, other, baseline = comparison.at_median, comparison.other, comparison.baseline
    measure, equal = _noun(comparison.measure), _noun(comparison.equal)
    if found is None or found.ratio is None:
        return f"{other} and {baseline} cannot be compared in {measure} at equal {equal}: {comparison.reason}."
    article = "an" if equal.startswith(("L0", "a", "e", "i", "o")) else "a"
    value = f"{found.value:.3g}{_unit(comparison.equal)}"
    said = f"At {article} {equal} of {value}, {other} has {found.ratio:.2f} times the {measure} of {baseline}"
    if found.beyond_seeds is None:
        return f"{said}."
    return f"{said}, a difference {'larger' if found.beyond_seeds else 'no larger'} than the seeds’ range."


def comparable(frame: pd.DataFrame, *columns: str, group: str = "objective") -> pd.DataFrame:
    """The rows of an `evaluation_frame` if they can be compared in `columns`, a group that is missing named 'unknown'.

    Raises ValueError, naming the SAE or column, if one is missing or twice there, a value is not finite, or the SAEs sit at
    different hooks or in different models.
    """
    needed = dict.fromkeys(("sae", group, *columns, "hook_name", "model_name"))
    if missing := [name for name in needed if name not in frame]:
        raise ValueError(f"the frame has no column {', '.join(missing)}; give what evaluation_frame gives")
    if len(frame) == 0:
        raise ValueError("the frame has no rows; evaluate at least one SAE")
    if twice := [str(name) for name in frame["sae"][frame["sae"].duplicated()]]:
        raise ValueError(f"sae {twice[0]!r} is there twice; give each SAE a name of its own")
    for column in ("hook_name", "model_name"):
        # An SAE that does not say which model it is of was evaluated on the one it was given.
        sites: dict[object, object] = {}
        for sae, site in zip(frame["sae"], frame[column], strict=True):
            if not pd.isna(site):
                sites.setdefault(site, sae)
        if len(sites) > 1:
            named = ", ".join(f"{sae!r} has {site!r}" for site, sae in sites.items())
            raise ValueError(f"SAEs of different {column} cannot be compared: {named}; compare them apart")
    for column in columns:
        values = np.asarray(pd.to_numeric(frame[column], errors="coerce"), dtype=float)
        if not np.isfinite(values).all():
            sae = frame["sae"].iloc[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise ValueError(f"{column} of sae {sae!r} is not a finite number; leave that SAE out")
    return frame.assign(**{group: frame[group].where(frame[group].notna(), "unknown")})


@dataclass(frozen=True)
class _Curve:
    """The column `measure` of a group along its front, by rising values of the column `equal`."""

    group: str
    equal: str
    measure: str
    along: np.ndarray
    values: np.ndarray
    log_along: bool
    log_values: bool

    @property
    def low(self) -> float:
        return float(self.along[0])

    @property
    def high(self) -> float:
        return float(self.along[-1])

    def at(self, value: float) -> float | None:
        """By interpolation; None outside of the front's range."""
        if not self.low <= value <= self.high:
            return None
        along, values = self.along, self.values
        if self.log_along:
            value, along = math.log(value), np.log(along)
        found = float(np.interp(value, along, np.log(values) if self.log_values else values))
        return math.exp(found) if self.log_values else found


def _curves(fronts: Mapping[str, Sequence[pd.DataFrame]], equal: str, measure: str) -> list[list[_Curve]]:
    """For each group a curve a seed."""
    logs = [
        all(bool((rows[column] > 0).all()) for of_group in fronts.values() for rows in of_group)
        for column in (equal, measure)
    ]
    return [[_curve(name, rows, equal, measure, *logs) for rows in of_group] for name, of_group in fronts.items()]


def _curve(name: str, front: pd.DataFrame, equal: str, measure: str, log_along: bool, log_values: bool) -> _Curve:
    rows = front.drop_duplicates(equal).sort_values(equal)
    along, values = rows[equal].to_numpy(float), rows[measure].to_numpy(float)
    return _Curve(name, equal, measure, along, values, log_along, log_values)


def _front(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    ordered = rows.sort_values([x, y], kind="stable")
    lower = ordered[y] < ordered[y].cummin().shift(fill_value=math.inf)
    # SAEs equal in both do not beat each other.
    return ordered.loc[lower.groupby([ordered[x], ordered[y]]).transform("any")]


def _overlap(*curves: _Curve) -> tuple[float, float]:
    return max(curve.low for curve in curves), min(curve.high for curve in curves)


def _incomparable(*curves: _Curve) -> str | None:
    """Why two fronts have no range in common, if they have none."""
    for curve in curves:
        if len(curve.along) == 1:
            return f"the front of {curve.group} is a single point, which cannot be interpolated"
    low, high = _overlap(*curves)
    ranges = " and ".join(f"{curve.group} covers {_range(curve.low, curve.high, curve.equal)}" for curve in curves)
    return f"outside the range: {ranges}" if low > high else None


def _at_value(value: float, others: Sequence[_Curve], baselines: Sequence[_Curve]) -> AtValue:
    found, reference = _over_seeds(value, others), _over_seeds(value, baselines)
    if found is None or reference is None:
        reason = f"outside the range of both, {_range(*_overlap(*others, *baselines), others[0].equal)}"
        return AtValue(value, found and found.mean, reference and reference.mean, None, reason)
    of_other, of_baseline = ((one.low, one.high) if one.n > 1 else None for one in (found, reference))
    seeds = (of_other, of_baseline, differs_beyond_seeds(found, reference))
    if reference.mean <= 0 or found.mean < 0:
        curve, figure = (baselines[0], reference.mean) if reference.mean <= 0 else (others[0], found.mean)
        reason = f"{_noun(curve.measure)} of {curve.group} is {figure:.3g} there, of which no ratio can be taken"
        return AtValue(value, found.mean, reference.mean, None, reason, *seeds)
    return AtValue(value, found.mean, reference.mean, found.mean / reference.mean, None, *seeds)


def _over_seeds(value: float, curves: Sequence[_Curve]) -> Spread | None:
    """A group's measure; None outside of the range of any of its seeds."""
    found = [curve.at(value) for curve in curves]
    known = [one for one in found if one is not None]
    return Spread.of(known) if len(known) == len(found) else None


def _noun(column: str) -> str:
    return MEASURES[column].in_a_sentence if column in MEASURES else column


def _unit(column: str) -> str:
    return f" {MEASURES[column].unit}" if column in MEASURES and MEASURES[column].unit else ""


def _range(low: float, high: float, column: str) -> str:
    return f"{_noun(column)} {low:.3g} to {high:.3g}{_unit(column)}"
