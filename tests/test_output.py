"""Where runs may write."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sae_lens_e2e.output import (
    PARTIAL,
    check_free,
    check_writable,
    claim_output,
    clean_partials,
    replaced_whole,
    write_whole,
    written_whole,
)


def everything_in(folder: Path) -> dict[str, str]:
    """What each file below a folder holds."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_new_and_empty_folders_and_our_own_are_claimed(tmp_path: Path) -> None:
    claim_output(tmp_path / "a" / "new")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a" / "new").mkdir(parents=True)
    claim_output(tmp_path / "a" / "new")
    (tmp_path / "a" / "new" / "runner_cfg.json").write_text(json.dumps({"objective": {"name": "e2e"}}))
    claim_output(tmp_path / "a" / "new")


@pytest.mark.parametrize("content", ['{"lr": 1}', "not json"])
def test_what_is_not_ours_is_refused_unless_it_is_to_be_overwritten(content: str, tmp_path: Path) -> None:
    (tmp_path / "runner_cfg.json").write_text(content)
    with pytest.raises(FileExistsError, match="--overwrite"):
        claim_output(tmp_path)
    claim_output(tmp_path, overwrite=True)


def test_a_folder_with_the_named_file_is_ours(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(FileExistsError):
        claim_output(tmp_path)
    claim_output(tmp_path, made_by="comparison.json")


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file/sae"):
        check_writable(tmp_path / "file" / "sae")


def test_a_folder_that_is_not_free_is_refused_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    check_free(tmp_path / "a" / "new")
    check_free(tmp_path)
    assert not any(tmp_path.iterdir())
    (tmp_path / "runner_cfg.json").write_text(json.dumps({"objective": {"name": "e2e"}}))
    with pytest.raises(FileExistsError, match=r"overwrite=True, or --overwrite"):
        check_free(tmp_path)
    check_free(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder_to_write_to(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        check_free(tmp_path / "file", overwrite)
    assert (tmp_path / "file").read_text() == "in the way"


def test_files_arrive_together_beside_those_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "replaced").write_text("old")
    with written_whole(tmp_path) as partial:
        (partial / "replaced").write_text("new")
        (partial / "added").write_text("added")
        assert (tmp_path / "replaced").read_text() == "old"
        assert not (tmp_path / "added").exists()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"kept": "kept", "replaced": "new", "added": "added"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_arrives_if_writing_fails(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "replaced").write_text("old")
    for folder in (tmp_path / "old", tmp_path / "a" / "b" / "new"):
        with pytest.raises(error), written_whole(folder) as partial:  # noqa: PT012
            (partial / "replaced").write_text("new")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_text() for path in (tmp_path / "old").iterdir()} == {"replaced": "old"}


def test_folders_that_others_write_to_meanwhile_stay(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), written_whole(tmp_path / "a" / "b"):  # noqa: PT012
        (tmp_path / "a" / "theirs").write_text("theirs")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]


def test_a_text_is_written_whole_and_readable_as_any_other_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "report.html", "‖x̂‖")
    write_whole(tmp_path / "new" / "report.html", "λ")
    (tmp_path / "plain").write_text("")
    assert everything_in(tmp_path / "new") == {"report.html": "λ"}
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new/report.html", "plain")]
    assert modes[0] == modes[1]


def test_a_folder_is_replaced_with_all_that_is_in_it(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with replaced_whole(tmp_path / "checkpoints" / "100") as new:
            assert new.name == "100"
            (new / content).write_text(content)
            (new / "inner").mkdir()
            (new / "inner" / "file").write_text(content)
    assert everything_in(tmp_path) == {"checkpoints/100/second": "second", "checkpoints/100/inner/file": "second"}
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("checkpoints/100", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_stays_as_it_was_if_writing_its_replacement_fails(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "100").mkdir()
    (tmp_path / "100" / "old").write_text("old")
    for folder in (tmp_path / "100", tmp_path / "a" / "200"):
        with pytest.raises(error), replaced_whole(folder) as new:  # noqa: PT012
            (new / "half").write_text("half")
            raise error
    assert everything_in(tmp_path) == {"100/old": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["100"]


def test_a_folder_comes_back_if_its_replacement_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "100").mkdir()
    (tmp_path / "100" / "old").write_text("old")
    replace = os.replace

    def refuse_the_new(source: Path, target: Path) -> None:
        if (source / "new").exists():
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_new)
    with pytest.raises(OSError, match="no space left"), replaced_whole(tmp_path / "100") as new:
        (new / "new").write_text("new")
    assert everything_in(tmp_path) == {"100/old": "old"}


def left_by(process: int, folder: Path) -> Path:
    """What a process would leave that is killed while it writes to a folder."""
    with written_whole(folder) as partial:
        name = partial.name.replace(f"-{os.getpid()}-", f"-{process}-")
    (folder / name).mkdir()
    (folder / name / "half").write_text("half")
    return folder / name


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_by(ended.pid, tmp_path)
    write_whole(tmp_path / "new", "new")
    assert everything_in(tmp_path) == {"new": "new"}


def test_what_may_still_be_written_stays(tmp_path: Path) -> None:
    running = left_by(os.getppid(), tmp_path)
    own = left_by(os.getpid(), tmp_path)
    elsewhere, strange = tmp_path / f"{PARTIAL}another-host-999999999-0a1b2c3d", tmp_path / f"{PARTIAL}mine"
    elsewhere.mkdir()
    strange.mkdir()
    clean_partials(tmp_path)
    assert set(tmp_path.iterdir()) == {running, own, elsewhere, strange}
    clean_partials(tmp_path / "missing")
