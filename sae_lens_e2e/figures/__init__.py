"""Figures, in matplotlib for papers and in plotly for the browser. Needs the extra `sae-lens-e2e[figures]`."""

try:
    import matplotlib as _matplotlib  # noqa: F401
    import plotly as _plotly  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "plotly"):
        raise
    raise ModuleNotFoundError("figures need matplotlib and plotly: pip install 'sae-lens-e2e[figures]'") from error

from sae_lens_e2e.figures.comparison import comparison_html, comparison_png
from sae_lens_e2e.figures.directions import directions_figure, directions_plotly
from sae_lens_e2e.figures.files import save
from sae_lens_e2e.figures.firing import firing_figure, firing_plotly
from sae_lens_e2e.figures.frames import with_objectives
from sae_lens_e2e.figures.geometry import geometry_figure, geometry_plotly
from sae_lens_e2e.figures.history import history_figure, history_frame, history_plotly
from sae_lens_e2e.figures.kinds import FIGURES, FigureKind, figure_kind
from sae_lens_e2e.figures.layers import layers_figure, layers_plotly
from sae_lens_e2e.figures.norms import norms_figure, norms_plotly
from sae_lens_e2e.figures.pareto import pareto_figure, pareto_plotly
from sae_lens_e2e.figures.replacement import replacement_figure, replacement_plotly

__all__ = [
    "FIGURES",
    "FigureKind",
    "comparison_html",
    "comparison_png",
    "directions_figure",
    "directions_plotly",
    "figure_kind",
    "firing_figure",
    "firing_plotly",
    "geometry_figure",
    "geometry_plotly",
    "history_figure",
    "history_frame",
    "history_plotly",
    "layers_figure",
    "layers_plotly",
    "norms_figure",
    "norms_plotly",
    "pareto_figure",
    "pareto_plotly",
    "replacement_figure",
    "replacement_plotly",
    "save",
    "with_objectives",
]
