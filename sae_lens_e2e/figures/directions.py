"""Whether an SAE keeps the directions that the model needs: figure 23 of Braun et al. (2024)."""

import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.evaluation.measures import NATS_A_TOKEN
from sae_lens_e2e.figures.browser import interactive
from sae_lens_e2e.figures.frames import require
from sae_lens_e2e.figures.key import Key
from sae_lens_e2e.figures.panel import Axis, Panel
from sae_lens_e2e.figures.paper import draw

TITLE = "Fidelity of principal directions"
CAPTION = (
    "For principal directions of the activations at the hook: the correlation of each with its reconstruction, by the "
    "direction's rank (left; 1 has most variance) and by how much the model needs it, the KL divergence when it is resampled "
    "(right). Without position 0."
)


def directions_figure(frame: pd.DataFrame) -> Figure:
    """How well each principal direction is reconstructed, by its rank and by its importance.

    `frame` is a `directions_frame`: sae, hook, direction, correlation, kl, and if there is one objective. A direction's KL is the
    model's own, so one SAE of a hook may bring it for all; directions without one, or with 0, are in the left panel only. Raises
    ValueError if a column or all rows are missing, or the SAEs sit at different hooks.
    """
    return draw(_panels(frame))


def directions_plotly(frame: pd.DataFrame) -> go.Figure:
    """`directions_figure` for the browser."""
    return interactive(_panels(frame))


def _panels(frame: pd.DataFrame) -> list[Panel]:
    rows = require(frame, "a directions_frame", "hook", "direction", "correlation", "kl")
    if rows["hook"].nunique() > 1:
        raise ValueError(
            f"SAEs of different hooks cannot be compared: {', '.join(map(str, rows['hook'].unique()))}; draw them apart"
        )
    rows = rows.assign(
        rank=rows["direction"] + 1,
        kl=rows.groupby("direction")["kl"].transform("mean"),
        hover=rows["sae"].astype(str) + ", direction " + (rows["direction"] + 1).astype(str),
    )
    correlation = Axis("correlation with reconstruction", reference=0)
    key, needed = Key.of(rows), rows.loc[rows["kl"] > 0]
    by_rank = key.curves(rows, "rank", "correlation")
    panels = [Panel("", Axis("rank of the direction by variance", "log"), correlation, tuple(by_rank))]
    if len(needed):
        by_kl = key.curves(needed, "kl", "correlation", kind="points", in_legend=False)
        label = f"KL under resample ablation ({NATS_A_TOKEN})"
        panels.append(Panel("", Axis(label, "log"), correlation, tuple(by_kl)))
    return panels
