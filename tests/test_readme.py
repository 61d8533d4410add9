"""The README is one page, and its snippet gives a stock SAE. That its blocks run, `test_docs` says; that the wheel does, `test_dist`."""

import json
import re
from pathlib import Path

from tests.blocks import ROOT, blocks_of
from tests.processes import run_code, run_stock

README = ROOT / "README.md"
SNIPPETS = [block.short for block in blocks_of(README) if block.language == "python"]


def test_it_is_one_page_with_one_snippet_one_picture_and_one_table_of_results() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 150
    assert len(SNIPPETS) == 1
    assert len(re.findall(r"!\[", text)) == 1
    table, _of_the_documentation = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert "warm start" in table.splitlines()[0]
    assert [row.split("`")[1] for row in table.splitlines()[2:]] == ["topk", "batchtopk", "jumprelu", "standard"]


def test_the_snippet_trains_and_saves_a_stock_sae(tmp_path: Path) -> None:
    done = run_code(SNIPPETS[0], tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = "import sys; sys.modules['sae_lens_e2e'] = None; from sae_lens import SAE; print(SAE.load_from_disk('my_sae').cfg.d_sae)"
    done = run_stock(loaded, cwd=tmp_path)
    assert done.stdout.split()[-1:] == ["1024"], done.stderr
    assert json.loads((tmp_path / "my_sae" / "cfg.json").read_text())["metadata"]["objective"]["name"] == "warm_e2e_ds"
