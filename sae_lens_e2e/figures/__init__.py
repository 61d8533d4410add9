"""Figures, in matplotlib for papers and in plotly for the browser. Needs the extra `sae-lens-e2e[figures]`."""

from sae_lens_e2e.figures.comparison import comparison_html, comparison_png

__all__ = ["comparison_html", "comparison_png"]
