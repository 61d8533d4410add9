"""A page as one HTML file, from a template of the room that it is of inside the frame that all pages share."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sae_lens_e2e.output import check_writable

_HERE = Path(__file__).parent


def render(template: Path, mark: str, **values: Any) -> str:
    """The page that a template makes of values, which are text and escaped unless they are `Markup`.

    `template` extends frame.html, and so takes at least its `title`, `lead`, `facts`, `sections` (each with an `id` and a `title`)
    and `footer`. `mark` is the generator that the page's head names, by which `check_page` knows it again.
    """
    css = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    return _environment(template.parent).get_template(template.name).render(mark=mark, css=css, **values)


def check_page(output: Path, mark: str, kind: str) -> None:
    """Check that a page may be written: nothing is there, or a page with this mark.

    Raises ValueError for a name that is not one of HTML, FileExistsError for another file, OSError for a folder that cannot be written.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output={str(output)!r} must end in .html")
    if output.exists() and not _has_mark(output, mark):
        raise FileExistsError(f"output {str(output)!r} exists and is no {kind} of ours; choose another name")
    check_writable(output.parent)


def _has_mark(path: Path, mark: str) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return f'content="{mark}"' in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False


@lru_cache(maxsize=4)
def _environment(folder: Path) -> Environment:
    loader = FileSystemLoader([folder, _HERE])
    return Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True, loader=loader)
