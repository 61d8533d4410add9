"""Text from outside stays text: in commands to copy, in Markdown and LaTeX, and in the names of folders."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sae_lens_e2e.bench.members import Member
from sae_lens_e2e.markdown import code, plain
from sae_lens_e2e.names import check_folder_name
from sae_lens_e2e.publishing.model_card import model_card
from sae_lens_e2e.report.settings import report_command, training_commands
from sae_lens_e2e.report.table import Column, Table
from sae_lens_e2e.sweep import read_sweep
from tests.test_report import an_sae, save
from tests.test_sweep import BASE, sweep_file

NASTY = "a\n# Heading\r\n<img src=x onerror=alert(1)> [x](javascript:alert(1)) ![y](http://z) `b` | c\u2028d"


@pytest.mark.parametrize("write", [plain, code])
def test_text_in_markdown_is_one_line_without_markup(write: Any) -> None:
    text = write(NASTY)
    assert len(text.splitlines()) == 1
    assert "](" not in text or text.startswith("`")
    assert "<img" not in text or text.startswith("`")
    assert text.replace("\\|", "").count("|") == 0
    assert text.strip("`").count("`") == 0


def test_ordinary_text_is_left_as_it_is() -> None:
    for text in ("e2e_ds", "blocks.3.hook_resid_pre", "[0.1, 0.2]", "CE loss increase", "1e-3 — 5 %"):
        assert plain(text) == text
        assert code(text) == f"`{text}`"


def test_a_table_keeps_its_shape_whatever_is_in_it() -> None:
    one = Table("t", NASTY, [Column("SAE"), Column(NASTY)], [[[NASTY, NASTY], ["a", "b"]]], NASTY)
    lines = one.to_markdown().splitlines()
    assert [line.startswith("| ") for line in lines] == [False, False, *[True] * 4]
    assert not any(line.startswith("#") for line in lines)
    assert "<img" not in one.to_markdown()
    assert "\n#" not in one.to_latex()
    # What is in a row of LaTeX stays in it.
    assert sum(line.endswith(r"\\") for line in one.to_latex().splitlines()) == 3


def test_a_model_card_has_no_headings_but_its_own() -> None:
    metadata = {
        "model_name": NASTY,
        "hook_name": NASTY,
        "dataset_path": NASTY,
        "training_architecture": NASTY,
        "objective": {"name": NASTY, NASTY: NASTY},
        "model_from_pretrained_kwargs": {NASTY: NASTY},
    }
    config = {"architecture": NASTY, "d_in": NASTY, "d_sae": 3, "metadata": metadata}
    card = model_card("owner/name", {NASTY: config}, {NASTY: {NASTY: 1.0, "layers": {NASTY: {NASTY: 2.0}}}})
    body = card.split("---\n", 2)[2]
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        *("# owner/name", "## SAEs", "## Figures", "## Data", "## Loading", "## Method")
    ]
    outside_code = "".join(body.split("`")[::2])
    assert "<img" not in outside_code
    assert "](javascript" not in outside_code
    loading = body.split("```")[1]
    compile(loading.removeprefix("python\n"), "card", "exec")
    assert len(loading.strip().splitlines()) == 4


def test_a_folders_name_is_no_second_command(tmp_path: Path) -> None:
    trap = tmp_path / "trapped"
    folder = save(an_sae(), tmp_path / f"sae\ntouch {trap}\n'#")
    unknown = save(an_sae(), tmp_path / f"other\ntouch {trap}\n")
    (unknown / "runner_cfg.json").unlink()
    members = [Member(one.name, str(one), an_sae(), {}) for one in (folder, unknown)]
    commands = [*training_commands(members), report_command([folder], {"title": "a\nb"})]
    assert len("\n".join(commands).splitlines()) == len(commands) == 3
    script = "\n".join(commands).replace("sae-lens-e2e", "printf '%s\\0'")
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert str(folder / "runner_cfg.json") in said.split("\0")
    assert "a\nb" in said.split("\0")
    assert not trap.exists()
    assert shlex.split(report_command(["a b"], {"title": None})) == ["sae-lens-e2e", "report", "a b"]


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".hidden", "a\nb", "", " ", "a\\b", 3, None, "x\0"], ids=repr)
def test_a_name_that_leads_elsewhere_is_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is to be a folder's") as error:
        check_folder_name("name", name)
    assert "\n" not in str(error.value)
    if name is not None:
        with pytest.raises(ValueError, match=r"name: the name .* is to be a folder's"):
            read_sweep(sweep_file(tmp_path, {"seed": [0]}, BASE, name=name))


def test_names_of_points_stay_in_their_folder(tmp_path: Path) -> None:
    grid = {"hook_name": ["blocks.3.hook_resid_pre"], "dataset_path": ["../../x", "a\nb"]}
    names = [point.name for point in read_sweep(sweep_file(tmp_path, grid)).points]
    assert all(Path(name).name == name and name.isprintable() for name in names)
