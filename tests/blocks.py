"""The code blocks of a Markdown page: what each is, whether it is run, and running a page's blocks in order, as a reader would."""

import argparse
import json
import re
import runpy
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parent.parent

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)
_TITLE = re.compile(r'title="([^"]+)"')
# A reader trains, and evaluates, for longer than a test. A page may say how few tokens are enough: `<!-- tested with 4096 tokens -->`.
_SIZES = re.compile(r"\b((?:training_tokens|max[_-]tokens|evaluation_tokens)\W+)[\d_]+")
_FEW, _ENOUGH = 2048, re.compile(r"^<!-- tested with (\d+) tokens -->$", flags=re.MULTILINE)


class Block(NamedTuple):
    """One fenced block."""

    page: Path
    number: int
    line: int
    language: str
    title: str | None
    """The file that a reader would save it as."""
    not_run: str | None
    """Why it is only parsed, if it is."""
    code: str
    n_tokens: int = _FEW
    """On how few it is run."""

    @property
    def name(self) -> str:
        """How a failure names it."""
        return f"{self.page.name}, block {self.number} (line {self.line}, {self.language or 'no language'})"

    @property
    def short(self) -> str:
        """The code with few tokens to train and to evaluate on."""
        return _SIZES.sub(rf"\g<1>{self.n_tokens}", self.code)


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order. One under the comment `<!-- not run: WHY -->` is parsed only."""
    text = page.read_text()
    enough = _ENOUGH.search(text)
    n_tokens = int(enough[1]) if enough else _FEW
    found = []
    for number, match in enumerate(_FENCE.finditer(text), start=1):
        title = _TITLE.search(match["info"])
        line = text.count("\n", 0, match.start("code"))
        code = textwrap.dedent(match["code"])
        found.append(Block(page, number, line, match["language"], title and title[1], match["why"], code, n_tokens))
    return found


def run_page(page: str) -> None:
    """Run a page's blocks in order, with one namespace and in the current folder. Exits by the name of the block that fails."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(Path(page)):
        with _named(block):
            _DO.get(block.language, _unknown)(block, namespace)


@contextmanager
def _named(block: Block) -> Iterator[None]:
    """End by the name of a block, after the traceback of what went wrong in it."""
    try:
        yield
    except BaseException as error:
        traceback.print_exc()
        sys.exit(f"{block.name}: {type(error).__name__}: {error}")


def _python(block: Block, namespace: dict[str, Any]) -> None:
    # Lines are numbered as on the page, for tracebacks.
    code = compile("\n" * block.line + block.short, str(block.page), "exec")
    if block.title is not None:
        Path(block.title).write_text(block.code)
    elif block.not_run is None:
        exec(code, namespace)


def _diff(block: Block, namespace: dict[str, Any]) -> None:
    """Both sides are Python, and what comes out is run."""
    for removed, kept in (("+", "-"), ("-", "+")):
        lines = [line for line in block.code.splitlines() if not line.startswith(removed)]
        side = "\n".join(line[1:] for line in lines)
        compile(side, block.name, "exec")
        if kept == "+":
            _python(block._replace(code=side), namespace)


def _shell(block: Block, namespace: dict[str, Any]) -> None:  # noqa: ARG001
    for command in commands_of(block.short):
        _command(command, block.not_run is None)


def commands_of(script: str) -> list[list[str]]:
    """The commands of a shell script with their arguments, as bash reads them; none of them is run."""
    said = "PATH=/nowhere; command_not_found_handle() { printf '%s\\0' \"$@\"; printf '\\n\\0'; }\n"
    done = subprocess.run(["bash", "-euc", said + script], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"bash does not read it: {done.stderr}")
    commands: list[list[str]] = [[]]
    for part in done.stdout.split("\0")[:-1]:
        if part == "\n":
            commands.append([])
        else:
            commands[-1].append(part)
    return commands[:-1]


def _command(command: list[str], run: bool) -> None:
    """Run one of ours, or parse it; of the others, see that there is what they name."""
    program, *arguments = command
    if program == "sae-lens-e2e":
        _ours(arguments, run)
    elif program == "torchrun":
        module = arguments.index("sae_lens_e2e")
        assert arguments[module - 1] == "-m", f"{command} runs no module"
        _ours(arguments[module + 1 :], run=False)
    elif program == "python":
        _example(*arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(arguments) <= {*targets}, f"the Makefile has no {arguments}"
    elif program == "pip":
        assert arguments[0] == "install", f"{command}: pip {arguments[0]}"
        _check_extras(" ".join(arguments))
    else:
        raise ValueError(f"{program} is no program that the documentation may show without a test that knows it")


def _check_extras(requirement: str) -> None:
    settings = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    for extra in re.findall(r"sae-lens-e2e\[(\w+)\]", requirement):
        assert re.search(rf"^{extra} = ", settings, flags=re.MULTILINE), f"there is no extra {extra}"


class _Parsed(BaseException):
    """Stops a command once its arguments are read."""


@contextmanager
def _parsing_only() -> Iterator[None]:
    """Have the first parser after the one that finds the command stop everything, if it takes its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
        found = parse(self, *arguments, **options)
        if self.prog == "sae-lens-e2e":
            return found
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            yield
        except _Parsed:
            return
        raise AssertionError("its arguments were not parsed")


def _ours(arguments: list[str], run: bool) -> None:
    from sae_lens_e2e.cli import main

    def check() -> None:
        code = main(arguments)
        assert code == 0, f"sae-lens-e2e {' '.join(arguments)} ended with {code}; what it said is above"

    if run:
        return check()
    with _parsing_only():
        check()
    return None


def _example(script: str, *arguments: str) -> None:
    """The arguments of an example, read by its own parser."""
    with _parsing_only(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [Path(script).name, *arguments])
        patch.syspath_prepend((ROOT / script).parent)
        runpy.run_path(str(ROOT / script), run_name="__main__")


def _settings(block: Block, namespace: dict[str, Any]) -> None:  # noqa: ARG001
    read = json.loads if block.language == "json" else yaml.safe_load
    assert isinstance(read(block.code), dict), "it is no mapping of settings"
    if block.title is not None:
        Path(block.title).write_text(block.short)


def _nothing(block: Block, namespace: dict[str, Any]) -> None:
    pass


def _unknown(block: Block, namespace: dict[str, Any]) -> None:  # noqa: ARG001
    raise ValueError(f"nothing is known of {block.language or 'no language'}; name one of {', '.join(_DO)}")


_DO: dict[str, Callable[[Block, dict[str, Any]], None]] = {
    "python": _python,
    "diff": _diff,
    "bash": _shell,
    "yaml": _settings,
    "json": _settings,
    "toml": _nothing,
    "text": _nothing,
}
"""What is done with a block of each language; there are no others."""
