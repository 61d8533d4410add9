"""Figures as files, written whole or not at all."""

from pathlib import Path

import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.figures.paper import settings
from sae_lens_e2e.output import written_whole

# Without the date, the same figure gives the same file.
_METADATA = {".png": None, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def save(figure: Figure | go.Figure, path: str | Path) -> None:
    """Write a figure to `path`: matplotlib's as .png, .pdf or .svg, plotly's as one .html file that needs no network.

    Written under a temporary name first. Raises ValueError for another ending.
    """
    path = Path(path)
    endings = (".html",) if isinstance(figure, go.Figure) else tuple(_METADATA)
    if path.suffix.lower() not in endings:
        raise ValueError(f"path={str(path)!r} must end in {' or '.join(endings)}")
    with written_whole(path.parent) as partial:
        if isinstance(figure, go.Figure):
            figure.write_html(partial / path.name, include_plotlyjs=True)
        else:
            with settings():
                figure.savefig(partial / path.name, metadata=_METADATA[path.suffix.lower()])
