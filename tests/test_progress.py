"""The line about training as it goes on."""

import re
from typing import Any

import pytest

from sae_lens_e2e.training.progress import COLUMNS, Progress, in_words
from tests.models import random_model
from tests.training import make_runner, runner_config

ROW: dict[str, Any] = {
    **{"step": 9, "details/seconds": 1.0, "losses/overall_loss": 3.0, "losses/mse_loss": 12.345, "losses/l1_loss": 0.5},
    **{"losses/kl": 0.21349, "metrics/l0": 23.14, "losses/downstream_mse": 0.0123},
}


def test_losses_have_units_and_what_says_most_comes_first() -> None:
    assert in_words([ROW], 100) == "KL 0.213 nats, L0 23.1, later MSE 0.0123 act², MSE 12.3 act², l1_loss 0.5"


@pytest.mark.parametrize("room", [0, 10, 20, 40, 60])
def test_there_are_as_many_as_there_is_room_for(room: int) -> None:
    said = in_words([ROW], room)
    assert len(said) + 2 <= max(room, 2)
    assert all(re.fullmatch(r"[\w ]+ [\d.]+( nats| act²)?", part) for part in said.split(", ") if part)


def test_of_several_saes_it_is_the_least_and_the_largest() -> None:
    assert in_words([ROW, ROW | {"metrics/l0": 40.0, "losses/kl": 0.5}], 40) == "KL 0.213–0.5 nats, L0 23.1–40"


def test_the_line_fits_and_says_time_left_speed_and_losses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    group = make_runner(runner_config(training_tokens=100 * 48), random_model()).make_group()
    group.first.history.append(ROW)
    with Progress([group]) as progress:
        progress._bar.mininterval = 0
        for _ in range(3):
            progress.update(1200, [group])
    lines = [line.strip() for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "KL" in line]
    assert lines
    for line in lines:
        assert len(line) <= COLUMNS
        assert re.match(
            r"Training +\d+%\|.{6}\| [\d.]+k/4.80k, [\d.]+[kM]? tok/s, \d\d:\d\d left, KL 0.213 nats, L0 23.1(, MSE 12.3 act²)?$",
            line,
        )
