"""Panels drawn with matplotlib, for papers. No global state: no pyplot, and no settings of the user's but our own."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, NullLocator

from sae_lens_e2e.figures.panel import Axis, Panel, Series

# Inches: two columns of panels are the width of a page.
_PANEL_WIDTH, _PANEL_HEIGHT = 3.4, 2.7
_TICK_HEIGHT, _LEGEND_LINE = 0.19, 0.17
_ONE_PANEL_WIDTH = 5.0
_CHARACTER, _HANDLE = 0.064, 0.62
_MOST_MARKERS = 25
_LONGEST_Y_LABEL = 32
_LARGE = 10_000
_MOST_X_TICKS, _CHARACTERS_PER_INCH = 12, 14
_SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType, which journals ask for
    "svg.hashsalt": "sae-lens-e2e",  # the same figure, the same file
}


def settings() -> AbstractContextManager[None]:
    """Matplotlib's defaults and ours over them, until the block is left."""
    return matplotlib.style.context(["default", _SETTINGS])


def draw(panels: Sequence[Panel], columns: int = 3) -> Figure:
    """The panels side by side, at most so many `columns`, with one legend below for all."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = _ONE_PANEL_WIDTH if len(panels) == 1 else _PANEL_WIDTH * columns
    height = rows * max(_height(panel) for panel in panels)
    with settings():
        entries = _legend(panels)
        longest = max((len(label) for label in entries), default=0)
        per_line = max(1, min(len(entries), int(width / (longest * _CHARACTER + _HANDLE))))
        height += _LEGEND_LINE * math.ceil(len(entries) / per_line) + 0.1
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        if entries:
            names = [_plain(label) for label in entries]
            figure.legend(list(entries.values()), names, loc="outside lower center", ncols=per_line)
    return figure


def _height(panel: Panel) -> float:
    """Panels with a name at each tick of y grow with them."""
    return max(_PANEL_HEIGHT, 1 + _TICK_HEIGHT * len(panel.y.ticks or ()))


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for series in panel.series:
        _draw_series(axes, series)
    axes.set_title(_plain(panel.title))
    _dress(axes, "x", panel)
    _dress(axes, "y", panel)


def _draw_series(axes: Axes, series: Series) -> None:
    look, n = series.style, len(series.x)
    options: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": look.dash}
    if series.kind == "points":
        options |= {"linestyle": "", "clip_on": False, "zorder": 3}
    if series.kind == "steps":
        options |= {"drawstyle": "steps-post", "marker": ""}
    if series.kind == "line" and n > _MOST_MARKERS:
        options["markevery"] = n // 8
    if series.hollow:
        options["markerfacecolor"] = "white"
    if series.faint:
        options |= {"alpha": 0.35, "linewidth": 0.8, "markersize": 2.5}
    axes.plot(series.x, series.y, label=_plain(series.label), **options)


def _dress(axes: Axes, name: Literal["x", "y"], panel: Panel) -> None:
    """Label, scale, limits and ticks of one axis of a panel."""
    axis: Axis = getattr(panel, name)
    label = _plain(axis.label)
    if name == "y" and len(label) > _LONGEST_Y_LABEL:
        label = label.replace(" (", "\n(")
    axes.set(**{f"{name}label": label, f"{name}scale": axis.scale})
    high = axes.dataLim.xmax if name == "x" else axes.dataLim.ymax
    if axis.reference is not None:
        (axes.axvline if name == "x" else axes.axhline)(axis.reference, color="#888888", linewidth=0.8, zorder=1)
    if axis.from_zero:
        axes.set(**{f"{name}lim": (0, 1.08 * high if high > 0 else 1)})
    ticks = panel.ticks(name)
    if ticks is not None:
        _write_ticks(axes, name, ticks)
    elif high >= _LARGE:
        getattr(axes, f"{name}axis").set_major_formatter(EngFormatter(sep=""))
    if name == "y" and axis.ticks is not None:
        places = [place for place, _ in axis.ticks]
        axes.set_ylim(max(places) + 0.6, min(places) - 0.6)


def _write_ticks(axes: Axes, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    # Of many along the bottom, as many as there is room for.
    every = 1 if name == "y" else -(-len(ticks) // _MOST_X_TICKS)
    places, texts = zip(*((place, _plain(text)) for place, text in ticks[::every]), strict=True)
    limits = axes.get_xlim() if name == "x" else axes.get_ylim()
    getattr(axes, f"set_{name}ticks")(places, texts)
    getattr(axes, f"set_{name}lim")(limits)
    getattr(axes, f"{name}axis").set_minor_locator(NullLocator())
    figure, spec = axes.get_figure(root=True), axes.get_subplotspec()
    width = figure.get_figwidth() / spec.get_gridspec().ncols if figure and spec else _PANEL_WIDTH
    if name == "x" and sum(len(text) + 2 for text in texts) > _CHARACTERS_PER_INCH * width:
        axes.tick_params("x", labelrotation=30)
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")


def _legend(panels: Sequence[Panel]) -> dict[str, Line2D]:
    """A line for each name, as its series are drawn, in the order of the panels."""
    entries: dict[str, Line2D] = {}
    for panel in panels:
        for series in panel.series:
            if series.in_legend and series.label not in entries:
                entries[series.label] = _handle(series)
    return entries


def _handle(series: Series) -> Line2D:
    look, fill = series.style, "white" if series.hollow else None
    dash = "" if series.kind == "points" else look.dash
    # With its marker even for a histogram, beside which there may be points.
    return Line2D([], [], color=look.colour, linestyle=dash, marker=look.marker, markerfacecolor=fill)


def _plain(text: str) -> str:
    """Text as it is: no mathematics between dollars, and no label left out for its leading underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
