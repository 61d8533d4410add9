"""The course of training: every loss, and L0, by tokens."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure

from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.figures.browser import interactive
from sae_lens_e2e.figures.frames import require
from sae_lens_e2e.figures.key import Key
from sae_lens_e2e.figures.panel import Axis, Panel, scaled_axis
from sae_lens_e2e.figures.paper import draw

TITLE = "Training"
CAPTION = (
    "Every loss, and L0, by tokens trained on. An objective's terms are without their coefficients; an architecture's own "
    "terms, and the total, with them."
)
TOKENS = "details/n_training_samples"
L0 = "metrics/l0"
TOTAL = "losses/overall_loss"
LABELS = {
    TOTAL: "total loss",
    "losses/kl": MEASURES["kl"].axis,
    "losses/downstream_mse": f"downstream {MEASURES['mse'].axis}",
    "losses/mse_loss": "MSE at the hook (sum over d_in)",
    "losses/l1_loss": "L1 loss, with its coefficient",
    "losses/l0_loss": "L0 loss, with its coefficient",
    L0: MEASURES["l0"].axis,
}
_MOST_POINTS = 300


def history_frame(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """The logs of several runs, by the SAE's name, as `read_history` gives them, in one frame with a column `sae`."""
    frames = [pd.DataFrame(rows).assign(sae=name) for name, rows in histories.items() if len(rows)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["sae", TOKENS])


def history_figure(frame: pd.DataFrame) -> Figure:
    """Loss terms and L0 by tokens, a panel each, a line an SAE; long runs as the means of 300 stretches.

    `frame` is a `history_frame`: sae, details/n_training_samples, metrics/l0, any losses/*, and if there is one objective. Raises
    ValueError if a column or all rows are missing.
    """
    return draw(_panels(frame))


def history_plotly(frame: pd.DataFrame) -> go.Figure:
    """`history_figure` for the browser."""
    return interactive(_panels(frame))


def _panels(frame: pd.DataFrame) -> list[Panel]:
    rows = require(frame, "a history_frame", TOKENS, L0)
    drawn = [column for column in _ordered(rows) if rows[column].notna().any()]
    means, key = _stretches(rows, drawn), Key.of(rows)
    return [
        Panel(
            "",
            Axis("tokens", from_zero=True),
            scaled_axis(LABELS.get(column, _words(column)), means[column]),
            tuple(key.curves(means, TOKENS, column, mean=False)),
        )
        for column in drawn
    ]


def _ordered(rows: pd.DataFrame) -> list[str]:
    """The total first, then the terms, those that we know before others, and L0 last."""
    terms = [column for column in rows if column.startswith("losses/") and column not in LABELS]
    known = [column for column in LABELS if column in rows and column != L0]
    return [*known, *terms, L0]


def _stretches(rows: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Each run cut into at most `_MOST_POINTS` stretches of rows, and the mean over each."""
    runs = []
    for sae, run in rows.groupby("sae", sort=False):
        size = -(-len(run) // _MOST_POINTS)
        numbers = pd.Series(range(len(run)), index=run.index) // size
        means = pd.DataFrame(run[[TOKENS, *columns]].groupby(numbers).mean())
        of = {name: run[name].iloc[0] for name in ("sae", "objective") if name in run}
        runs.append(means.assign(**{**of, "sae": sae}))
    return pd.concat(runs, ignore_index=True)


def _words(column: str) -> str:
    return column.removeprefix("losses/").replace("_", " ")
