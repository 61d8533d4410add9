"""The command line: help, config files, what is refused, and a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sae_lens import BatchTopKTrainingSAEConfig, LoggingConfig

from sae_lens_e2e import E2E, E2EDownstream, E2ERunnerConfig
from sae_lens_e2e.cli import config_file_flags, main, parse_train


def test_help_fits_eighty_columns_and_names_our_fields(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--objective", "--max_grad_norm", "--architecture", "--config", "--hook_name", "--l1_coefficient"):
        assert flag in text
    # Choices and metavars cannot be broken; everything that is prose must be.
    options = text[text.index("options:") :]
    assert max(len(line) for line in options.splitlines() if line.startswith(" " * 20)) <= 80


def test_help_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "train" in text
    assert "objectives" in text


def test_objectives_are_listed_with_their_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives"]) == 0
    text = capsys.readouterr().out
    for name in ("local", "e2e", "e2e_ds"):
        assert f"{name}  (from sae-lens-e2e)" in text
    assert "downstream_coefficient=2.5" in text


def test_flags_make_the_config_they_name() -> None:
    flags = "--architecture topk --d_in 64 --d_sae 256 --k 8 --lr 0.01 --hook_name blocks.2.hook_resid_pre --context_size 32"
    flags += " --store_batch_size_prompts 4 --train_batch_size_tokens 256 --max_grad_norm 10 --log_to_wandb false --sae.dtype float32"
    cfg, overwrite = parse_train([*flags.split(), "--objective", '{"name": "e2e", "kl_coefficient": 2}'])
    assert isinstance(cfg, E2ERunnerConfig)
    assert (cfg.sae.architecture(), cfg.sae.k, cfg.sae.d_sae) == ("topk", 8, 256)
    assert cfg.objective == E2E(kl_coefficient=2)
    assert (cfg.lr, cfg.max_grad_norm, cfg.logger.log_to_wandb, overwrite) == (0.01, 10, False, False)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_runs_own_config_file_repeats_it_and_flags_override(suffix: str, tmp_path: Path) -> None:
    original = E2ERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, dtype="float64"),
        objective=E2EDownstream(kl_coefficient=1.5, downstream_hooks=("blocks.2.hook_resid_pre",)),
        hook_name="blocks.1.hook_resid_pre",
        context_size=16,
        seqpos_slice=(1, -1),
        store_batch_size_prompts=2,
        train_batch_size_tokens=28,
        exclude_special_tokens=[3, 4],
        checkpoint_path=None,
        model_kwargs={"padding_side": "right"},
        logger=LoggingConfig(log_to_wandb=False, run_name="again"),
        verbose=False,
    )
    path = tmp_path / f"cfg{suffix}"
    path.write_text(json.dumps(original.to_dict()))
    cfg, _ = parse_train(["--config", str(path)])
    assert cfg.to_dict() == original.to_dict()
    overridden, _ = parse_train(["--config", str(path), "--lr", "0.5", "--d_sae", "64", "--objective", "e2e"])
    assert (overridden.lr, overridden.sae.d_sae, overridden.objective) == (0.5, 64, E2E())


def test_yaml_as_one_would_write_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "hook_name: blocks.3.hook_resid_pre\nobjective: local\nsae:\n  architecture: standard\n  d_in: 64\n  d_sae: 128\n"
        "  l1_coefficient: 0.5\nlogger:\n  log_to_wandb: false\n"
    )
    cfg, _ = parse_train(["--config", str(path)])
    assert (cfg.hook_name, cfg.sae.l1_coefficient, cfg.logger.log_to_wandb) == ("blocks.3.hook_resid_pre", 0.5, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "e3e"], ["objective", "'e3e'", "e2e_ds"]),
        (["--objectve", "e2e"], ["--objectve"]),
        (["--architecture", "topk", "--l1_coefficient", "1"], ["--l1_coefficient"]),
        (["--train_batch_size_tokens", "100"], ["train_batch_size_tokens=100", "4096"]),
        (["--config", "no_such_file.yaml"], ["--config", "no_such_file.yaml"]),
        (["--lr", "fast"], ["--lr", "fast"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("sae-lens-e2e train: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_config_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a mapping"):
        config_file_flags(tmp_path / "list.json")
    (tmp_path / "broken.json").write_text('{"lr": ')
    with pytest.raises(ValueError, match="neither YAML nor JSON"):
        config_file_flags(tmp_path / "broken.json")


def test_an_output_of_somebody_elses_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "novel.txt").write_text("chapter one")
    assert main(["train", "--model_name", "no/such-model", "--output_path", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["novel.txt"]


def test_the_installed_command_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sae_lens_e2e.cli", "objectives"], capture_output=True, text=True, check=True
    )
    assert "e2e_ds" in done.stdout
