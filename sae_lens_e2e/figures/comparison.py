"""SAEs side by side: what each costs the model at its sparsity, and how far the later layers move."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sae_lens_e2e.evaluation import Evaluation, evaluation_frame, layers_frame
from sae_lens_e2e.figures.browser import interactive
from sae_lens_e2e.figures.files import save
from sae_lens_e2e.figures.layers import MSE, layer_panel
from sae_lens_e2e.figures.panel import Panel
from sae_lens_e2e.figures.paper import draw
from sae_lens_e2e.figures.pareto import L0, cost_panel

TITLES = ("What splicing in the SAE costs", "How far later layers move")


def comparison_png(results: Mapping[str, Evaluation], path: str | Path) -> None:
    """Draw CE loss increase (nats) against L0, and the MSE at each later layer, of SAEs by name, to a PNG (or PDF) file."""
    save(draw(_panels(results)), path)


def comparison_html(results: Mapping[str, Evaluation], path: str | Path) -> None:
    """The same figure as one HTML file that needs no network."""
    save(interactive(_panels(results)), path)


def _panels(results: Mapping[str, Evaluation]) -> list[Panel]:
    layers = layers_frame(results)
    cost = cost_panel(evaluation_frame(results), L0, group="sae")
    later = layer_panel(layers.loc[layers["layer"] > 0], MSE)
    later = replace(later, y=replace(later.y, from_zero=later.y.scale == "linear"))
    return [replace(panel, title=title) for panel, title in zip((cost, later), TITLES, strict=True)]
