"""Every code block of README and documentation runs, or is parsed and says why; every link leads somewhere; every public name is documented."""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import pytest

from tests.blocks import ROOT, blocks_of, commands_of
from tests.browser import check_barriers
from tests.processes import Done, run_code

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if blocks_of(page)]


def run_page(page: Path, cwd: Path) -> Done:
    return run_code(f"from tests.blocks import run_page; run_page({str(page)!r})", cwd, TQDM_DISABLE="1")


@pytest.mark.docs
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    done = run_page(page, tmp_path)
    assert done.returncode == 0, f"{page.relative_to(ROOT)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.mark.docs
def test_nothing_on_the_site_is_a_barrier() -> None:
    """As `make docs` has built it; the page for what is not there has addresses of a server."""
    pages = [page for page in sorted((ROOT / "site").rglob("*.html")) if page.name != "404.html"]
    if not pages:
        pytest.skip("the site is not built: make docs")
    check_barriers(*pages)


def test_a_block_that_fails_is_named_with_its_page_and_line(tmp_path: Path) -> None:
    page = tmp_path / "broken.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\nThen\n\n```python\ny = x + 1\nprint(z)\n```\n")
    done = run_page(page, tmp_path)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("broken.md, block 2 (line 9, python): NameError: name 'z'")
    assert f'"{page}", line 11' in done.stderr


@pytest.mark.parametrize(
    ("language", "code", "says"),
    [
        ("python", "import nothing_of_this_name\nx =", "SyntaxError"),
        ("bash", "sae-lens-e2e train --lern_rate 1 --hook_name blocks.3.hook_resid_pre", "ended with 2"),
        ("bash", "sae-lens-e2e evaluate my_sae --max_token 1", "ended with 2"),
        ("bash", "torchrun --nproc-per-node 2 -m sae_lens_e2e sweep a.yaml --togther 2", "ended with 2"),
        ("bash", "python examples/finetune.py --ouput x", "SystemExit"),
        ("bash", "python examples/fine_tune.py", "FileNotFoundError"),
        ("bash", "make docks", "the Makefile has no"),
        ("bash", "pip install 'sae-lens-e2e[figure]'", "there is no extra figure"),
        ("bash", "curl example.org", "curl is no program"),
        ("bash", "sae-lens-e2e objectives 'x", "bash does not read it"),
        ("yaml", "tune: {lr: [1e-3}", "ParserError"),
        ("", "x", "nothing is known of no language"),
    ],
)
def test_a_block_that_is_not_run_is_parsed(language: str, code: str, says: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- not run: needs the Hub -->\n```{language}\n{code}\n```\n")
    done = run_page(page, tmp_path)
    assert done.returncode != 0
    last = done.stderr[done.stderr.index("page.md, block 1 (line 2, ") :]
    assert says in last


def test_what_is_not_run_does_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs the Hub -->\n```python\nopen('a', 'w')\n```\n\n"
        "<!-- not run: needs the Hub -->\n```bash\nsae-lens-e2e convert gpt2-small/6-res_scefr-ajt my_sae\n```\n\n"
        '```python title="b.py"\nx = 1\n```\n\n```python\nimport b\nassert b.x == 1\n```\n'
    )
    done = run_page(page, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "my_sae").exists()


def test_bash_reads_the_commands() -> None:
    script = 'S="--a 1\n --b"\nmake demo  # two\npython x.py $S \\\n  \'{"c": 2}\'\n'
    assert commands_of(script) == [["make", "demo"], ["python", "x.py", "--a", "1", "--b", '{"c": 2}']]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """On GitHub too, where README and CONTRIBUTING are read; the strict build sees to those within the site."""
    for link in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        target, anchor = link
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor[1:] in anchors_of(file), f"{page.name} links to {target}{anchor}"


def anchors_of(page: Path) -> set[str]:
    """The headings of a page as GitHub and mkdocs make anchors of them, which has to be the same."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"[\s]+", "-", heading) for heading in kept}


def test_every_page_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    navigation = settings[settings.index("nav:") : settings.index("markdown_extensions:")]
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def documented() -> dict[str, Any]:
    """What the reference has, by name; a module stands for its public names."""
    found: dict[str, Any] = {}
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE):
            one = resolved(name)
            found[name] = one
            if isinstance(one, ModuleType):
                found |= {f"{name}.{public}": getattr(one, public) for public in public_names(one)}
    return found


def resolved(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def public_names(module: ModuleType) -> list[str]:
    """Its `__all__`, or whatever it defines itself that has no underscore."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return list(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def has_docstring(value: Any) -> bool:
    """Whether a class or function has words of its own; a dataclass without any has its signature."""
    text = inspect.getdoc(value) or ""
    return bool(text) and not text.startswith(f"{value.__name__}(")


ROOMS = (
    "",
    ".apollo",
    ".embedded",
    ".evaluation",
    ".features",
    ".figures",
    ".loading",
    ".objectives",
    ".report",
    ".splice",
    ".sweep",
)


def test_every_public_name_is_in_the_reference() -> None:
    there = {id(value) for value in documented().values()}
    for room in ROOMS:
        module = importlib.import_module(f"sae_lens_e2e{room}")
        missing = [name for name in public_names(module) if id(getattr(module, name)) not in there]
        assert not missing, f"no page of docs/reference has sae_lens_e2e{room}'s {missing}"


def test_every_name_in_the_reference_has_a_docstring() -> None:
    for name, value in documented().items():
        # An alias such as `Replace` is of a class, too, on Python 3.10.
        if get_origin(value) is None and (isinstance(value, ModuleType | type) or inspect.isfunction(value)):
            assert has_docstring(value), f"{name} has no docstring"
        if inspect.isclass(value):
            missing = [member for member in own_members(value) if not inspect.getdoc(getattr(value, member))]
            assert not missing, f"{name} has members without a docstring: {missing}"


def own_members(kind: type) -> list[str]:
    """The public methods and properties that this package brings; what SAELens has is SAELens' to explain."""
    elsewhere = [base for base in kind.__mro__[1:] if not base.__module__.startswith("sae_lens_e2e")]
    own = [
        member
        for member, found in vars(kind).items()
        if inspect.isfunction(found) or isinstance(found, property | classmethod | staticmethod)
    ]
    return [member for member in own if not member.startswith("_") and not any(hasattr(b, member) for b in elsewhere)]
