"""Sums over a stream of tokens that take the same memory however many tokens there are.

They stay on the device that the values are on, in float64, and are read once, when a figure is asked for: a read makes the host
wait for everything that the device has yet to do.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


class TokenSums:
    """Means of named per-token values over any number of batches."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Float[Tensor, "tokens"]]) -> None:
        """Add one batch: for each name the values of its tokens, of which one name may have fewer than another."""
        for name, per_token in values.items():
            total = wide(per_token).sum()
            self._totals[name] = self._totals[name] + total if name in self._totals else total
            self._counts[name] = self._counts.get(name, 0) + len(per_token)

    def total(self, name: str) -> float:
        """Σ over the tokens that have this value; 0 if none does."""
        return float(self._totals.get(name, 0.0))

    def mean(self, name: str) -> float:
        """The mean over the tokens that have this value, of which there is at least one."""
        return self.total(name) / self._counts[name]

    def mean_if_any(self, name: str) -> float | None:
        """The same, or None if no token has this value."""
        return self.mean(name) if self._counts.get(name) else None


class TotalVariance:
    """Σ ‖x - mean‖² over all tokens seen: what explained variance is a fraction of.

    Batches are merged by their means and sums of squares about them (Chan, Golub and LeVeque 1979), which loses nothing when
    activations have a mean much larger than their spread, where E‖x‖² - ‖E x‖² would.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._mean: Tensor | None = None
        self._count = 0

    def add(self, x: Float[Tensor, "tokens d"]) -> None:
        """Add one batch of at least one token."""
        mean = wide(x).mean(0)
        about_mean = wide((x - mean.to(x.dtype)).square().sum(-1)).sum()
        if self._mean is None or self._total is None:
            self._mean, self._total = torch.zeros_like(mean), torch.zeros_like(about_mean)
        count = self._count + len(x)
        moved = mean - self._mean
        self._total = self._total + about_mean + moved.square().sum() * (self._count * len(x) / count)
        self._mean = self._mean + moved * (len(x) / count)
        self._count = count

    @property
    def sum_of_squares(self) -> float:
        """Σ ‖x - mean‖²; 0 before anything is added."""
        return 0.0 if self._total is None else float(self._total)

    def explained(self, squared_error: float) -> float:
        """1 - Σ residual² / Σ (x - mean)². As in SAELens, activations that do not vary are explained wholly or not at all."""
        if self.sum_of_squares == 0:
            return 1.0 if squared_error == 0 else 0.0
        return 1 - squared_error / self.sum_of_squares


def at_least_float32(x: Tensor) -> Tensor:
    """Low-precision activations in float32, for what is computed of each token; others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide(x: Tensor) -> Tensor:
    """Values as they are summed: in float64, or float32 on Apple's GPUs, which have no other."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
