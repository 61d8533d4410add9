"""What several SAEs or transcoders cost the language model at once, one more at a time, and each alone."""

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

TITLE = "Several at once"
CAPTION = (
    "The language model with the first, the first two and so on spliced in, in order of depth, and with each alone: what that costs in "
    "cross-entropy, the KL divergence from the model as it is, and how often the likeliest next token stays the same."
)
SOURCE = "a together_frame"
_CE, _KL, _TOP1 = (MEASURES[name] for name in ("ce_loss_increase", "kl", "top1_agreement"))
# What is shown of which sets, and what the panel is headed by.
_PANELS = (
    (_CE, "together", "down to each"),
    (_CE, "alone", "each alone"),
    (_KL, "together", "down to each"),
    (_TOP1, "together", "down to each"),
)


def replacement_figure(frame: pd.DataFrame) -> Figure:
    """CE loss increase, KL divergence and top-1 agreement by how many are spliced in, a line a group.

    `frame` is a `together_frame`: group, spliced, depth, sae, hook_name, ce_loss_increase, kl, top1_agreement. Raises ValueError if a
    column or all rows are missing.
    """
    return draw(_panels(frame))


def replacement_plotly(frame: pd.DataFrame) -> go.Figure:
    """`replacement_figure` for the browser."""
    return interactive(_panels(frame))


def _panels(frame: pd.DataFrame) -> list[Panel]:
    rows = require(frame, SOURCE, "group", "spliced", "depth", "hook_name", _CE.name, _KL.name, _TOP1.name)
    # What a figure tells apart goes by this name.
    rows = rows.assign(sae=rows["group"]).sort_values(["group", "depth"], kind="stable")
    key, ticks = Key.of(rows), _ticks(rows)
    return [_panel(rows, key, ticks, *panel) for panel in _PANELS]


def _panel(
    rows: pd.DataFrame,
    key: Key,
    ticks: tuple[tuple[float, str], ...] | None,
    measure: Measure,
    spliced: str,
    title: str,
) -> Panel:
    shown: pd.DataFrame = rows.loc[rows["spliced"] == spliced]
    y = Axis(measure.axis) if measure is _TOP1 else scaled_axis(measure.axis, shown[measure.name])
    x = Axis("hook" if ticks else "place in order of depth", ticks=ticks)
    return Panel(title, x, y, tuple(key.curves(shown, "depth", measure.name, mean=False)))


def _ticks(rows: pd.DataFrame) -> tuple[tuple[float, str], ...] | None:
    """The hooks, where all groups have the same."""
    hooks = {(depth, hook) for depth, hook in zip(rows["depth"], rows["hook_name"], strict=True)}
    if len(hooks) > len({depth for depth, _ in hooks}):
        return None
    names = hook_labels(hook for _, hook in sorted(hooks))
    return tuple((float(depth), names[hook]) for depth, hook in sorted(hooks))
