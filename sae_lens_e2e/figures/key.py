"""The key of a figure: which SAE, or which objective of many SAEs, is drawn how, the same in all of its panels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from sae_lens_e2e.figures.names import labels
from sae_lens_e2e.figures.panel import Series
from sae_lens_e2e.figures.style import Style, style, styles

# Up to so many SAEs are told apart; of more, the objectives are.
MOST_SAES = 6


@dataclass(frozen=True)
class Key:
    """Each SAE's label and look; `objectives`, if it is these that are told apart, says whose each SAE is."""

    labels: Mapping[str, str]
    looks: Mapping[str, Style]
    objectives: Mapping[str, str] | None

    @classmethod
    def of(cls, frame: pd.DataFrame) -> "Key":
        """The key of a frame with columns `sae` and, if there is one, `objective`.

        An SAE has its objective's colour, where that is known. More than six SAEs of fewer objectives have its whole look.
        """
        saes = list(dict.fromkeys(frame["sae"].astype(str)))
        if "objective" not in frame or bool(frame["objective"].isna().all()):
            return cls(labels(saes), styles(saes), None)
        known = frame["objective"].where(frame["objective"].notna(), "unknown").astype(str)
        objectives = dict(zip(frame["sae"].astype(str), known, strict=True))
        of_objective = styles(known)
        looks = {sae: of_objective[objectives[sae]] for sae in saes}
        if len(of_objective) == len(saes):
            return cls(labels(saes), looks, None)
        if len(saes) > MOST_SAES:
            return cls(labels(objectives.values()), looks, objectives)
        return cls(labels(saes), {sae: replace(style(i), colour=looks[sae].colour) for i, sae in enumerate(saes)}, None)

    def curves(
        self,
        frame: pd.DataFrame,
        x: str,
        y: str,
        *,
        kind: Literal["line", "points", "steps"] = "line",
        mean: bool = True,
        in_legend: bool = True,
    ) -> list[Series]:
        """A series for each SAE, `y` by `x`, of a frame with some of the key's SAEs; rows without two finite numbers are left out.

        Where objectives are told apart, with `mean` that of an objective's SAEs at each `x`, the single SAEs faintly behind.
        """
        saes = frame["sae"].astype(str)
        shown = frame.assign(sae=saes, who=saes if self.objectives is None else saes.map(self.objectives))
        known = np.isfinite(frame[[x, y]].astype(float)).all(axis=1)
        drawn: list[Series] = []
        for who, rows in shown.loc[known].groupby("who", sort=False):
            each = [of_sae for _, of_sae in rows.groupby("sae", sort=False)]
            look, label = self.looks[str(each[0]["sae"].iloc[0])], self._label(str(who), mean)
            faint = mean and len(each) > 1
            for i, of_sae in enumerate(each):
                named = in_legend and not faint and i == 0
                drawn.append(_series(label, look, of_sae, x, y, kind=kind, faint=faint, in_legend=named))
            if faint:
                means = pd.DataFrame(rows.groupby(x)[y].mean()).reset_index().assign(sae=f"{who}, mean of {len(each)}")
                drawn.append(_series(label, look, means, x, y, kind=kind, in_legend=in_legend))
        return sorted(drawn, key=lambda series: not series.faint)

    def _label(self, who: str, mean: bool) -> str:
        """As in the legend of every panel, though in one of them an objective may have one SAE only."""
        several = self.objectives is not None and sum(one == who for one in self.objectives.values()) > 1
        return f"{self.labels[who]} (mean)" if mean and several else self.labels[who]


def _series(label: str, look: Style, rows: pd.DataFrame, x: str, y: str, **options: Any) -> Series:
    hover = rows["hover"] if "hover" in rows else rows["sae"]
    return Series(
        label, look, tuple(map(float, rows[x])), tuple(map(float, rows[y])), tuple(map(str, hover)), **options
    )
