"""What the commands' parsers have in common."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

import simple_parsing

_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w.-]+)")


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name adds of the known one that looks like it, if any does."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _OneLine:
    """Says what is wrong in one line, where argparse would print the usage of every flag first."""

    def error(self, message: str) -> NoReturn:
        unknown = _UNKNOWN.match(message)
        raise ValueError(
            message + (nearest(unknown[1], getattr(self, "_option_string_actions", ())) if unknown else "")
        )


class Parser(_OneLine, argparse.ArgumentParser):
    """For a command with flags of its own."""


class SettingsParser(_OneLine, simple_parsing.ArgumentParser):
    """For a command whose flags are the fields of a config."""
