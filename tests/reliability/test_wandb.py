"""W&B going away, or not being there, costs a warning or says what is wrong before training: no run, and no minutes."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from sae_lens import SAE, LoggingConfig, TopKTrainingSAEConfig
from torch import Tensor

from sae_lens_e2e.cli import main
from sae_lens_e2e.splice import Site
from sae_lens_e2e.sweep import failures, read_sweep, run_sweep
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.trainer import NonFiniteLossError
from tests.servers import WANDB_API_KEY, WandbServer, wandb_server
from tests.test_cli_faults import TRAIN
from tests.test_sweep import BASE, sweep_file
from tests.training import make_multi_runner, make_runner, multi_config, runner_config

LOGGED = LoggingConfig(log_to_wandb=True, wandb_project="stories", run_name="mine", wandb_log_frequency=1)
TAKES_NOT_ALL = "W&B does not take all of the run"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B server for which its client waits a second at most."""
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb_server({}) as here:
        yield here


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been said of W&B so far, in warnings."""
    return lambda: [message for message in caplog.messages if "W&B" in message]


def stopping(server: WandbServer, monkeypatch: pytest.MonkeyPatch, at: int = 3) -> None:
    """Have a server go away when a run asks for its n-th prompts."""
    original, asked = PromptBatches.__next__, 0

    def stop_then_ask(self: PromptBatches) -> Tensor:
        nonlocal asked
        asked += 1
        if asked == at:
            server.stop()
        return original(self)

    monkeypatch.setattr(PromptBatches, "__next__", stop_then_ask)


def config(out: Path, **settings: Any) -> dict[str, Any]:
    """Of five steps; a checkpoint is written, and told to W&B, before the third."""
    return {"logger": LOGGED, "output_path": str(out), "checkpoint_path": str(out / "checkpoints"), **settings}


def test_a_run_is_told_to_a_server_that_stays(
    server: WandbServer, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "60")
    make_runner(runner_config(**config(tmp_path / "out"))).run()
    assert list(server.taken.values()) == ["mine"]
    assert any("file_stream" in path for _, path in server.requests)
    assert said() == []


def test_a_server_that_goes_away_mid_run_costs_one_warning(
    server: WandbServer, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopping(server, monkeypatch)
    runner = make_runner(runner_config(**config(out, n_checkpoints=2)))
    started = time.monotonic()
    trained = runner.run()
    assert time.monotonic() - started < 60
    assert list(server.taken.values()) == ["mine"]
    (warning,) = said()
    assert warning.startswith(TAKES_NOT_ALL)
    assert "wandb sync" in warning
    assert "\n" not in warning
    saved = SAE.load_from_disk(out)
    assert saved.W_dec.equal(trained.W_dec)
    assert len((out / "history.csv").read_text().splitlines()) == 6
    assert json.loads((out / "runner_cfg.json").read_text())["logger"]["log_to_wandb"] is True
    assert wandb.run is None


def test_so_does_one_of_a_joint_run(
    server: WandbServer, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(server, monkeypatch)
    sae = TopKTrainingSAEConfig(d_in=16, d_sae=40, k=4)
    saes = {f"b{block}": (Site.of_sae(f"blocks.{block}.hook_resid_pre"), sae) for block in (1, 2)}
    make_multi_runner(multi_config(saes, **config(tmp_path / "out", objective="e2e", n_checkpoints=2))).run()
    assert [warning[: len(TAKES_NOT_ALL)] for warning in said()] == [TAKES_NOT_ALL]
    assert all(SAE.load_from_disk(tmp_path / "out" / name) is not None for name in saes)


def test_an_error_of_the_run_is_what_is_raised(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(server, monkeypatch)
    with pytest.raises(NonFiniteLossError, match="the loss is"):
        make_runner(runner_config(**config(tmp_path / "out", lr=1e30))).run()
    assert wandb.run is None


def test_a_server_that_is_not_there_is_told_of_before_training(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.stop()
    monkeypatch.setattr(PromptBatches, "__next__", lambda _: pytest.fail("it trains"))
    out = tmp_path / "out"
    flags = [*TRAIN, "--log_to_wandb", "true", "--output_path", str(out), "--checkpoint_path", str(out / "checkpoints")]
    started = time.monotonic()
    assert main(flags) == 2
    assert time.monotonic() - started < 60
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sae-lens-e2e train: ")]
    assert len(lines) == 1
    assert lines[0].startswith("sae-lens-e2e train: W&B does not take the run (Timed out")
    assert "log_to_wandb=False" in lines[0]
    assert not out.exists()


def swept(folder: Path) -> list[str]:
    base = BASE | {"logger": {"log_to_wandb": True, "wandb_project": "stories", "wandb_log_frequency": 1}}
    sweep = read_sweep(sweep_file(folder, {"seed": [0, 1, 2]}, base))
    frame = run_sweep(sweep, folder / "out")
    assert failures(folder / "out", [point.name for point in sweep.points]) == {}
    return list(frame["sae"])


def test_points_of_a_sweep_go_on_without_a_server_that_is_not_there(
    server: WandbServer, tmp_path: Path, said: Any
) -> None:
    server.stop()
    points = ["seed=0", "seed=1", "seed=2"]
    started = time.monotonic()
    assert swept(tmp_path) == points
    # They have waited together.
    assert time.monotonic() - started < 60
    starts = [warning.partition("(")[0] for warning in said()]
    assert sorted(starts) == [f"point {name} is trained without W&B: W&B does not take the run " for name in points]


def test_points_of_a_sweep_go_on_when_it_goes_away(
    server: WandbServer, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(server, monkeypatch)
    points = ["seed=0", "seed=1", "seed=2"]
    assert swept(tmp_path) == points
    assert sorted(server.taken.values()) == points
    assert [warning[: len(TAKES_NOT_ALL)] for warning in said()] == [TAKES_NOT_ALL] * 3


@pytest.mark.usefixtures("server")
def test_no_key_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB_API_KEY[:9])
    with pytest.raises(ConnectionError, match="W&B does not take the run") as error:
        make_runner(runner_config(**config(tmp_path / "out"))).run()
    assert "\n" not in str(error.value)
