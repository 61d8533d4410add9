"""SAEs side by side: what each costs the model at its sparsity, and how far the later layers move."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lens_e2e.evaluation import Evaluation

TITLES = ("What splicing in the SAE costs", "How far later layers move")
L0_AXIS, CE_AXIS = "L0 (features active a token)", "CE loss increase (nats a token)"
LAYER_AXIS, MSE_AXIS = "hook", "reconstruction MSE"

# Okabe and Ito's palette, told apart by the colour-blind; with dashes and markers, in grey too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS, DASHES = ("o", "s", "^", "D"), ("-", "--", ":", "-.")
PLOTLY_MARKERS, PLOTLY_DASHES = ("circle", "square", "triangle-up", "diamond"), ("solid", "dash", "dot", "dashdot")


def comparison_png(results: Mapping[str, Evaluation], path: str | Path) -> None:
    """Draw CE loss increase (nats) against L0, and the MSE at each later layer, of SAEs by name, to a PNG (or PDF) file."""
    figure, (cost, layers) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, (name, result) in enumerate(results.items()):
        style = {"color": COLOURS[i % 4], "marker": MARKERS[i % 4], "linestyle": DASHES[i % 4], "label": name}
        cost.plot([result.l0], [result.ce_loss_increase], markersize=9, **style)
        layers.plot(short_names(result), list(result.downstream_mse.values()), **style)
    for axes, title, x, y in zip((cost, layers), TITLES, (L0_AXIS, LAYER_AXIS), (CE_AXIS, MSE_AXIS), strict=True):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.set_ylim(bottom=0, top=1.1 * axes.dataLim.ymax)
        axes.grid(alpha=0.3)
    layers.legend()
    cost.legend(loc="lower left")
    cost.set_xlim(left=0, right=1.1 * cost.dataLim.xmax)
    layers.tick_params(axis="x", labelrotation=20)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def comparison_html(results: Mapping[str, Evaluation], path: str | Path) -> None:
    """The same figure as one HTML file that needs no network."""
    figure = make_subplots(1, 2, subplot_titles=TITLES)
    for i, (name, result) in enumerate(results.items()):
        style = {
            "name": name,
            "legendgroup": name,
            "line": {"color": COLOURS[i % 4], "dash": PLOTLY_DASHES[i % 4]},
            "marker": {"size": 11, "symbol": PLOTLY_MARKERS[i % 4]},
            "mode": "lines+markers",
        }
        figure.add_trace(go.Scatter(x=[result.l0], y=[result.ce_loss_increase], **style), 1, 1)
        mse = list(result.downstream_mse.values())
        figure.add_trace(go.Scatter(x=short_names(result), y=mse, showlegend=False, **style), 1, 2)
    for column, (x, y) in enumerate(((L0_AXIS, CE_AXIS), (LAYER_AXIS, MSE_AXIS)), start=1):
        figure.update_xaxes(title_text=x, rangemode="tozero", row=1, col=column)
        figure.update_yaxes(title_text=y, rangemode="tozero", row=1, col=column)
    figure.update_layout(template="plotly_white")
    figure.write_html(path, include_plotlyjs=True)


def short_names(result: Evaluation) -> list[str]:
    """The later layers' hooks, without what they all have in common: '4.resid_pre' for 'blocks.4.hook_resid_pre'."""
    return [hook.replace("blocks.", "").replace("hook_", "") for hook in result.downstream_mse]
