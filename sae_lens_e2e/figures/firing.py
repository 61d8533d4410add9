"""How often features fire: few always, most rarely, some never."""

import math

import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.figures.browser import interactive
from sae_lens_e2e.figures.frames import require
from sae_lens_e2e.figures.key import Key
from sae_lens_e2e.figures.names import tick_number
from sae_lens_e2e.figures.panel import Axis, Panel
from sae_lens_e2e.figures.paper import draw

TITLE = "How often features fire"
CAPTION = (
    "How many features of each SAE fire on which fraction of tokens, a histogram of its logarithm; the marker at the left is "
    "how many never fire."
)
_COLUMNS = ("log10_low", "log10_high", "n_features")


def firing_figure(frame: pd.DataFrame) -> Figure:
    """The histogram of how often features fire, an outline an SAE, or of many the mean of an objective.

    `frame` is a `firing_frame`: sae, log10_low, log10_high, n_features, and if there is one objective; the bin from -inf holds
    the features that never fire. Raises ValueError if a column or all rows are missing.
    """
    return draw(_panels(frame), columns=1)


def firing_plotly(frame: pd.DataFrame) -> go.Figure:
    """`firing_figure` for the browser."""
    return interactive(_panels(frame), columns=1)


def _panels(frame: pd.DataFrame) -> list[Panel]:
    rows = require(frame, "a firing_frame", *_COLUMNS)
    fires = rows["log10_low"] > -math.inf
    lowest = rows.loc[fires & (rows["n_features"] > 0), "log10_low"].min()
    # With no live feature there is no bin to begin at, and the top one will do.
    first = math.floor(lowest) if lowest == lowest else -1
    never_at = 10 ** (first - 0.8)
    never = rows.loc[~fires].assign(edge=never_at)
    steps = rows.loc[fires & (rows["log10_low"] >= first)]
    # A last edge for each SAE, where the steps end.
    last = steps.loc[steps.groupby("sae")["log10_low"].transform("max") == steps["log10_low"]]
    steps = pd.concat([steps, last.assign(log10_low=last["log10_high"])], ignore_index=True)
    key = Key.of(rows)
    series = [
        *key.curves(steps.assign(edge=10 ** steps["log10_low"]), "edge", "n_features", kind="steps"),
        *key.curves(never, "edge", "n_features", kind="points", in_legend=False),
    ]
    powers = [(10.0**power, tick_number(10.0**power)) for power in range(first, 1)]
    x = Axis("firing frequency (fraction of tokens)", "log", ticks=((never_at, "never"), *powers))
    return [Panel("", x, Axis("features", from_zero=True), tuple(series))]
