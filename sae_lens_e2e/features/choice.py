"""Which features are worth looking at, where nobody has named any."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def spread(features: Collection[int], firing: Int[Tensor, "d_sae"], n: int) -> list[int]:
    """At most `n` of some features, from the one that fires most to the one that fires least, at equal steps in that order."""
    ordered = sorted(features, key=lambda feature: (-int(firing[feature]), feature))
    if len(ordered) <= n:
        return ordered
    steps = torch.linspace(0, len(ordered) - 1, n).round().long() if n > 1 else torch.tensor([len(ordered) // 2])
    return [ordered[step] for step in steps.tolist()]


def check_features(name: str, features: Sequence[int], d_sae: int) -> list[int]:
    """Features that somebody has named, once each. Raises ValueError for none, or one that the SAE does not have."""
    chosen = list(dict.fromkeys(features))
    if not chosen:
        raise ValueError("features=[] names none; give at least one, or leave it out")
    for feature in chosen:
        if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < d_sae:
            raise ValueError(f"feature {feature!r}: {name} has the features 0 to {d_sae - 1}")
    return chosen
