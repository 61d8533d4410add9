"""How what is drawn is told apart: by colour, and in grey by marker and dash as well."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's palette, told apart by the colour-blind; without yellow, which is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Each for matplotlib and for plotly.
MARKERS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("P", "cross"),
    ("X", "x"),
    ("p", "pentagon"),
)
DASHES = (
    ("-", "solid"),
    ("--", "dash"),
    (":", "dot"),
    ("-.", "dashdot"),
    ((0, (7, 2)), "longdash"),
    ((0, (5, 1, 1, 1, 1, 1)), "10px,2px,2px,2px,2px,2px"),
)

# The same objective looks the same in every figure, whichever others are beside it.
_RESERVED = {"local": 0, "e2e": 1, "e2e_ds": 2}


@dataclass(frozen=True)
class Style:
    """The look of one SAE or objective, in the words of matplotlib and of plotly."""

    colour: str
    marker: str
    plotly_marker: str
    dash: Any
    plotly_dash: str


def style(index: int) -> Style:
    """The look of the `index`th of what is drawn; the first six differ in everything, the first 168 in something."""
    marker, dash = MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)]
    return Style(COLOURS[index % len(COLOURS)], *marker, *dash)


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A look for each name: its own for an objective of the paper, the next that is free for any other."""
    names = list(dict.fromkeys(names))
    taken = {name: _RESERVED[name] for name in names if name in _RESERVED}
    free = (index for index in range(len(names) + len(_RESERVED)) if index not in taken.values())
    return {name: style(taken[name] if name in taken else next(free)) for name in names}
