"""What the commands' parsers have in common."""

import argparse
from typing import NoReturn

import simple_parsing


class _OneLine:
    """Says what is wrong in one line, where argparse would print the usage of every flag first."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class Parser(_OneLine, argparse.ArgumentParser):
    """For a command with flags of its own."""


class SettingsParser(_OneLine, simple_parsing.ArgumentParser):
    """For a command whose flags are the fields of a config."""
