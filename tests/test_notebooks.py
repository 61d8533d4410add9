"""The notebooks in `examples/` run to the end, on few tokens; what is kept in them is of a whole run, in order."""

import json
from pathlib import Path
from typing import Any

import papermill
import pytest
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from tests.blocks import ROOT
from tests.kernels import launch_copy

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FEW = {"TRAINING_TOKENS": 4096, "FINETUNING_TOKENS": 2048, "EVALUATION_TOKENS": 4096}


def of_each_notebook(test: Any) -> Any:
    return pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)(test)


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


def parameters(notebook: Path) -> str:
    return "".join(next(c for c in cells(notebook, "code") if "parameters" in c["metadata"].get("tags", []))["source"])


@of_each_notebook
def test_runs_to_the_end(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(LocalProvisioner, "launch_kernel", launch_copy)
    few = {name: value for name, value in FEW.items() if f"{name} =" in parameters(notebook)}
    papermill.execute_notebook(
        notebook, tmp_path / notebook.name, few, cwd=tmp_path, kernel_name="python3", progress_bar=False
    )
    # The repository is left as it was: all is written where the notebook was run.
    assert (tmp_path / f"{notebook.stem.removesuffix('_model')}_output").is_dir()


@of_each_notebook
def test_begins_with_where_to_open_it_and_what_to_install(notebook: Path) -> None:
    assert "colab.research.google.com" in "".join(cells(notebook, "markdown")[1]["source"])
    assert '%pip install --quiet "sae-lens-e2e[figures]"' in "".join(cells(notebook, "code")[0]["source"])


@of_each_notebook
def test_keeps_the_outputs_of_one_whole_run(notebook: Path) -> None:
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_tutorial_shows_stories_in_colour() -> None:
    last = cells(ROOT / "examples" / "tutorial.ipynb", "code")[-1]
    assert 'style="background: rgba(' in "".join(last["outputs"][0]["data"]["text/html"])
