"""Counts what was tried, and says so at the end."""

from collections import Counter

import pytest

TRIED: Counter[str] = Counter()
SURVIVED: Counter[str] = Counter()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table of the kills: by run, tried, survived, lost."""
    if not TRIED:
        return
    terminalreporter.section("kills")
    terminalreporter.line(f"{'run':<24}{'tried':>8}{'survived':>10}{'lost':>8}")
    for name in sorted(TRIED):
        lost = TRIED[name] - SURVIVED[name]
        terminalreporter.line(f"{name:<24}{TRIED[name]:>8}{SURVIVED[name]:>10}{lost:>8}")
