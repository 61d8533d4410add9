"""Panels drawn with plotly, for the browser: the name of the SAE under the pointer."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lens_e2e.figures.panel import Axis, Panel, Series

# Pixels.
_PANEL_HEIGHT, _TICK_HEIGHT, _LEGEND_LINE, _MARGIN = 330, 20, 22, 110
_MOST_MARKERS = 60


def interactive(panels: Sequence[Panel], columns: int = 3) -> go.Figure:
    """The panels side by side, at most so many `columns`, with one legend that switches a name on and off in all of them."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    tallest = max(max(_PANEL_HEIGHT, 90 + _TICK_HEIGHT * len(panel.y.ticks or ())) for panel in panels)
    # Titles stand below the buttons in the corner.
    top = 90 if any(panel.title for panel in panels) else 50
    plots = rows * tallest + (rows - 1) * _MARGIN
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[_escape(panel.title).replace("\n", "<br>") for panel in panels],
        vertical_spacing=_MARGIN / plots if rows > 1 else None,
    )
    named: set[str] = set()
    for i, panel in enumerate(panels):
        place: dict[str, Any] = {"row": i // columns + 1, "col": i % columns + 1}
        for series in panel.series:
            figure.add_trace(_trace(panel, series, show=series.in_legend and series.label not in named), **place)
            named |= {series.label} if series.in_legend else set()
        figure.update_xaxes(**_dress(panel.x, panel.ticks("x")), **place)
        figure.update_yaxes(**_dress(panel.y, panel.ticks("y")), **place)
        if panel.y.ticks is not None:
            positions = [tick for tick, _ in panel.y.ticks]
            figure.update_yaxes(range=[max(positions) + 0.6, min(positions) - 0.6], **place)
        for axis, add in ((panel.x, figure.add_vline), (panel.y, figure.add_hline)):
            if axis.reference is not None:
                add(axis.reference, line={"color": "#888888", "width": 1}, layer="below", **place)
    figure.update_layout(
        template="plotly_white",
        height=plots + _MARGIN + top + _LEGEND_LINE * math.ceil(len(named) / 3),
        margin={"t": top, "r": 20, "b": _MARGIN},
        legend={"orientation": "h", "yanchor": "top", "y": -80 / plots, "x": 0.5, "xanchor": "center"},
        hoverlabel={"namelength": -1},
    )
    return figure


def _escape(text: str) -> str:
    """Text as it is: plotly reads HTML, mathematics between dollars, and values' names in braces."""
    return escape(text).replace("$", "&#36;").replace("{", "&#123;")


def _trace(panel: Panel, series: Series, show: bool) -> go.Scatter:
    look, n = series.style, len(series.x)
    marked = series.kind == "points" or (series.kind == "line" and n <= _MOST_MARKERS)
    # One name for all points is written once, for it is most of the file.
    names = [_escape(text) for text in series.hover]
    name = names[0] if len(set(names)) == 1 else "%{text}"
    line: dict[str, Any] = {"color": look.colour, "dash": look.plotly_dash, "width": 1 if series.faint else 2}
    if series.kind == "steps":
        line["shape"] = "hv"
    return go.Scatter(
        x=np.array(series.x),
        y=np.array(series.y),
        text=names if name == "%{text}" else None,
        hovertemplate=f"<b>{name}</b><br>{_hover('x', panel.x)}{_hover('y', panel.y)}<extra></extra>",
        name=_escape(series.label),
        legendgroup=series.label,
        showlegend=show,
        mode={"points": "markers", "steps": "lines"}.get(series.kind, "lines+markers" if marked else "lines"),
        line=line,
        marker={
            "symbol": look.plotly_marker + ("-open" if series.hollow else ""),
            "size": 5 if series.faint else 9,
            "color": look.colour,
        },
        opacity=0.4 if series.faint else 1,
        cliponaxis=series.kind != "points",
    )


def _hover(name: str, axis: Axis) -> str:
    """A line about one coordinate, by the name of its tick if it has one; none where the text above says it."""
    shown = f"%{{{name}:.4~g}}" if axis.ticks is None else f"%{{{name}}}"
    return f"{_escape(axis.label)}: {shown}<br>" if axis.label else ""


def _dress(axis: Axis, ticks: Sequence[tuple[float, str]] | None) -> dict[str, Any]:
    """Label, scale and ticks of one axis, in plotly's words."""
    options: dict[str, Any] = {"title_text": _escape(axis.label), "type": axis.scale, "exponentformat": "power"}
    if axis.from_zero:
        options["rangemode"] = "tozero"
    if ticks is not None:
        names = [_escape(label) for _, label in ticks]
        options |= {"tickmode": "array", "tickvals": [tick for tick, _ in ticks], "ticktext": names}
    return options
