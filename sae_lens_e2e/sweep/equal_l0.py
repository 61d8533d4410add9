"""Candidates that came out with different L0, compared as if they had the same: what costs less only because more fires is no better."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

Score = Mapping[str, float]
"""A candidate's `ce_loss_increase`, in nats, and its `l0` where that is known."""

SAME_L0 = 0.05
"""Up to this part of each other, two L0 are taken to be one."""


def slope(curves: Iterable[Sequence[Score]]) -> float | None:
    """How steeply the CE loss increase falls with L0: −d log CE / d log L0 within the curves, pooled; None if they do not say.

    Each curve is of candidates that differ in their sparsity only.
    """
    points = [[_log(score) for score in curve] for curve in curves]
    centred = list(chain.from_iterable(map(_centred, points)))
    along = sum(x * x for x, _ in centred)
    return max(-sum(x * y for x, y in centred) / along, 0.0) if along > 0 else None


def costs(scores: Mapping[float, Score], steepness: float | None) -> dict[float, float]:
    """By learning rate, what each of a kind's candidates would cost at the L0 that is the geometric mean of theirs, in nats."""
    if steepness is None or differ_in_l0(scores.values()) is None:
        return {lr: score["ce_loss_increase"] for lr, score in scores.items()}
    middle = math.exp(sum(math.log(score["l0"]) for score in scores.values()) / len(scores))
    return {lr: score["ce_loss_increase"] * (score["l0"] / middle) ** steepness for lr, score in scores.items()}


def differ_in_l0(scores: Iterable[Score]) -> tuple[float, float] | None:
    """The lowest and highest L0 of candidates, if they are not one; None where it is not known."""
    found = [score.get("l0", 0.0) for score in scores]
    if not found or min(found) <= 0 or max(found) <= (1 + SAME_L0) * min(found):
        return None
    return min(found), max(found)


def _log(score: Score) -> tuple[float, float]:
    return math.log(score["l0"]), math.log(score["ce_loss_increase"])


def _centred(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    x, y = (sum(values) / len(curve) for values in zip(*curve, strict=True)) if curve else (0.0, 0.0)
    return [(one - x, other - y) for one, other in curve]
