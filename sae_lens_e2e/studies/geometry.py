"""How a dictionary lies in its space: each feature's cosine similarity to the nearest of its own kind, or of another's.

Braun et al. (2024), figure 3. Two dictionaries of 46,080 features have two thousand million similarities; they are worked
through a square tile at a time, and only each feature's largest is kept.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

Kind = Literal["same dictionary", "another seed", "another kind"]

# The side of a tile of cosine similarities: 16 MB in float32, large enough for matrix multiplication at full speed.
CHUNK_SIZE = 2048
_DRAWS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Interval:
    """A mean, and the bounds of its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Geometry:
    """How near the features of a dictionary have their nearest neighbour, in the same dictionary or in another.

    `cosines[i]` is the largest cosine similarity of feature `features[i]` to any that it was compared with, and `interval` their
    mean with its 95 % bootstrap interval. Dead features are left out on both sides.
    """

    kind: Kind
    compared_with: str
    d_sae: int
    interval: Interval
    features: tuple[int, ...]
    cosines: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, from which `from_dict` makes it again."""
        return {**asdict(self), "features": list(self.features), "cosines": list(self.cosines)}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Geometry":
        """The result that `to_dict` was called on."""
        lists = {name: tuple(figures[name]) for name in ("features", "cosines")}
        return cls(**{**figures, **lists, "interval": Interval(**figures["interval"])})


def geometry(
    sae: SAE[Any],
    *,
    alive: Bool[Tensor, "d_sae"] | None = None,
    chunk_size: int = CHUNK_SIZE,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Geometry:
    """How orthogonal an SAE's features are: each one's largest cosine similarity to another (figure 3a).

    `alive` (d_sae,) says which features count; without it, all whose decoder row is not zero. `n_resamples` and `seed` are the
    bootstrap's. Raises ValueError as `nearest_cosines` does.
    """
    _check_resampling(n_resamples)
    cosines = nearest_cosines(sae.W_dec, alive=alive, chunk_size=chunk_size)
    interval = bootstrap_mean(cosines, n_resamples, seed)
    return _geometry("same dictionary", "itself", interval, live_features(sae.W_dec, alive), cosines, sae)


def compare(
    sae: SAE[Any],
    other: SAE[Any],
    *,
    compared_with: str,
    kind: Kind,
    alive: Bool[Tensor, "d_sae"] | None = None,
    other_alive: Bool[Tensor, "d_other"] | None = None,
    chunk_size: int = CHUNK_SIZE,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Geometry:
    """Whether an SAE's features are found again in another: its seed changed (figure 3b), or its objective (figure 3c).

    `compared_with` and `kind` name the other one in the result. The rest is as for `geometry`; the two sides are not
    interchangeable.
    """
    _check_resampling(n_resamples)
    cosines = nearest_cosines(sae.W_dec, other.W_dec, alive=alive, other_alive=other_alive, chunk_size=chunk_size)
    interval = bootstrap_mean(cosines, n_resamples, seed)
    return _geometry(kind, compared_with, interval, live_features(sae.W_dec, alive), cosines, sae)


def geometry_difference(first: Geometry, second: Geometry, n_resamples: int = 1000, seed: int = 0) -> Interval:
    """How much nearer the features of one dictionary have their neighbours than another's, as the paper's 'local − e2e+ds'."""
    return bootstrap_difference(torch.tensor(first.cosines), torch.tensor(second.cosines), n_resamples, seed)


def geometry_frame(results: Mapping[str, Geometry | Iterable[Geometry]]) -> pd.DataFrame:
    """Every feature of every SAE, by name, on a row: sae, compared_with, kind, feature, cosine."""
    frames = [pd.DataFrame(columns=["sae", "compared_with", "kind", "feature", "cosine"])]
    for name, found in _named(results):
        values = {"feature": found.features, "cosine": found.cosines}
        frames.append(pd.DataFrame({"sae": name, "compared_with": found.compared_with, "kind": found.kind, **values}))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def geometry_summary(results: Mapping[str, Geometry | Iterable[Geometry]]) -> pd.DataFrame:
    """Every comparison of every SAE, by name, on a row: its mean with its 95 % bootstrap interval, and how many features."""
    return pd.DataFrame(
        [
            {
                "sae": name,
                "compared_with": found.compared_with,
                "kind": found.kind,
                "n_features": len(found.features),
                "d_sae": found.d_sae,
                **asdict(found.interval),
            }
            for name, found in _named(results)
        ]
    )


def nearest_cosines(
    W_dec: Float[Tensor, "d_sae d_in"],
    other: Float[Tensor, "d_other d_in"] | None = None,
    *,
    alive: Bool[Tensor, "d_sae"] | None = None,
    other_alive: Bool[Tensor, "d_other"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Float[Tensor, "n_live"]:
    """Each live feature's largest cosine similarity to a live one of `other`, or to another of its own dictionary.

    In the order of `live_features(W_dec, alive)`, in float32 or better whatever the weights are. Beside the unit vectors, no
    more than `chunk_size` x `chunk_size` similarities are held. Raises ValueError if the two do not fit, a dictionary has no
    live feature, or is to be compared with itself and has one only.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if other is None and other_alive is not None:
        raise ValueError("other_alive was given without other; leave it out, or pass the other dictionary")
    rows = unit_vectors(W_dec, alive)
    columns = rows if other is None else unit_vectors(other, other_alive, "other").to(rows)
    if columns.shape[1] != rows.shape[1]:
        raise ValueError(f"W_dec is {rows.shape[1]} wide and other {columns.shape[1]}; compare SAEs of the same hook")
    if other is None and len(rows) == 1:
        raise ValueError(
            "W_dec has one live feature, which has no other to be near to; compare it with another dictionary"
        )
    nearest = rows.new_full((len(rows),), -torch.inf)
    with torch.autocast(rows.device.type, enabled=False):
        for i, row_tile in _tiles(rows, chunk_size):
            for j, column_tile in _tiles(columns, chunk_size):
                if other is None and j.start < i.start:
                    continue  # seen from the other side
                cosines = row_tile @ column_tile.T
                if other is None and i == j:
                    cosines.fill_diagonal_(-torch.inf)
                nearest[i] = torch.maximum(nearest[i], cosines.amax(1))
                if other is None and i != j:
                    nearest[j] = torch.maximum(nearest[j], cosines.amax(0))
    return nearest.clamp(-1, 1)


def live_features(
    W_dec: Float[Tensor, "d_sae d_in"], alive: Bool[Tensor, "d_sae"] | None = None
) -> Int[Tensor, "n_live"]:
    """Which features count, in order: those that are alive and whose decoder row has a direction, not being zero.

    Raises ValueError if `alive` is not one bool a feature.
    """
    if alive is not None and (alive.dtype != torch.bool or alive.shape != W_dec.shape[:1]):
        raise ValueError(
            f"alive must be one bool for each of {len(W_dec)} features, got shape {tuple(alive.shape)} of {alive.dtype}"
        )
    has_direction = W_dec.detach().ne(0).any(-1)
    return (has_direction if alive is None else has_direction & alive.to(W_dec.device)).nonzero()[:, 0]


def unit_vectors(
    W_dec: Float[Tensor, "d_sae d_in"], alive: Bool[Tensor, "d_sae"] | None = None, name: str = "W_dec"
) -> Float[Tensor, "n_live d_in"]:
    """The directions of a decoder's live features, of length 1, in float32 or better.

    Raises ValueError, with the dictionary's `name`, if it has no live feature, or one whose row is not finite.
    """
    live = W_dec.detach()[live_features(W_dec, alive)]
    if len(live) == 0:
        raise ValueError(f"{name} has no live feature among {len(W_dec)}; there is nothing to compare")
    if not bool(live.isfinite().all()):
        raise ValueError(
            f"{name} has rows that are not finite; load the weights again, or leave those features out of alive"
        )
    live = live.to(torch.promote_types(live.dtype, torch.float32))
    # Scaled by their largest entry first, for the square of a tiny one is zero in float32.
    live.div_(live.abs().amax(-1, keepdim=True))
    return live.div_(live.norm(dim=-1, keepdim=True))


def bootstrap_mean(
    values: Float[Tensor, "n"], n_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """The mean of values and its percentile bootstrap interval. Raises ValueError if there are none, or one is not finite."""
    mean, means = _bootstrap("values", values, n_resamples, confidence, torch.Generator().manual_seed(seed))
    return _interval(mean, means, confidence)


def bootstrap_difference(
    first: Float[Tensor, "n"],
    second: Float[Tensor, "m"],
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """The mean of `first` less that of `second`, with its percentile bootstrap interval; the two are resampled apart."""
    generator = torch.Generator().manual_seed(seed)
    first_mean, first_means = _bootstrap("first", first, n_resamples, confidence, generator)
    second_mean, second_means = _bootstrap("second", second, n_resamples, confidence, generator)
    return _interval(first_mean - second_mean, first_means - second_means, confidence)


def _bootstrap(
    field: str, values: Tensor, n_resamples: int, confidence: float, generator: torch.Generator
) -> tuple[float, Float[Tensor, "n_resamples"]]:
    """The mean of n values, and those of n drawn with replacement, a bounded number of draws at a time."""
    _check_resampling(n_resamples, confidence)
    values = values.detach().cpu().double()
    n = len(values)
    if n == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"{field} must be at least one number, and finite; got {n}")
    means = []
    for at_once in torch.arange(n_resamples).split(max(_DRAWS_AT_ONCE // n, 1)):
        drawn = torch.randint(n, (len(at_once) * n,), generator=generator)
        means.append(values[drawn].view(len(at_once), n).mean(1))
    return float(values.mean()), torch.cat(means)


def _interval(mean: float, means: Tensor, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return Interval(mean, low, high)


def _check_resampling(n_resamples: int, confidence: float = 0.95) -> None:
    if n_resamples < 1:
        raise ValueError(f"n_resamples={n_resamples} must be at least 1; 1000 is usual")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1; 0.95 is usual")


def _tiles(vectors: Tensor, size: int) -> Iterable[tuple[slice, Tensor]]:
    starts = range(0, len(vectors), size)
    return ((slice(start, start + size), vectors[start : start + size]) for start in starts)


def _geometry(
    kind: Kind, compared_with: str, interval: Interval, features: Tensor, cosines: Tensor, sae: SAE[Any]
) -> Geometry:
    return Geometry(
        kind, compared_with, sae.cfg.d_sae, interval, tuple(features.tolist()), tuple(cosines.cpu().tolist())
    )


def _named(results: Mapping[str, Geometry | Iterable[Geometry]]) -> Iterable[tuple[str, Geometry]]:
    for name, found in results.items():
        for one in [found] if isinstance(found, Geometry) else found:
            yield name, one
