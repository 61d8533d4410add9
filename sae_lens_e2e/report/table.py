"""A table as data, and the three ways it is written: HTML, Markdown and LaTeX."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_lens_e2e.markdown import one_line_of, plain

NOTHING = "—"
Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A column's title and, if it holds numbers, how they are written."""

    title: str
    format: Callable[[Any], str] | None = None

    def text(self, cell: Cell) -> str:
        """What is in a cell, as it is read."""
        if cell is None or cell != cell:
            return NOTHING
        return self.format(cell) if self.format is not None and not isinstance(cell, str) else str(cell)


@dataclass(frozen=True)
class Table:
    """Rows under columns, with what they are and what to know of them.

    `name` is fit for a file and a label, `groups` are rows that belong together, between which lines are drawn.
    """

    name: str
    title: str
    columns: Sequence[Column]
    groups: Sequence[Sequence[Sequence[Cell]]]
    note: str = ""
    paper: str = field(default="", kw_only=True)
    """The table of the paper in whose shape it is."""

    @property
    def texts(self) -> list[list[list[str]]]:
        """Every cell as it is read, group by group."""
        return [
            [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in group]
            for group in self.groups
        ]

    @property
    def caption(self) -> str:
        """Title and note in one."""
        return f"{self.title}. {self.note}".strip()

    def to_html(self) -> str:
        """A `table` element with a body for each group."""
        kinds = ["" if column.format is None else ' class="number"' for column in self.columns]

        def line(tag: str, texts: Sequence[str]) -> str:
            cells = zip(kinds, texts, strict=True)
            return f"<tr>{''.join(f'<{tag}{kind}>{html.escape(text)}</{tag}>' for kind, text in cells)}</tr>"

        head = f"<thead>{line('th', [column.title for column in self.columns])}</thead>"
        bodies = ["<tbody>" + "\n".join(line("td", row) for row in group) + "</tbody>" for group in self.texts]
        return "\n".join(["<table>", head, *bodies, "</table>"])

    def to_markdown(self) -> str:
        """A GitHub table under its caption; groups have no lines between them there."""
        rows = [[column.title for column in self.columns]]
        rows.append(["---" if column.format is None else "---:" for column in self.columns])
        rows += [row for group in self.texts for row in group]
        lines = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
        return "\n".join([f"**{plain(self.title)}.** {plain(self.note)}".rstrip(), "", *lines, ""])

    def to_latex(self) -> str:
        r"""A `table` environment, for a preamble with \usepackage{booktabs}."""
        alignment = "".join("l" if column.format is None else "r" for column in self.columns)

        def line(texts: Sequence[str]) -> str:
            return " & ".join(map(latex, texts)) + r" \\"

        bodies = ["\n".join(line(row) for row in group) for group in self.texts]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{latex(self.caption)}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{alignment}}}",
                r"\toprule",
                line([column.title for column in self.columns]),
                r"\midrule",
                "\n\\midrule\n".join(bodies),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "λ": r"$\lambda$",
    "‖": r"$\|$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "²": r"$^2$",
    "’": "'",
}
_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def latex(text: str) -> str:
    """Text as LaTeX sets it, a minus before a number as a minus."""
    return _SPECIAL.sub(lambda found: _LATEX[found[0]], re.sub(r"(?<!\w)-(?=\d)", "−", one_line_of(text)))
