"""In a sweep one bad thing stops one point: what the disk does, what is damaged, and what the failure is called."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.evaluation.files import read_evaluation
from sae_lens_e2e.sweep import failures, folders, read_sweep, run_sweep
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.runner import E2ETrainingRunner
from tests.test_sweep import BASE, sweep_file

GRID = {"seed": [0, 1]}
BAD, GOOD = "seed=0", "seed=1"


def swept(folder: Path, **base: Any) -> tuple[list[str], dict[str, str]]:
    """The points that are in the results, and those that failed."""
    sweep = read_sweep(sweep_file(folder, GRID, BASE | base))
    frame = run_sweep(sweep, folder / "out")
    return list(frame["sae"]) if len(frame) else [], failures(folder / "out", [point.name for point in sweep.points])


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: max(1, file.stat().st_size // 3)])


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def of_the_bad(method: Any, does: Callable[..., None] = full) -> Any:
    """A method of groups or runners that fails for the bad point only."""

    def wrapped(self: Any, *arguments: Any, **settings: Any) -> Any:
        cfg = self.first.cfg if isinstance(self, Group) else self.cfg
        bad = BAD in str(cfg.checkpoint_path)
        return does(self) if bad else method(self, *arguments, **settings)

    return wrapped


@pytest.mark.parametrize(
    ("owner", "method"),
    [(E2ETrainingRunner, "save_outputs"), (Group, "save_checkpoint"), (Group, "log_step"), (Group, "finish")],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_a_disk_that_fills_up_stops_the_point_that_is_written(
    owner: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, of_the_bad(getattr(owner, method)))
    done, failed = swept(tmp_path, n_checkpoints=2)
    assert done == [GOOD]
    assert failed == {BAD: "OSError: [Errno 28] No space left on device"}


def test_a_failure_that_cannot_be_written_down_stops_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(E2ETrainingRunner, "save_outputs", of_the_bad(E2ETrainingRunner.save_outputs))
    monkeypatch.setattr(folders, "write_whole", full)
    assert swept(tmp_path) == ([GOOD], {})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), KeyError("x")])
def test_whatever_a_point_raises_is_its_own(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> None:
        raise error

    monkeypatch.setattr(Group, "end_step", of_the_bad(Group.end_step, fails))
    done, failed = swept(tmp_path)
    assert done == [GOOD]
    assert failed[BAD].startswith(type(error).__name__)


def test_what_the_points_share_fails_them_all_by_name_and_not_those_of_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = PromptBatches.__next__, 0

    def fails_at_first(self: PromptBatches) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise IndexError("index out of range in self")
        return original(self)

    monkeypatch.setattr(PromptBatches, "__next__", fails_at_first)
    sweep = read_sweep(sweep_file(tmp_path, {"context_size": [16, 32], "seed": [0, 1]}))
    frame = run_sweep(sweep, tmp_path / "out")
    assert list(frame["sae"]) == ["context_size=32-seed=0", "context_size=32-seed=1"]
    failed = failures(tmp_path / "out", [point.name for point in sweep.points])
    assert failed == dict.fromkeys(
        ["context_size=16-seed=0", "context_size=16-seed=1"], "IndexError: index out of range in self"
    )


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "cfg.json", "runner_cfg.json"])
def test_a_damaged_file_of_a_trained_point_is_named_and_the_others_evaluated(file: str, tmp_path: Path) -> None:
    swept(tmp_path)
    for name in (BAD, GOOD):
        (tmp_path / "out" / name / "evaluation.json").unlink()
    truncated(tmp_path / "out" / BAD / file)
    done, failed = swept(tmp_path)
    assert done == [GOOD]
    assert f"{BAD}/{file}" in failed[BAD]
    assert "damaged" in failed[BAD]
    assert set(failed) == {BAD}


def test_a_damaged_evaluation_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(tmp_path)
    folder = tmp_path / "out" / BAD
    whole = read_evaluation(folder)
    truncated(folder / "evaluation.json")
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged") as error:
        read_evaluation(folder)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(PromptBatches, "__next__", lambda _: pytest.fail("trained again"))
    assert swept(tmp_path) == ([BAD, GOOD], {})
    again = read_evaluation(folder)
    assert whole is not None
    assert again is not None
    assert again.ce_loss_with_sae == whole.ce_loss_with_sae


@pytest.mark.parametrize(
    "file", ["sae_weights.safetensors", "trainer_state.pt", "activations_store_state.safetensors", "history.csv"]
)
def test_a_damaged_checkpoint_stops_its_point(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, batches = PromptBatches.__next__, 0

    def interrupted_after_three(self: PromptBatches) -> torch.Tensor:
        nonlocal batches
        batches += 1
        self.interrupted = batches == 4
        return original(self)

    monkeypatch.setattr(PromptBatches, "__next__", interrupted_after_three)
    with pytest.raises(InterruptedException):
        swept(tmp_path)
    checkpoint = tmp_path / "out" / BAD / "checkpoints" / "192"
    assert (checkpoint / file).is_file(), sorted(path.name for path in checkpoint.iterdir())
    (checkpoint / file).write_bytes(b"\xff\x00\xfe")
    done, failed = swept(tmp_path)
    assert done == [GOOD]
    assert failed[BAD].startswith(f"ValueError: checkpoint {checkpoint} is damaged (")
    assert "remove it" in failed[BAD]
