"""A model handed over computes the same, an environment is made once or not at all, and what goes wrong over there is said here."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer

from sae_lens_e2e import embedded
from sae_lens_e2e.elsewhere.export import export_model
from sae_lens_e2e.elsewhere.host import load_model
from sae_lens_e2e.elsewhere.program import Program
from sae_lens_e2e.publishing.dashboard.run import SAE_DASHBOARD
from sae_lens_e2e.saebench.run import SAE_BENCH
from tests.models import random_model

of_each_program = pytest.mark.parametrize("program", [SAE_DASHBOARD, SAE_BENCH], ids=lambda program: program.name)


# The model


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model has no tokenizer"):
        export_model(random_model(), tmp_path / "model", "blocks.1.hook_resid_pre", 8)
    assert not (tmp_path / "model").exists()


KINDS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "rotary, gated": {"normalization_type": "RMS"},
    "grouped queries, soft caps": {"n_key_value_heads": 2, "attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 9.0},
    "attention only, no norm": {"attn_only": True, "normalization_type": None},
    "bfloat16": {"dtype": torch.bfloat16},
}


def model_of_kind(kind: str) -> HookedTransformer:
    trained = embedded.load_model()
    if kind in ("trained", "processed"):
        if kind == "processed":
            trained.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
        return trained
    made = random_model(**KINDS[kind], d_vocab=1024, n_ctx=64)
    made.set_tokenizer(trained.tokenizer)
    return made.to(made.cfg.dtype)


@pytest.mark.parametrize("kind", ["trained", "processed", *KINDS])
def test_an_exported_model_computes_the_same(tmp_path: Path, kind: str) -> None:
    model = model_of_kind(kind)
    export_model(model, tmp_path / "model", "blocks.1.hook_resid_pre", 64)
    read = load_model(tmp_path / "model", "blocks.1.hook_resid_pre")
    tokens = torch.randint(0, 1024, (3, 64), generator=torch.Generator().manual_seed(0))
    assert read.cfg.dtype == model.cfg.dtype
    assert torch.equal(read(tokens), model(tokens))
    assert read.tokenizer is not None
    assert model.tokenizer is not None
    text = "Once upon a time,\n a little girl"
    assert read.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert read.tokenizer.vocab == model.tokenizer.vocab
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(read.tokenizer, name) == getattr(model.tokenizer, name) == 0


def test_a_model_that_is_read_wrongly_is_noticed(tmp_path: Path) -> None:
    model, folder, hook = embedded.load_model(), tmp_path / "model", embedded.HOOK_NAME
    export_model(model, folder, hook, 64)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"blocks.2.mlp.W_in": weights["blocks.2.mlp.W_in"].flip(0)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"its activation at {hook} differs by [1-9]\d+%"):
        load_model(folder, hook)
    absent = {name: weight for name, weight in weights.items() if name != "blocks.5.mlp.W_in"}
    save_file(absent | {"blocks.5.mlp.W_on": weights["blocks.5.mlp.W_in"]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"other weights .*: blocks.5.mlp.W_in, blocks.5.mlp.W_on"):
        load_model(folder, hook)


# The program


@pytest.mark.parametrize(
    ("program", "module"),
    [(SAE_DASHBOARD, "sae_dashboard"), (SAE_BENCH, "sae_bench")],
    ids=lambda of: getattr(of, "name", ""),
)
def test_what_goes_wrong_over_there_is_said_here(program: Program, module: str, tmp_path: Path) -> None:
    with pytest.raises(
        ChildProcessError, match=rf"^{program.name} failed: ModuleNotFoundError: No module named '{module}'$"
    ):
        program.run({}, tmp_path, Path(sys.executable), verbose=False)


@of_each_program
def test_an_interpreter_without_it_is_refused(program: Program) -> None:
    with pytest.raises(ValueError, match=rf"has no {program.package}; run `.* -m pip install -r .*requirements.txt`"):
        program.checked_python(sys.executable)
    with pytest.raises(ValueError, match="python='/nowhere/python' is no program"):
        program.checked_python("/nowhere/python")


# Its environment


def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ChildProcessError, match=r"cannot make an environment for SAEDashboard: ERROR: .*; make one yourself"
    ):
        SAE_DASHBOARD.own_python()
    assert list(tmp_path.iterdir()) == []


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = SAE_BENCH.own_environment() / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert SAE_BENCH.own_python() == python
