"""Where runs may write."""

import json
from pathlib import Path

import pytest

from sae_lens_e2e.output import check_writable, claim_output


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
