"""The TinyStories example and the demo's parts, run as a user would run them, on the embedded model."""

import json
from pathlib import Path

import pytest

from tests.processes import Done, run_script

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "train_tinystories.py"
SHORT = ["--tokens", "4096", "--evaluation-tokens", "8192", "--d-sae", "128", "--context", "64", "--batch", "8"]
REFERENCE = ROOT.parent / "shared"


def run(*arguments: str, cwd: Path) -> Done:
    """The example in a process of its own, without a network."""
    return run_script(EXAMPLE, *arguments, cwd=cwd, TQDM_DISABLE="1")


@pytest.mark.parametrize("objective", ["local", "e2e", "e2e_ds"])
def test_the_example_trains_on_the_embedded_model_and_prints_its_table(objective: str, tmp_path: Path) -> None:
    done = run(*SHORT, "--objective", objective, "--output", str(tmp_path / "sae"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ("CE loss without the SAE", "CE loss with the SAE", "KL divergence", "L0", "alive features"):
        assert row in done.stdout
    assert "MSE at blocks.5.hook_resid_post" in done.stdout
    assert f"saved to {tmp_path / 'sae'}" in done.stdout
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "standard"


def test_text_in_a_jsonl_file_and_a_folder_of_somebody_elses(tmp_path: Path) -> None:
    stories = [{"text": f"Once upon a time there was a cat named Tom {i}. He liked to play. " * 6} for i in range(400)]
    (tmp_path / "stories.jsonl").write_text("\n".join(json.dumps(story) for story in stories))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("precious")
    arguments = [*SHORT, "--dataset", "stories.jsonl", "--output", "theirs"]
    refused = run(*arguments, cwd=tmp_path)
    assert refused.returncode != 0
    assert "not one of our runs" in refused.stderr.splitlines()[-1]
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == ["thesis.tex"]
    allowed = run(*arguments, "--overwrite", cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    assert (tmp_path / "theirs" / "sae_weights.safetensors").exists()
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "precious"


def test_the_paper_preset_says_that_the_hub_is_out_of_reach(tmp_path: Path) -> None:
    done = run("--preset", "paper", cwd=tmp_path)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "roneneldan/TinyStories-1M" in line and "Hub" in line]
    assert "without --preset" in line


@pytest.mark.skipif(
    not (REFERENCE / "models" / "stories260K").is_dir(), reason="stories260K is not beside this checkout"
)
def test_a_local_transformer_lens_folder_and_a_hugging_face_one(tmp_path: Path) -> None:
    few = (REFERENCE / "data" / "stories.jsonl").read_text().splitlines()[:300]
    (tmp_path / "stories.jsonl").write_text("\n".join(few))
    data = ["--dataset", "stories.jsonl"]
    folder = REFERENCE / "models" / "stories260K"
    hooked = run(
        *SHORT, *data, "--model", str(folder), "--hook", "blocks.3.hook_resid_pre", "--output", "a", cwd=tmp_path
    )
    assert hooked.returncode == 0, hooked.stderr
    automodel = run(
        *SHORT, *data, "--model", f"{folder}/huggingface", "--hook", "model.layers.2", "--output", "b", cwd=tmp_path
    )
    assert automodel.returncode == 0, automodel.stderr
    # The same place in the same model: the loss without the SAE is the same too.
    without = [next(line for line in done.stdout.splitlines() if "without" in line) for done in (hooked, automodel)]
    assert without[0].split("|")[2].strip() == without[1].split("|")[2].strip()
