"""How well activations are kept at the SAE's hook and at every later one: figure 2 of Braun et al. (2024)."""

import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.evaluation.measures import MEASURES, Measure
from sae_lens_e2e.figures.browser import interactive
from sae_lens_e2e.figures.frames import require
from sae_lens_e2e.figures.key import Key
from sae_lens_e2e.figures.names import hook_labels
from sae_lens_e2e.figures.panel import Axis, Panel, scaled_axis
from sae_lens_e2e.figures.paper import draw

TITLE = "Reconstruction at later layers"
CAPTION = (
    "Activations with the SAE spliced in against those without, at its own hook (first) and at every later one: mean squared "
    "error over tokens and dimensions (left; lower is better) and explained variance (right; higher is better)."
)
SOURCE = "a layers_frame"
MSE, EXPLAINED_VARIANCE = MEASURES["mse"], MEASURES["explained_variance"]


def layers_figure(frame: pd.DataFrame) -> Figure:
    """MSE and explained variance at the SAE's hook and each later one, a line an SAE, or of many the mean of an objective.

    `frame` is a `layers_frame`: sae, hook, layer, mse, explained_variance, and if there is one objective. Raises ValueError if a
    column or all rows are missing, or the SAEs sit at different hooks.
    """
    return draw(_panels(frame))


def layers_plotly(frame: pd.DataFrame) -> go.Figure:
    """`layers_figure` for the browser."""
    return interactive(_panels(frame))


def layer_panel(frame: pd.DataFrame, measure: Measure) -> Panel:
    """One measure by hook in the order of the model."""
    column = measure.name
    rows = require(frame, SOURCE, "hook", "layer", column).sort_values("layer", kind="stable")
    check_one_hook(rows)
    names = hook_labels(rows["hook"])
    place = {hook: float(i) for i, hook in enumerate(names)}
    series = Key.of(rows).curves(rows.assign(place=rows["hook"].map(place)).sort_index(), "place", column)
    ticks = tuple((place[hook], name) for hook, name in names.items())
    y = scaled_axis(measure.axis, rows[column]) if measure is MSE else Axis(measure.axis)
    return Panel("", Axis("hook", ticks=ticks), y, tuple(series))


def check_one_hook(frame: pd.DataFrame) -> None:
    """Raise ValueError, naming two SAEs, if the SAEs of a `layers_frame` do not sit at one hook."""
    own = frame.loc[frame["layer"] == 0]
    by_hook = dict(zip(own["hook"], own["sae"], strict=True))
    if len(by_hook) > 1:
        sites = ", ".join(f"{sae!r} sits at {hook}" for hook, sae in by_hook.items())
        raise ValueError(f"SAEs of different hooks cannot be compared: {sites}; draw them apart")


def _panels(frame: pd.DataFrame) -> list[Panel]:
    return [layer_panel(frame, MSE), layer_panel(frame, EXPLAINED_VARIANCE)]
