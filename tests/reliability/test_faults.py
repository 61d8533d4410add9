"""What the system refuses, takes away or has two of: a line that says so, nothing half-written, and a checkpoint to go on from."""

import os
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_lens import SAE

from tests.reliability.killed import content
from tests.reliability.process import Ended, Running, ended, waiting_for
from tests.reliability.runs import last_checkpoint
from tests.test_sweep import BASE

STEPS, TOKENS = 8, 64
TRAIN = [
    *("train", "--model_name", "embedded", "--dataset_path", "embedded", "--hook_name", "blocks.3.hook_resid_pre"),
    *("--architecture", "topk", "--d_in", "64", "--d_sae", "96", "--k", "8", "--objective", "e2e"),
    *("--context_size", "16", "--store_batch_size_prompts", "2", "--train_batch_size_tokens", str(TOKENS)),
    *("--training_tokens", str(STEPS * TOKENS), "--n_checkpoints", "4", "--log_to_wandb", "false"),
    *("--wandb_log_frequency", "1", "--verbose", "false"),
]


def train_flags(folder: Path, *flags: str) -> list[str]:
    out = folder / "out"
    return [*TRAIN, "--output_path", str(out), "--checkpoint_path", str(out / "checkpoints"), *flags]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves to which nothing happens."""
    folder = tmp_path_factory.mktemp("straight")
    assert ended(folder, *train_flags(folder)).code == 0
    return content(folder / "out")


def assert_refused(found: Ended, *says: str, command: str = "train") -> None:
    """Exit code 2, after one line that says all of it."""
    assert found.code == 2, found.said
    assert found.last.startswith(f"sae-lens-e2e {command}: "), found.said
    for part in says:
        assert part in found.last
    assert "--debug" not in found.last
    assert not any(line.startswith("Traceback") for line in found.said)


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".partial-" in path.name]


def files_of_at_most(n_bytes: int, _: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


# Weights have 50 kB, the optimizer's state twice that.
@pytest.mark.parametrize("n_bytes", [20_000, 80_000], ids=["weights", "optimizer"])
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(
    n_bytes: int, straight: dict[str, Any], tmp_path: Path
) -> None:
    found = ended(tmp_path, *train_flags(tmp_path), happening=partial(files_of_at_most, n_bytes), at=4)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert_refused(found, f"cannot write to '{checkpoints}", "see whether the disk is full")
    left = last_checkpoint(checkpoints)
    assert left is not None
    assert partials(tmp_path) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]
    assert ended(tmp_path, *train_flags(tmp_path, "--resume_from_checkpoint", str(left))).code == 0
    assert content(tmp_path / "out") == straight


def test_an_output_that_finds_no_room_is_not_there_at_all(straight: dict[str, Any], tmp_path: Path) -> None:
    found = ended(tmp_path, *train_flags(tmp_path), happening=partial(files_of_at_most, 10_000), at=STEPS)
    out = tmp_path / "out"
    assert_refused(found, f"cannot write to '{out}'", "File too large")
    assert partials(tmp_path) == []
    assert [path.name for path in out.iterdir()] == ["checkpoints"]
    left = last_checkpoint(out / "checkpoints")
    assert ended(tmp_path, *train_flags(tmp_path, "--resume_from_checkpoint", str(left))).code == 0
    assert content(out) == straight


def test_a_point_that_finds_no_room_stops_no_other(tmp_path: Path) -> None:
    sweep = {"base": BASE, "grid": {"sae.d_sae": [4096, 96]}, "evaluation": {"max_tokens": 256}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    arguments = ["sweep", str(tmp_path / "sweep.yaml"), str(tmp_path / "out")]
    found = ended(tmp_path, *arguments, happening=partial(files_of_at_most, 500_000))
    assert_refused(found, "1 of 2 points failed", "d_sae=4096: OSError: cannot write to", command="sweep")
    assert SAE.load_from_disk(tmp_path / "out" / "d_sae=96").cfg.d_sae == 96
    assert (tmp_path / "out" / "d_sae=96" / "evaluation.json").is_file()
    assert [path.name for path in (tmp_path / "out" / "d_sae=4096").glob("*.safetensors")] == []
    assert partials(tmp_path) == []
    assert ended(tmp_path, *arguments).code == 0


def never(_: Path) -> None:
    raise AssertionError("it trains")


@pytest.mark.parametrize("which", ["output_path", "checkpoint_path"])
@pytest.mark.parametrize("place", ["/proc/none", "file", "read-only"])
def test_what_cannot_be_written_is_refused_before_training(which: str, place: str, tmp_path: Path) -> None:
    if place == "read-only":
        if os.getuid() == 0:
            pytest.skip("root may write anywhere")
        (tmp_path / place).mkdir(mode=0o500)
    if place == "file":
        (tmp_path / place).touch()
    folder = Path("/proc/none") if place.startswith("/") else tmp_path / place / "inner"
    found = ended(tmp_path, *train_flags(tmp_path), f"--{which}", str(folder), happening=never)
    assert_refused(found, f"cannot write to {which.removesuffix('_path')} folder '{folder}")
    assert not (tmp_path / "out").exists()


def remove(what: str, folder: Path) -> None:
    shutil.rmtree(folder / what)


@pytest.mark.parametrize("what", ["out", "out/checkpoints"])
def test_a_folder_that_is_deleted_in_mid_run_is_made_again(what: str, straight: dict[str, Any], tmp_path: Path) -> None:
    assert ended(tmp_path, *train_flags(tmp_path), happening=partial(remove, what), at=5).code == 0
    assert content(tmp_path / "out") == straight
    left = [path for path in (tmp_path / "out" / "checkpoints").glob("*/*") if path.is_dir()]
    assert 0 < len(left) < 4
    assert ended(tmp_path, *train_flags(tmp_path, "--resume_from_checkpoint", str(left[0]))).code == 0
    assert content(tmp_path / "out") == straight


def wait_for_leave(folder: Path) -> None:
    (folder / "training").touch()
    waiting_for((folder / "leave").exists)


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_second_process_is_told_of_the_first_which_goes_on(
    command: str, straight: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": BASE, "grid": {"seed": [0]}}))
    arguments = {
        "train": train_flags(tmp_path),
        "sweep": ["sweep", str(tmp_path / "sweep.yaml"), str(tmp_path / "out")],
    }[command]
    first = Running(tmp_path, *arguments, happening=wait_for_leave, at=2)
    waiting_for((tmp_path / "training").exists)
    assert_refused(ended(tmp_path, *arguments), "process ", "is at work in", "wait for it", command=command)
    (tmp_path / "leave").touch()
    assert first.end().code == 0
    if command == "train":
        assert content(tmp_path / "out") == straight
    # Of its own kind, it may be done again.
    assert ended(tmp_path, *arguments).code == 0
