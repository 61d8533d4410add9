"""What the commands' parsers have in common."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

import simple_parsing

from sae_lens_e2e.devices import check_device

_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w.-]+)")


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name adds of the known one that looks like it, if any does."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def device(name: str) -> str:
    """A device that this machine has, as the value of a flag."""
    try:
        check_device("--device", name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


class _OneLine:
    """Says what is wrong in one line, where argparse would print the usage of every flag first."""

    def error(self, message: str) -> NoReturn:
        unknown = _UNKNOWN.match(message)
        raise ValueError(
            message + (nearest(unknown[1], getattr(self, "_option_string_actions", ())) if unknown else "")
        )


class Parser(_OneLine, argparse.ArgumentParser):
    """For a command with flags of its own."""


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Give a command that loads the model in an SAE's metadata the flag by which all that they say is done."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="load the model with whatever the SAE's metadata say, even if that runs code of the model's repository",
    )


class SettingsParser(_OneLine, simple_parsing.ArgumentParser):
    """For a command whose flags are the fields of a config."""
