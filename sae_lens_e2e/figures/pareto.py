"""What splicing in an SAE costs, against its sparsity: figures 1, 4 and 5 of Braun et al. (2024)."""

from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.evaluation.measures import MEASURES, Measure
from sae_lens_e2e.figures.browser import interactive
from sae_lens_e2e.figures.names import labels
from sae_lens_e2e.figures.panel import Axis, Panel, Series, scaled_axis
from sae_lens_e2e.figures.paper import draw
from sae_lens_e2e.figures.style import styles
from sae_lens_e2e.studies.pareto import comparable, pareto

TITLE = "Cost against sparsity"
CAPTION = (
    "CE loss increase from splicing in each SAE, against L0 (left) and against alive features (right). Lines join the SAEs "
    "that no other of their objective beats; hollow ones are beaten. Lower and further left is better."
)
COST, L0, ALIVE = (MEASURES[name] for name in ("ce_loss_increase", "l0", "n_alive"))


def pareto_figure(frame: pd.DataFrame) -> Figure:
    """CE loss increase against L0 and against alive features, with each objective's front.

    `frame` is an `evaluation_frame`: sae, objective, model_name, hook_name, l0, n_alive, ce_loss_increase. Raises ValueError
    as `sae_lens_e2e.studies.pareto.pareto` does.
    """
    return draw(_panels(frame))


def pareto_plotly(frame: pd.DataFrame) -> go.Figure:
    """`pareto_figure` for the browser."""
    return interactive(_panels(frame))


def cost_panel(frame: pd.DataFrame, sparsity: Measure, group: str = "objective") -> Panel:
    """CE loss increase against one measure of sparsity."""
    x, y = sparsity.name, COST.name
    rows, front = comparable(frame, x, y, group=group), pareto(frame, x, y, group)
    look, label = styles(map(str, rows[group])), labels(map(str, rows[group]))
    series = []
    for name, best in front.groupby(group, sort=False):
        beaten = rows.loc[(rows[group] == name) & ~rows["sae"].isin(best["sae"])]
        line = Series(label[str(name)], look[str(name)], *_points(best, x, y))
        series += [line, replace(_with(line, beaten, x, y), kind="points", hollow=True, in_legend=False)]
    x_axis = scaled_axis(sparsity.axis, rows[x]) if sparsity is L0 else Axis(sparsity.axis)
    return Panel("", x_axis, scaled_axis(COST.axis, rows[y]), tuple(one for one in series if one.x))


def _panels(frame: pd.DataFrame) -> list[Panel]:
    return [cost_panel(frame, L0), cost_panel(frame, ALIVE)]


def _points(rows: pd.DataFrame, x: str, y: str) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    return tuple(map(float, rows[x])), tuple(map(float, rows[y])), tuple(map(str, rows["sae"]))


def _with(series: Series, rows: pd.DataFrame, x: str, y: str) -> Series:
    xs, ys, hover = _points(rows, x, y)
    return replace(series, x=xs, y=ys, hover=hover)
