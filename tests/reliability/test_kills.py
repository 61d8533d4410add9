"""A run that is killed with SIGKILL, at any moment, and started again ends as one that was not: every file."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.conftest import SURVIVED, TRIED
from tests.reliability.killed import content, duration, finished
from tests.reliability.runs import RUNS

STRAIGHT: dict[str, tuple[float, dict[str, Any]]] = {}


@pytest.fixture(params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def straight(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, Any]]:
    """How long the run takes, and what it leaves."""
    if name not in STRAIGHT:
        out = tmp_path_factory.mktemp(name) / "out"
        STRAIGHT[name] = duration(RUNS[name], out), content(out)
    return STRAIGHT[name]


@contextmanager
def counted(name: str, kills: int) -> Iterator[None]:
    TRIED[name] += kills
    yield
    SURVIVED[name] += kills


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [file for file in expected if found[file] != expected[file]] == []


def killed_at_random(name: str, out: Path, straight: tuple[float, dict[str, Any]], seed: int, kills: int) -> None:
    """Kill a run again and again, then let it end."""
    seconds, expected = straight
    chance = random.Random(seed)
    for _ in range(kills):
        finished(RUNS[name], out, killed_after=chance.uniform(0.1, 1.0) * seconds)
    assert finished(RUNS[name], out)
    assert_same(content(out), expected)


def killed_at_a_move(name: str, out: Path, straight: tuple[float, dict[str, Any]], number: int) -> bool:
    """Kill a run in the place of its n-th move of a file, then let it end; whether there was such a move."""
    ended = finished(RUNS[name], out, at_move=number)
    if not ended:
        assert finished(RUNS[name], out)
    assert_same(content(out), straight[1])
    return not ended


def test_killed_at_random_moments(name: str, straight: tuple[float, dict[str, Any]], tmp_path: Path) -> None:
    with counted(name, 2):
        killed_at_random(name, tmp_path / "out", straight, seed=0, kills=2)


# The first move is a checkpoint's; the files of the output come after those.
@pytest.mark.parametrize("number", [2, 7, 9])
def test_killed_while_saving(name: str, straight: tuple[float, dict[str, Any]], number: int, tmp_path: Path) -> None:
    if name not in ("tokenised", "joint"):
        pytest.skip("the long tests have it")
    with counted(name, 1):
        killed_at_a_move(name, tmp_path / "out", straight, number)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_again_and_again(name: str, straight: tuple[float, dict[str, Any]], seed: int, tmp_path: Path) -> None:
    with counted(name, 5):
        killed_at_random(name, tmp_path / "out", straight, seed, kills=5)


@pytest.mark.long
def test_killed_at_every_move(name: str, straight: tuple[float, dict[str, Any]], tmp_path: Path) -> None:
    number, moved = 0, True
    while moved:
        number += 1
        with counted(f"{name}, saving", 1):
            moved = killed_at_a_move(name, tmp_path / str(number) / "out", straight, number)
    assert number > 5
