"""Which features lie nearest to which: those of the same dictionary or of another, and those that another has nothing like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_e2e.studies.geometry import live_features, nearest_cosines, unit_vectors


class Neighbour(NamedTuple):
    """A feature, and the cosine similarity of its decoder row to another's."""

    feature: int
    cosine: float


@dataclass(frozen=True)
class Unmatched:
    """The live features of a dictionary that another one lacks: whose nearest in it is less than `threshold` near."""

    threshold: float
    n_live: int
    features: tuple[int, ...]
    cosines: tuple[float, ...]
    """Each one's largest cosine similarity to a live feature of the other dictionary."""
    matched: tuple[int, ...]
    """The other live features."""


@torch.no_grad()
def nearest_features(
    features: Sequence[int],
    W_dec: Float[Tensor, "d_sae d_in"],
    other: Float[Tensor, "d_other d_in"] | None = None,
    *,
    other_alive: Bool[Tensor, "d_other"] | None = None,
    n: int = 5,
) -> dict[int, tuple[Neighbour, ...]]:
    """The `n` live features of `other`, or of its own dictionary without itself, that lie nearest to each of `features`, nearest first.

    `other_alive` says which count as live, of `other` or of its own. A feature whose decoder row is zero has none.
    """
    compared = W_dec if other is None else other
    numbers, columns = live_features(compared, other_alive).tolist(), unit_vectors(compared, other_alive, "other")
    found: dict[int, tuple[Neighbour, ...]] = {}
    for feature in features:
        row = W_dec[feature : feature + 1]
        if not bool(row.any()):
            found[feature] = ()
            continue
        cosines = (columns @ unit_vectors(row)[0].to(columns)).clamp(-1, 1)
        best = cosines.topk(min(n + 1, len(cosines)))
        near = [Neighbour(numbers[i], c) for c, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        found[feature] = tuple(one for one in near if other is not None or one.feature != feature)[:n]
    return found


@torch.no_grad()
def unmatched(
    W_dec: Float[Tensor, "d_sae d_in"],
    other: Float[Tensor, "d_other d_in"],
    threshold: float,
    *,
    alive: Bool[Tensor, "d_sae"] | None = None,
    other_alive: Bool[Tensor, "d_other"] | None = None,
) -> Unmatched:
    """The live features that have no live one in `other` with a cosine similarity of at least `threshold`, in order.

    Raises ValueError for a threshold that is no cosine similarity above 0, and as `nearest_cosines` does.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is to be a cosine similarity above 0, and at most 1; 0.7 is usual")
    cosines = nearest_cosines(W_dec, other, alive=alive, other_alive=other_alive).cpu()
    live, below = live_features(W_dec, alive).cpu(), cosines < threshold
    return Unmatched(
        threshold, len(live), tuple(live[below].tolist()), tuple(cosines[below].tolist()), tuple(live[~below].tolist())
    )
