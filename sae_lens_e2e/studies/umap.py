"""Dictionaries drawn together on a plane, so that what they share and what only one has can be seen.

Braun et al. (2024), figures 19 to 21. Needs the extra `sae-lens-e2e[umap]`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_e2e.studies.geometry import live_features, unit_vectors


def umap_of(
    dictionaries: Mapping[str, Float[Tensor, "d_sae d_in"]],
    *,
    alive: Mapping[str, Bool[Tensor, "d_sae"]] | None = None,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    seed: int = 0,
) -> pd.DataFrame:
    """Place the live features of several decoders (d_sae, d_in), by name, near those of like direction.

    One embedding of all together, by cosine distance: a row is sae, feature, x, y. `alive` (d_sae,) by name says which features
    count; without it, all whose decoder row is not zero. `n_neighbors` and `min_dist` are UMAP's. The same seed gives the same
    plane. Raises ImportError without umap-learn, ValueError for dictionaries that are empty or do not fit each other.
    """
    alive = alive or {}
    if unknown := set(alive) - set(dictionaries):
        raise ValueError(f"alive names {', '.join(sorted(unknown))}, which dictionaries does not")
    vectors = {name: unit_vectors(W_dec, alive.get(name), name).float().cpu() for name, W_dec in dictionaries.items()}
    widths = {name: vector.shape[1] for name, vector in vectors.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"dictionaries must be of one width, got {widths}; take SAEs of the same hook")
    n_features = sum(map(len, vectors.values()))
    if n_features <= n_neighbors + 1:
        raise ValueError(f"n_neighbors={n_neighbors} is too many for {n_features} live features; lower it")
    reducer = _umap(n_components=2, metric="cosine", n_neighbors=n_neighbors, min_dist=min_dist, random_state=seed)
    plane = reducer.fit_transform(torch.cat(list(vectors.values())).numpy())
    features = [live_features(W_dec, alive.get(name)).tolist() for name, W_dec in dictionaries.items()]
    rows = [(name, feature) for name, live in zip(dictionaries, features, strict=True) for feature in live]
    return pd.DataFrame(rows, columns=["sae", "feature"]).assign(x=plane[:, 0], y=plane[:, 1])


def _umap(**settings: Any) -> Any:
    try:
        umap = import_module("umap")
    except ImportError as error:
        raise ImportError("UMAP needs umap-learn: pip install 'sae-lens-e2e[umap]'") from error
    # With a seed it is serial, and warns unless told that this is wanted.
    return umap.UMAP(**settings, n_jobs=1)
