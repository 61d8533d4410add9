"""Where runs may write."""

import json
from pathlib import Path

import pytest

from sae_lens_e2e.output import check_free, check_writable, claim_output, written_whole


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
