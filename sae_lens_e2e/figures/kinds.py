"""Every figure there is, by name, so that a report can go through them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.figures import directions, firing, geometry, history, layers, norms, pareto, replacement

FrameName = Literal["evaluation", "layers", "firing", "geometry", "directions", "history", "together"]


@dataclass(frozen=True)
class FigureKind:
    """A figure: what it shows, from which frame, and how to draw it.

    `frame` names the function that makes what it takes: `evaluation_frame`, `layers_frame` and so on. `draw` is for papers and
    `interactive` for the browser.
    """

    name: str
    title: str
    caption: str
    frame: FrameName
    draw: Callable[[pd.DataFrame], Figure]
    interactive: Callable[[pd.DataFrame], go.Figure]


_KINDS = (
    FigureKind("pareto", pareto.TITLE, pareto.CAPTION, "evaluation", pareto.pareto_figure, pareto.pareto_plotly),
    FigureKind("layers", layers.TITLE, layers.CAPTION, "layers", layers.layers_figure, layers.layers_plotly),
    FigureKind(
        "geometry", geometry.TITLE, geometry.CAPTION, "geometry", geometry.geometry_figure, geometry.geometry_plotly
    ),
    FigureKind("norms", norms.TITLE, norms.CAPTION, "layers", norms.norms_figure, norms.norms_plotly),
    FigureKind("firing", firing.TITLE, firing.CAPTION, "firing", firing.firing_figure, firing.firing_plotly),
    FigureKind(
        "directions",
        directions.TITLE,
        directions.CAPTION,
        "directions",
        directions.directions_figure,
        directions.directions_plotly,
    ),
    FigureKind("history", history.TITLE, history.CAPTION, "history", history.history_figure, history.history_plotly),
    FigureKind(
        "replacement",
        replacement.TITLE,
        replacement.CAPTION,
        "together",
        replacement.replacement_figure,
        replacement.replacement_plotly,
    ),
)
FIGURES: dict[str, FigureKind] = {kind.name: kind for kind in _KINDS}


def figure_kind(name: str) -> FigureKind:
    """The figure of this name. Raises ValueError, listing those there are, if there is none."""
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}; there are {', '.join(FIGURES)}")
    return FIGURES[name]
