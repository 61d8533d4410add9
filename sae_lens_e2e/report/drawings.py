"""The figures of a report: each from its frame, for the page and as a file for papers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.io
from sae_lens import logger

from sae_lens_e2e.errors import one_line
from sae_lens_e2e.evaluation import evaluation_frame, firing_frame, layers_frame, together_frame
from sae_lens_e2e.figures import FIGURES, FigureKind, figure_kind, history_frame, save
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.studies.directions import directions_frame
from sae_lens_e2e.studies.geometry import geometry_frame

FOLDER = "figures"


@dataclass(frozen=True)
class Drawing:
    """One figure as it goes into the page, as plotly's JSON."""

    name: str
    title: str
    caption: str
    plotly: str


def check_figures(names: Sequence[str] | None) -> None:
    """Raises ValueError, listing those there are, for a figure that there is not."""
    for name in names or ():
        figure_kind(name)


def drawings(results: Results, names: Sequence[str] | None, folder: Path) -> Iterator[Drawing]:
    """The figures that there is something to draw in, each also written to `folder` as a PDF; all there are, without `names`."""
    frames = {kind: frame for kind, make in _frames(results).items() if len(frame := make())}
    for name, kind in FIGURES.items():
        if kind.frame not in frames or (names is not None and name not in names):
            continue
        try:
            drawn = _drawing(kind, frames[kind.frame], folder)
        except Exception as error:  # a figure that cannot be drawn does not concern the others
            results.notes.append(f"The figure {name} could not be drawn: {one_line(error)}")
            logger.warning(results.notes[-1])
            continue
        yield drawn


def _drawing(kind: FigureKind, frame: pd.DataFrame, folder: Path) -> Drawing:
    save(kind.draw(frame), folder / FOLDER / f"{kind.name}.pdf")
    return Drawing(kind.name, kind.title, kind.caption, str(plotly.io.to_json(kind.interactive(frame))))


def _frames(results: Results) -> dict[str, Any]:
    """What makes each frame; of evaluations all SAEs are in it, of everything else those that are looked at closely."""
    labels = results.labels
    close = {labels[name]: results.evaluations[name] for name in results.compared if results.evaluations}
    histories = {labels[one.name]: one.history for one in results.close}
    return {
        "evaluation": partial(evaluation_frame, results.evaluations),
        "layers": partial(layers_frame, close),
        "firing": partial(firing_frame, close),
        "geometry": partial(_geometry, results),
        "directions": partial(directions_frame, _labelled(results.directions, labels)),
        "history": partial(history_frame, histories),
        "together": partial(together_frame, results.together),
    }


def _labelled(found: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    return {labels[name]: one for name, one in found.items()}


def _geometry(results: Results) -> pd.DataFrame:
    """Every nearest cosine; an SAE that stands for its objective across seeds goes by that as well."""
    labels = results.labels
    objectives = {member.name: member.objective for member in results.members}
    by_objective = len({objectives[name] for name in results.compared}) == len(results.compared)
    frame = geometry_frame(results.geometry)
    frame["sae"] = frame["sae"].map(objectives if by_objective else labels)
    frame["compared_with"] = frame["compared_with"].map(lambda name: labels.get(name, name))
    return frame
