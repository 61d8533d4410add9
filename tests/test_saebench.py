"""SAEBench: what it says agrees with us, stands in the report beside ours, and what it cannot evaluate is refused early.

What runs SAEBench itself is marked slow, and needs an environment that has it:
    SAE_LENS_E2E_SAEBENCH_PYTHON=/path/to/its/bin/python pytest -m slow tests/test_saebench.py
With the value `make` it is made first, or found in the cache, as it is for users.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE

from sae_lens_e2e import embedded
from sae_lens_e2e.cli import main
from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.loading import load_documents
from sae_lens_e2e.report import make_report
from sae_lens_e2e.saebench import evaluate_with_saebench, read_core_results
from sae_lens_e2e.saebench.results import FILENAME, SHOWN, core_results
from tests.saes import inference_sae

PYTHON = os.environ.get("SAE_LENS_E2E_SAEBENCH_PYTHON")
# Written by SAEBench 0.6.0: `pytest -m slow tests/test_saebench.py -k standard` leaves one in its tmp_path/sae.
RECORDED = Path(__file__).parent / "golden" / FILENAME
CONTEXT, PROMPTS = 32, 32
METADATA = {
    "model_name": "embedded",
    "hook_name": embedded.HOOK_NAME,
    "dataset_path": "embedded",
    "context_size": CONTEXT,
    "prepend_bos": False,
}
TOKENS: dict[str, Any] = {"max_tokens": CONTEXT * PROMPTS, "batch_size_prompts": 16}


def saved_sae(folder: Path, architecture: str = "standard", **metadata: Any) -> SAE[Any]:
    settings = {"d_out": embedded.D_MODEL, "apply_b_dec_to_input": False} if architecture == "transcoder" else {}
    sae = inference_sae(architecture, METADATA | metadata, d_in=embedded.D_MODEL, d_sae=48, **settings)
    sae.save_model(folder)
    return sae


# What is refused before anything is run


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("standard", {"hook_name": "ln_final.hook_normalized"}, r"hook_name='ln_final.* which takes blocks.N"),
        ("standard", {"model_class_name": "HookedMamba"}, "model_class_name='HookedMamba' .* takes HookedTransformer"),
        ("standard", {"seqpos_slice": (1, None)}, r"seqpos_slice=.* takes SAEs of all positions"),
        ("transcoder", {"hook_name_out": "blocks.3.hook_mlp_out"}, "architecture='transcoder' .* no transcoders"),
        ("standard", {"context_size": 512}, "context_size=512 is longer than the model's, 256"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    architecture: str, metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved_sae(tmp_path / "sae", architecture, **metadata)
    before = sorted(path.name for path in (tmp_path / "sae").iterdir())
    with pytest.raises(ValueError, match=message) as raised:
        evaluate_with_saebench([tmp_path / "sae"], **TOKENS)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == before


def test_an_interpreter_that_has_it_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_sae(tmp_path / "sae")
    assert main(["saebench", str(tmp_path / "sae"), "--python", "/nowhere/python"]) == 2
    assert "python='/nowhere/python' is no program" in capsys.readouterr().err


# What it found


def beside(folder: Path, **changed: Any) -> dict[str, Any]:
    """Leave what SAEBench wrote of another SAE beside this one."""
    written = json.loads(RECORDED.read_text())
    written["eval_config"] |= changed
    (folder / FILENAME).write_text(json.dumps(written))
    return written["eval_result_metrics"]


def test_its_figures_have_our_names(tmp_path: Path) -> None:
    assert read_core_results(tmp_path) is None
    metrics = beside(tmp_path)
    found = read_core_results(tmp_path)
    assert found is not None
    assert (found.dataset, found.context_size, found.n_tokens) == ("embedded", CONTEXT, CONTEXT * PROMPTS)
    losses = metrics["model_performance_preservation"]
    assert found.ce_loss_increase == losses["ce_loss_with_sae"] - losses["ce_loss_without_sae"] > 0
    assert found.kl == metrics["model_behavior_preservation"]["kl_div_with_sae"] > 0
    assert found.l0 == metrics["sparsity"]["l0"] > 1
    assert (found.ce_loss_score, found.cosine) == (
        losses["ce_loss_score"],
        metrics["reconstruction_quality"]["cossim"],
    )
    assert found.fraction_alive == metrics["misc_metrics"]["frac_alive"]


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"eval_config": {}, "eval_result_metrics": {}}'])
def test_a_file_that_is_not_its(text: str, tmp_path: Path) -> None:
    (tmp_path / FILENAME).write_text(text)
    with pytest.raises(
        ValueError, match=r"saebench_core.json' is no result of SAEBench's core evaluation; run saebench again"
    ):
        read_core_results(tmp_path)


def reported(folder: Path) -> tuple[str, str | None]:
    """The report's page, and its table of SAEBench's figures."""
    page = make_report(
        [folder], folder.parent / "report.html", measures=["evaluation"], figures=[], verbose=False, **TOKENS
    )
    table = page.with_name("report_data") / "tables" / "saebench.md"
    return page.read_text(), table.read_text() if table.exists() else None


def test_the_report_has_them_beside_ours(tmp_path: Path) -> None:
    saved_sae(tmp_path / "sae")
    assert reported(tmp_path / "sae")[1] is None
    metrics = beside(tmp_path / "sae")
    page, table = reported(tmp_path / "sae")
    assert "SAEBench’s core evaluation" in page
    assert table is not None
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]]
    # Every figure twice, ours first.
    assert len(cells) == 3 + 2 * len(SHOWN)
    assert cells[3 + 2 * SHOWN.index("l0") + 1] == f"{metrics['sparsity']['l0']:.1f}"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dataset": "other"}, "1,024 tokens of other in prompts of 32"),
        ({"context_size": 64}, "in prompts of 64; run `sae-lens-e2e saebench`"),
    ],
)
def test_those_of_other_tokens_are_not(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    saved_sae(tmp_path / "sae")
    beside(tmp_path / "sae", **changed)
    page, table = reported(tmp_path / "sae")
    assert table is None
    assert "What SAEBench found of sae is left out: it is of" in page
    assert says in page


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    saved_sae(tmp_path / "sae")
    (tmp_path / "sae" / FILENAME).write_text("{}")
    page, table = reported(tmp_path / "sae")
    assert table is None
    assert "What SAEBench found of sae is left out" in page


# SAEBench itself


@pytest.fixture
def python() -> str | None:
    if PYTHON is None:
        pytest.skip(
            "SAE_LENS_E2E_SAEBENCH_PYTHON is not set: give it the interpreter of an environment with sae-bench, or 'make'"
        )
    return None if PYTHON == "make" else PYTHON


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_it_agrees_with_us(architecture: str, python: str | None, tmp_path: Path) -> None:
    # What SAEBench leaves out of its means, special tokens, ours leave out as well then.
    sae = saved_sae(tmp_path / "sae", architecture, exclude_special_tokens=True)
    files = evaluate_with_saebench([tmp_path / "sae"], python=python, verbose=False, **TOKENS)
    assert files == {"sae": tmp_path / "sae" / FILENAME}
    theirs = core_results(json.loads(files["sae"].read_text()))
    held_out = load_documents("embedded")[1]
    ours = evaluate(sae, embedded.load_model(), held_out, **TOKENS)
    assert (theirs.dataset, theirs.n_tokens) == ("embedded", ours.n_tokens)
    for name in SHOWN:
        expected = ours.at_hook.cosine if name == "cosine" else getattr(ours, name)
        assert getattr(theirs, name) == pytest.approx(expected, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_the_command_evaluates_a_sweep_and_leaves_nothing_else(
    python: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        saved_sae(tmp_path / "sweep" / name)
    options = ["--max-tokens", str(CONTEXT * PROMPTS), *(["--python", python] if python else [])]
    assert main(["saebench", str(tmp_path / "sweep"), *options]) == 0
    assert f"{tmp_path / 'sweep' / 'two' / FILENAME}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "sweep").glob("*/*")) == sorted(
        2 * ["cfg.json", "sae_weights.safetensors", FILENAME]
    )
