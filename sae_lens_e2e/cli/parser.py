"""What the commands' parsers have in common."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

_WIDTH = 72
_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w.-]+)")


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name adds of the known one that looks like it, if any does."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def device(name: str) -> str:
    """A device that this machine has, as the value of a flag."""
    if name == "cpu":
        return name
    # Here, because it takes torch to tell.
    from sae_lens_e2e.devices import check_device

    try:
        check_device("--device", name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


class OneLine(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage of every flag first; its help ends with an example."""

    def __init__(self, *arguments: Any, example: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._example = example

    def error(self, message: str) -> NoReturn:
        """Raise it as a ValueError, with the flag that an unknown one looks like."""
        unknown = _UNKNOWN.match(message)
        raise ValueError(message + (nearest(unknown[1], self._option_string_actions) if unknown else ""))

    def format_help(self) -> str:
        """argparse's, with the example, which can be copied into a shell."""
        return f"{super().format_help()}\nexample:\n{_in_lines(self._example)}\n"


def _in_lines(command: str) -> str:
    """A command over as many lines as it takes, none of which parts a flag from its value."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > _WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {part}".strip()
    return "  " + " \\\n    ".join(lines)


class Parser(OneLine):
    """For a command with flags of its own."""


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Give a command that loads the model in an SAE's metadata the flag by which all that they say is done."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="load the model with whatever the SAE's metadata say, even if that runs code of the model's repository",
    )
