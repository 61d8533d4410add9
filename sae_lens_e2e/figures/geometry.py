"""How near each feature has its nearest neighbour: figure 3 of Braun et al. (2024)."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.figures.browser import interactive
from sae_lens_e2e.figures.frames import require
from sae_lens_e2e.figures.key import Key
from sae_lens_e2e.figures.names import shortened
from sae_lens_e2e.figures.panel import Axis, Panel
from sae_lens_e2e.figures.paper import draw

TITLE = "Nearest features"
CAPTION = (
    "Each live feature's largest cosine similarity to another: of its own dictionary, of one trained from another seed, of one "
    "of another kind, as far as there are such. Markers on the axis are means."
)
TITLES = {
    "same dictionary": "nearest in the same dictionary",
    "another seed": "nearest in another seed's",
    "another kind": "nearest in another kind's",
}
# Bins are wider where an SAE has fewer features than this.
_MANY_FEATURES, _BIN, _WIDE_BIN = 1000, 0.02, 0.05
_LONGEST_NAME = 36


def geometry_figure(frame: pd.DataFrame) -> Figure:
    """Histograms of features' nearest cosines, a panel a kind of comparison, an outline an SAE.

    `frame` is a `geometry_frame`: sae, compared_with, kind, feature, cosine, and if there is one objective. Raises ValueError if a
    column or all rows are missing.
    """
    return draw(_panels(frame))


def geometry_plotly(frame: pd.DataFrame) -> go.Figure:
    """`geometry_figure` for the browser."""
    return interactive(_panels(frame))


def _panels(frame: pd.DataFrame) -> list[Panel]:
    rows = require(frame, "a geometry_frame", "compared_with", "kind", "cosine")
    compared = ["sae", "compared_with", "kind"]
    width = _BIN if rows.groupby(compared).size().min() >= _MANY_FEATURES else _WIDE_BIN
    key, edges = Key.of(rows), np.arange(np.floor(rows["cosine"].min() / width), 1 / width + 1) * width
    kinds = dict.fromkeys([*(kind for kind in TITLES if (rows["kind"] == kind).any()), *rows["kind"]])
    return [
        _panel(compared, edges, str(kind), key) for kind in kinds for compared in _apart(rows.loc[rows["kind"] == kind])
    ]


def _apart(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Those compared with one dictionary and those with another, if any SAE was compared with several; else all together."""
    if rows.groupby("sae")["compared_with"].nunique().max() == 1:
        return [rows]
    return [compared for _, compared in rows.groupby("compared_with", sort=False)]


def _panel(rows: pd.DataFrame, edges: np.ndarray, kind: str, key: Key) -> Panel:
    histograms, means = [], []
    for sae, features in rows.groupby("sae", sort=False):
        counts, _ = np.histogram(features["cosine"], edges)
        fractions = np.append(counts, counts[-1]) / len(features)
        histograms.append(pd.DataFrame({"sae": sae, "edge": edges, "fraction": fractions}))
        who = sae if key.objectives is None else key.objectives[str(sae)]
        means.append({"sae": sae, "who": who, "mean": features["cosine"].mean(), "height": 0.0})
    # One marker an objective, where it is objectives that are told apart.
    by_who = pd.DataFrame(means).groupby("who", sort=False, as_index=False)
    mean = pd.DataFrame(by_who.agg({"sae": "first", "mean": "mean", "height": "first"}))
    series = [
        *key.curves(pd.concat(histograms, ignore_index=True), "edge", "fraction", kind="steps"),
        *key.curves(mean, "mean", "height", kind="points", in_legend=False),
    ]
    x, y = Axis("largest cosine similarity"), f"fraction of features (bins of {edges[1] - edges[0]:.2f})"
    return Panel(_title(rows, kind), x, Axis(y, from_zero=True), tuple(series))


def _title(rows: pd.DataFrame, kind: str) -> str:
    others = list(dict.fromkeys(rows["compared_with"]))
    title = TITLES.get(kind, f"nearest in {kind}")
    if kind == "same dictionary" or len(others) > 1:
        return title
    return f"{title}\n({shortened(str(others[0]), _LONGEST_NAME)})"
