"""The page: one HTML file that needs nothing beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_lens_e2e import pages
from sae_lens_e2e.report.drawings import Drawing
from sae_lens_e2e.report.findings import Finding
from sae_lens_e2e.report.table import Table

MARK = "sae-lens-e2e report"
"""How a report is told from other pages: the generator that its head names."""

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One part of the page, with an entry in the contents."""

    id: str
    title: str
    texts: Sequence[str] = ()
    parts: Sequence[dict[str, Any]] = field(default=())


def finding_list(findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings, each with what the paper says."""
    return {"kind": "findings", "findings": findings}


def figure(drawing: Drawing, more: str = "") -> dict[str, Any]:
    """A figure, and what to say after its caption."""
    # A script ends at the first closing tag, wherever that is.
    json = drawing.plotly.replace("<", "\\u003c")
    return {"kind": "drawing", "drawing": drawing, "json": Markup(json), "more": f" {more}" if more else ""}


def table(one: Table) -> dict[str, Any]:
    """A table, with its Markdown and LaTeX to copy."""
    sources = [
        (f"{one.name}.md", "Markdown", one.to_markdown()),
        (f"{one.name}.tex", "LaTeX, for booktabs", one.to_latex()),
    ]
    return {"kind": "table", "table": one, "html": Markup(one.to_html()), "sources": sources}


def plain_table(one: Table) -> dict[str, Any]:
    """A table that nobody needs to copy."""
    return {"kind": "table", "table": one, "html": Markup(one.to_html()), "sources": ()}


def folded_table(one: Table) -> dict[str, Any]:
    """A long table, to be opened."""
    return {"kind": "folded", "title": one.title, "html": Markup(one.to_html())}


def named_list(rows: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Things by name, and what to say of each."""
    return {"kind": "list", "rows": rows}


def code(title: str, text: str) -> dict[str, Any]:
    """Text to copy."""
    return {"kind": "code", "title": title, "text": text}


def render(title: str, lead: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], footer: str) -> str:
    """The page as HTML, plotly's script in it once if there is a figure."""
    has_figures = any(part.get("json") for section in sections for part in section.parts)
    return pages.render(
        _HERE / "page.html",
        MARK,
        title=title,
        lead=lead,
        facts=facts,
        sections=sections,
        footer=footer,
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()) if has_figures else "",
    )
