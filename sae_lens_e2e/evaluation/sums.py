"""Sums over a stream of tokens, in float64, that take the same memory however many tokens there are."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


class TokenSums:
    """Means of named per-token values over any number of batches."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Float[Tensor, "tokens"]]) -> None:
        """Add one batch: for each name the values of its tokens, of which one name may have fewer than another."""
        for name, per_token in values.items():
            self._totals[name] = self._totals.get(name, 0.0) + float(_float64(per_token).sum())
            self._counts[name] = self._counts.get(name, 0) + len(per_token)

    def total(self, name: str) -> float:
        """Σ over the tokens that have this value; 0 if none does."""
        return self._totals.get(name, 0.0)

    def mean(self, name: str) -> float | None:
        """The mean over the tokens that have this value; None if none does."""
        count = self._counts.get(name, 0)
        return self._totals[name] / count if count else None


class TotalVariance:
    """Σ ‖x - mean‖² over all tokens seen: what explained variance is a fraction of.

    Batches are merged by their means and sums of squares about them (Chan, Golub and LeVeque 1979), which loses nothing when
    activations have a mean much larger than their spread, where E‖x‖² - ‖E x‖² would.
    """

    def __init__(self) -> None:
        self.sum_of_squares = 0.0
        self._mean: Tensor | None = None
        self._count = 0

    def add(self, x: Float[Tensor, "tokens d"]) -> None:
        """Add one batch of at least one token."""
        mean = _float64(x).mean(0)
        about_mean = float(_float64((x - mean.to(x.device, x.dtype)).square().sum(-1)).sum())
        if self._mean is None:
            self._mean = torch.zeros_like(mean)
        count = self._count + len(x)
        moved = mean - self._mean
        self.sum_of_squares += about_mean + float(moved.square().sum()) * self._count * len(x) / count
        self._mean += moved * (len(x) / count)
        self._count = count

    def explained(self, squared_error: float) -> float:
        """1 - Σ residual² / Σ (x - mean)². As in SAELens, activations that do not vary are explained wholly or not at all."""
        if self.sum_of_squares == 0:
            return 1.0 if squared_error == 0 else 0.0
        return 1 - squared_error / self.sum_of_squares


def at_least_float32(x: Tensor) -> Tensor:
    """Low-precision activations in float32, for what is computed of each token; others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _float64(x: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)
