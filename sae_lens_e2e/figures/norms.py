"""Whether an SAE's output has the length and the direction of its input: table 5 and figure 11 of Braun et al. (2024)."""

from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.figures.browser import interactive
from sae_lens_e2e.figures.frames import require
from sae_lens_e2e.figures.layers import SOURCE, check_one_hook
from sae_lens_e2e.figures.names import labels
from sae_lens_e2e.figures.panel import Axis, Panel, Series
from sae_lens_e2e.figures.paper import draw
from sae_lens_e2e.figures.style import COLOURS, style

TITLE = "Length and direction of the output"
CAPTION = (
    "Each SAE's output against its input, at position 0 of a prompt and at later ones: the ratio of their L2 norms (left) and "
    "their cosine similarity (right), means over tokens. 1 is perfect."
)
_DRAWN = ("l2_ratio", "cosine")
POSITIONS = (("first", "position 0"), ("later", "later positions"))
# Black, for in the other figures a colour is an objective.
_LOOKS = tuple(replace(style(i), colour=COLOURS[-1]) for i in range(len(POSITIONS)))


def norms_figure(frame: pd.DataFrame) -> Figure:
    """L2 ratio and cosine of the SAE's output to its input, a row an SAE, at position 0 and at later positions.

    `frame` is a `layers_frame`: sae, hook, layer, l2_ratio_first, l2_ratio_later, cosine_first, cosine_later, of which the rows
    of layer 0 are drawn. Raises ValueError if a column or all such rows are missing, or the SAEs sit at different hooks.
    """
    return draw(_panels(frame))


def norms_plotly(frame: pd.DataFrame) -> go.Figure:
    """`norms_figure` for the browser."""
    return interactive(_panels(frame))


def _panels(frame: pd.DataFrame) -> list[Panel]:
    columns = [f"{measure}_{position}" for measure in _DRAWN for position, _ in POSITIONS]
    rows = require(frame, SOURCE, "hook", "layer", *columns)
    rows = require(rows.loc[rows["layer"] == 0], f"{SOURCE} with each SAE's own hook, layer 0")
    check_one_hook(rows)
    names = labels(map(str, rows["sae"]))
    place = {sae: float(i) for i, sae in enumerate(names)}
    panels = []
    for i, measure in enumerate(_DRAWN):
        # The names are written once, at the left.
        ticks = tuple((place[sae], "" if i else name) for sae, name in names.items())
        series = []
        for number, (position, title) in enumerate(POSITIONS):
            known = rows.dropna(subset=[f"{measure}_{position}"])
            saes = tuple(map(str, known["sae"]))
            x, y = tuple(map(float, known[f"{measure}_{position}"])), tuple(place[sae] for sae in saes)
            look, hollow = _LOOKS[number], position == "first"
            series += [Series(title, look, x, y, saes, kind="points", hollow=hollow)] if saes else []
        panels.append(Panel("", Axis(MEASURES[measure].axis, reference=1), Axis("", ticks=ticks), tuple(series)))
    return panels
