"""The command line: help, config files, what is refused, and a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAEConfig,
)
from safetensors.torch import load_file

from sae_lens_e2e import (
    E2E,
    E2EDownstream,
    E2EMultiRunnerConfig,
    E2ERunnerConfig,
    Local,
    load_apollo_sae,
    save_for_neuronpedia,
)
from sae_lens_e2e.cli import main
from sae_lens_e2e.cli.train import config_file_flags, parse_train
from sae_lens_e2e.evaluation.files import read_evaluation, read_together
from sae_lens_e2e.evaluation.measures import MEASURES, SUMMARY
from sae_lens_e2e.loading.saes import load_saes
from tests.apollo import HOOK, golden_parameters, run_config, write_run
from tests.processes import run_fresh
from tests.test_loading import hugging_face_folder


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
    cfg, overwrite, _ = parse_train([*flags.split(), "--objective", '{"name": "e2e", "kl_coefficient": 2}'])
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
        model_kwargs={"padding_side": "right", "scale": 1e-05},
        lr=1e-05,
        logger=LoggingConfig(log_to_wandb=False, run_name="again"),
        verbose=False,
    )
    path = tmp_path / f"cfg{suffix}"
    path.write_text(json.dumps(original.to_dict()))
    cfg, *_ = parse_train(["--config", str(path)])
    assert cfg.to_dict() == original.to_dict()
    overridden: Any
    overridden, *_ = parse_train(["--config", str(path), "--lr", "0.5", "--d_sae", "64", "--objective", "e2e"])
    assert (overridden.lr, overridden.sae.d_sae, overridden.objective) == (0.5, 64, E2E())


def test_yaml_as_one_would_write_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "hook_name: blocks.3.hook_resid_pre\nobjective: {name: local, mse_coefficient: 1e-2}\nsae:\n  architecture: standard\n  d_in: 64\n"
        "  d_sae: 128\n  l1_coefficient: 5e-1\nlogger:\n  log_to_wandb: false\n"
    )
    cfg: Any
    cfg, *_ = parse_train(["--config", str(path)])
    assert (cfg.hook_name, cfg.sae.l1_coefficient, cfg.logger.log_to_wandb) == ("blocks.3.hook_resid_pre", 0.5, False)
    assert cfg.objective == Local(mse_coefficient=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "e3e"], ["objective", "'e3e'", "e2e_ds"]),
        (["--objectve", "e2e"], ["--objectve"]),
        (["--architecture", "topk", "--l1_coefficient", "1"], ["--l1_coefficient"]),
        (["--train_batch_size_tokens", "100"], ["train_batch_size_tokens=100", "4096"]),
        (["--config", "no_such_file.yaml"], ["no file", "no_such_file.yaml"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--objective", '{"a": ' + "[" * 3000], ["--objective", "nested more than 50 deep"]),
        (["--model_kwargs", "[" * 3000], ["--model_kwargs", "nested more than 50 deep"]),
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
    done = run_fresh("-m", "sae_lens_e2e.cli", "objectives")
    assert (done.returncode, "e2e_ds" in done.stdout) == (0, True)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints when it succeeds."""
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with when it does not."""
    assert main(list(arguments)) == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(f"sae-lens-e2e {arguments[0]}: ")
    ]
    return line


def embedded_sae(folder: Path) -> Path:
    """A small SAE for the embedded model, with all that its metadata should say."""
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=96, apply_b_dec_to_input=False))
    metadata = {
        "model_name": "embedded",
        "dataset_path": "embedded",
        "hook_name": "blocks.3.hook_resid_pre",
        "context_size": 32,
        "prepend_bos": True,
        "objective": {"name": "e2e"},
    }
    return save_for_neuronpedia(sae, folder, frequency=torch.full((96,), 0.25), **metadata)


def test_convert_writes_what_saelens_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", run_config(), {HOOK: golden_parameters("e2e_ds")})
    assert f"{HOOK}: {tmp_path / 'out'}" in said(capsys, "convert", str(run), str(tmp_path / "out"))
    assert torch.equal(SAE.load_from_disk(tmp_path / "out").W_enc, load_apollo_sae(run).W_enc)
    assert "exists" in refused(capsys, "convert", str(run), str(tmp_path / "out"))
    said(capsys, "convert", str(run), str(tmp_path / "out"), "--overwrite", "--neuronpedia-id", "tiny/2-mine")
    assert SAE.load_from_disk(tmp_path / "out").cfg.metadata.neuronpedia_id == "tiny/2-mine"


def test_convert_gives_each_of_several_saes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "blocks.3.hook_resid_pre"
    config = run_config({"saes.sae_positions": [HOOK, other]})
    run = write_run(tmp_path / "run", config, {HOOK: golden_parameters("e2e_ds"), other: golden_parameters("local")})
    said(capsys, "convert", str(run), str(tmp_path / "both"))
    assert {folder.name for folder in (tmp_path / "both").iterdir()} == {HOOK, other}
    said(capsys, "convert", str(run), str(tmp_path / "one"), "--hook-name", other)
    assert SAE.load_from_disk(tmp_path / "one").cfg.metadata.hook_name == other
    line = refused(capsys, "convert", str(run), str(tmp_path / "none"), "--hook-name", "blocks.0.hook_resid_pre")
    assert f"holds SAEs at {HOOK}, {other} only" in line
    assert not (tmp_path / "none").exists()


def test_convert_carries_a_saelens_folder_over_with_its_sparsity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded_sae(tmp_path / "sae")
    said(capsys, "convert", str(folder), str(tmp_path / "out"), "--dataset-path", "elsewhere")
    assert SAE.load_from_disk(tmp_path / "out").cfg.metadata.dataset_path == "elsewhere"
    sparsity = load_file(tmp_path / "out" / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(10**sparsity, torch.full((96,), 0.25))
    assert "n_samples=800" in refused(capsys, "convert", str(folder), str(tmp_path / "out2"), "--n-samples", "800")


def test_evaluate_prints_a_row_each_keeps_the_figures_and_lists_what_it_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded_sae(tmp_path / "sae")
    flags = ("--max-tokens", "256", "--batch-size-prompts", "4")
    out = said(capsys, "evaluate", str(folder), *flags)
    assert str(folder) in out
    assert all(MEASURES[name].title in out for name in SUMMARY)
    assert read_evaluation(folder) is not None
    assert main(["evaluate", str(folder), str(tmp_path / "none"), *flags]) == 2
    captured = capsys.readouterr()
    assert str(folder) in captured.out
    assert f"{tmp_path / 'none'} was skipped" in captured.err


def test_a_sweep_and_a_report_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = {
        "base": {
            "model_name": "embedded",
            "dataset_path": "embedded",
            "hook_name": "blocks.3.hook_resid_pre",
            "context_size": 16,
            "store_batch_size_prompts": 2,
            "train_batch_size_tokens": 32,
            "training_tokens": 96,
            "sae": {"architecture": "standard", "d_in": 64, "d_sae": 96},
        },
        "grid": [{"objective": ["local", "e2e"], "sae.l1_coefficient": [0.1, 0.2]}, {"seed": 1, "sae.d_in": 32}],
        "evaluation": {"max_tokens": 256, "batch_size_prompts": 4},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    out = tmp_path / "out"
    assert main(["sweep", str(tmp_path / "sweep.yaml"), str(out)]) == 2
    captured = capsys.readouterr()
    assert "1 of 5 points failed" in captured.err
    assert "d_in=32-seed=1: ValueError: sae.d_in=32 does not fit" in captured.err
    assert "e2e-l1_coefficient=0.2" in captured.out
    # A sentence for L0, alive features and CE increase of e2e against local, or why there is none.
    assert len([line for line in captured.out.splitlines() if line.endswith(".") and "e2e" in line]) == 3
    page = tmp_path / "report.html"
    flags = (
        "--max-tokens",
        "256",
        "--batch-size-prompts",
        "4",
        "--measures",
        "evaluation",
        "--figures",
        "pareto",
        "--output",
        str(page),
    )
    assert str(page) in said(capsys, "report", str(out), *flags)
    assert "<html" in page.read_text()
    assert "'nothing'" in refused(capsys, "report", str(out), "--measures", "nothing", "--output", str(page))


def test_dashboard_and_upload_refuse_what_they_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no SAE" in refused(capsys, "dashboard", str(tmp_path))
    folder = embedded_sae(tmp_path / "sae")
    assert "n_features=97" in refused(capsys, "dashboard", str(folder), "--n-features", "97")
    line = refused(capsys, "dashboard", str(folder), "--model", "gpt2-small")
    assert "dataset 'embedded' is on this machine and model 'gpt2-small' is not" in line
    assert "two folders have the same name" in refused(capsys, "upload", "me/saes", str(folder), str(folder))
    assert "has no owner" in refused(capsys, "upload", "saes", str(folder))


def test_train_takes_the_embedded_model_and_a_file_of_stories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--model_name embedded --hook_name blocks.3.hook_resid_pre --d_in 64 --d_sae 96 --context_size 16 --verbose false"
    flags += " --store_batch_size_prompts 2 --train_batch_size_tokens 64 --training_tokens 192 --log_to_wandb false"
    paths = [
        "--dataset_path",
        str(rows(tmp_path)),
        "--output_path",
        str(tmp_path / "out"),
        "--checkpoint_path",
    ]
    said(capsys, "train", *flags.split(), *paths)
    assert SAE.load_from_disk(tmp_path / "out").cfg.d_sae == 96


def rows(folder: Path) -> Path:
    """A file of token rows."""
    path = folder / "rows.jsonl"
    Dataset.from_list([{"input_ids": [0, *range(5, 20)]} for _ in range(12)]).to_json(str(path))
    return path


def joint_settings(folder: Path) -> dict[str, Any]:
    """A run of two SAEs as one would write it down."""
    return {
        "model_name": "embedded",
        "dataset_path": str(rows(folder)),
        "objective": {"name": "e2e", "kl_coefficient": 2},
        "saes": {
            "late": {"architecture": "standard", "d_in": 64, "d_sae": 80, "l1_coefficient": 0.5},
            "early": {"architecture": "topk", "d_in": 64, "d_sae": 96, "k": 4},
        },
        "hook_names": {"late": "blocks.3.hook_resid_pre", "early": "blocks.1.hook_mlp_out"},
        "context_size": 16,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 32,
        "training_tokens": 96,
        "exclude_special_tokens": [7],
        "checkpoint_path": None,
        "output_path": str(folder / "out"),
        "logger": {"log_to_wandb": False, "run_name": "both"},
    }


def written(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


class TestSeveralTogether:
    def test_a_folder_of_them_is_evaluated_each_alone_and_all_together(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = joint_settings(tmp_path) | {"dataset_path": "embedded"}
        said(capsys, "train", "--config", str(written(tmp_path / "run.yaml", settings)))
        out = str(tmp_path / "out")
        table = said(capsys, "evaluate", out, "--max-tokens", "256", "--batch-size-prompts", "4")
        for name in ("late", "early"):
            assert f"{out}/{name}" in table
            assert read_evaluation(tmp_path / "out" / name) is not None
        found = read_together(out)
        assert found is not None
        assert [one.saes for one in found.together] == [("early",), ("early", "late")]
        lines = table.split("in order of depth:")[1].splitlines()
        assert [line.split()[1] for line in lines[2:4]] == ["blocks.1.hook_mlp_out", "blocks.3.hook_resid_pre"]

    def test_a_file_trains_them_and_the_runs_own_config_again(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said(capsys, "train", "--config", str(written(tmp_path / "run.yaml", joint_settings(tmp_path))))
        saes = load_saes(tmp_path / "out")
        assert list(saes) == ["late", "early"]
        assert [sae.cfg.d_sae for sae in saes.values()] == [80, 96]
        again = tmp_path / "again"
        said(capsys, "train", "--config", str(tmp_path / "out" / "runner_cfg.json"), "--output_path", str(again))
        for name, sae in load_saes(again).items():
            assert torch.equal(sae.W_enc, saes[name].W_enc)
        # A run of ours may be written over, and nothing else.
        said(capsys, "train", "--config", str(again / "runner_cfg.json"))
        (tmp_path / "novel").mkdir()
        (tmp_path / "novel" / "one.txt").write_text("chapter one")
        flags = ("--config", str(again / "runner_cfg.json"), "--output_path")
        assert "--overwrite" in refused(capsys, "train", *flags, str(tmp_path / "novel"))
        assert "is the folder of one SAE" in refused(capsys, "train", *flags, str(again / "late"), "--overwrite")

    def test_what_the_file_says_and_flags_override(self, tmp_path: Path) -> None:
        path = written(tmp_path / "run.yaml", joint_settings(tmp_path))
        cfg: Any
        cfg, overwrite, _ = parse_train(["--config", str(path), "--overwrite"])
        assert isinstance(cfg, E2EMultiRunnerConfig)
        assert overwrite
        assert (cfg.objective, cfg.exclude_special_tokens, cfg.logger.run_name) == (E2E(2), [7], "both")
        assert cfg.hook_names_per_sae == joint_settings(tmp_path)["hook_names"]
        assert cfg.saes["late"].to_dict()["l1_coefficient"] == 0.5
        flags = ["--lr", "5e-4", "--objective", "e2e", "--max_grad_norm", "10", "--device", "cpu", "--run_name", "mine"]
        heads = ["--hook_names", "{late: blocks.3.attn.hook_z, early: blocks.1.hook_mlp_out}"]
        cfg, *_ = parse_train(["--config", str(path), *flags, *heads, "--hook_head_indices", "{late: 1}"])
        assert (cfg.lr, cfg.objective, cfg.max_grad_norm, cfg.logger.run_name) == (5e-4, E2E(), 10, "mine")
        assert isinstance(cfg, E2EMultiRunnerConfig)
        assert cfg.sites["late"].head_index == 1

    @pytest.mark.parametrize("suffix", [".json", ".yaml"])
    def test_a_config_comes_back_as_it_was(self, suffix: str, tmp_path: Path) -> None:
        original = E2EMultiRunnerConfig(
            saes={
                "a": BatchTopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, dtype="float64"),
                "b": StandardTrainingSAEConfig(d_in=4, d_sae=8, l1_coefficient=0.1),
            },
            hook_names={"a": "blocks.1.hook_resid_pre", "b": "blocks.1.attn.hook_z"},
            hook_head_indices={"b": 2},
            objective=E2EDownstream(kl_coefficient=1.5, downstream_hooks=("blocks.2.hook_resid_pre",)),
            context_size=16,
            seqpos_slice=(1, -1),
            store_batch_size_prompts=2,
            train_batch_size_tokens=28,
            checkpoint_path=None,
            model_kwargs={"padding_side": "right", "scale": 1e-05},
            lr=1e-05,
            model_class_name="AutoModelForCausalLM",
            logger=LoggingConfig(log_to_wandb=False, run_name="again"),
        )
        (tmp_path / f"cfg{suffix}").write_text(json.dumps(original.to_dict()))
        cfg, *_ = parse_train(["--config", str(tmp_path / f"cfg{suffix}")])
        assert cfg.to_dict() == original.to_dict()

    @pytest.mark.parametrize(
        ("changes", "flags", "words"),
        [
            ({}, ["--k", "8"], ["--k is a setting of one SAE", "under saes"]),
            ({}, ["--architecture", "topk"], ["--architecture", "under saes"]),
            ({}, ["--sae.dtype=float64"], ["--sae.dtype", "under saes"]),
            ({}, ["--hook_name", "x"], ["--hook_name", "under hook_names"]),
            ({}, ["--lrr", "1"], ["--lrr", "did you mean --lr?"]),
            ({"max_grad_nrom": 1}, [], ["--max_grad_nrom", "did you mean --max_grad_norm?"]),
            ({"hook_head_index": 1}, [], ["--hook_head_index", "under hook_head_indices"]),
            ({"saes": {"a": {"architecture": "topk", "kk": 3}}}, [], ["saes.a.kk", "topk", "did you mean k?"]),
            ({"saes": {"a": {"architecture": "topq"}}}, [], ["saes.a.architecture='topq'", "did you mean topk?"]),
            ({"saes": {"a": {"d_in": 64}}}, [], ["saes.a has no architecture", "standard"]),
            ({"saes": {"a": {"architecture": "topk", "d_in": 64}}}, [], ["saes.a: ", "d_sae"]),
            ({"saes": [1]}, [], ["saes=[1] is not a mapping"]),
            ({"hook_names": {"late": "x"}}, [], ["hook_names", "early"]),
            ({"model_class_name": "TransformerBridge"}, [], ["model_class_name='TransformerBridge'", "'embedded'"]),
            ({"model_from_pretrained_kwargs": {"fold_ln": True}}, [], ["model_from_pretrained_kwargs", "'fold_ln'"]),
        ],
    )
    def test_what_is_refused(
        self,
        changes: dict[str, Any],
        flags: list[str],
        words: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = written(tmp_path / "run.yaml", joint_settings(tmp_path) | changes)
        line = refused(capsys, "train", "--config", str(path), *flags)
        for word in words:
            assert word in line
        assert not (tmp_path / "out").exists()

    def test_help(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = written(tmp_path / "run.yaml", joint_settings(tmp_path))
        with pytest.raises(SystemExit):
            main(["train", "--config", str(path), "--help"])
        text = capsys.readouterr().out
        for flag in ("--saes", "--hook_names", "--objective", "--max_grad_norm"):
            assert flag in text
        for hidden in ("--evaluator", "--_hook_names_per_sae", "--l1_coefficient"):
            assert hidden not in text


@pytest.mark.parametrize(
    ("asked", "had", "hook"),
    [
        ("HookedTransformer", "AutoModelForCausalLM", "transformer.h.0"),
        ("AutoModelForCausalLM", "AutoModelForCausalLM", "transformer.h.0"),
        ("TransformerBridge", "TransformerBridge", "blocks.1.hook_resid_pre"),
    ],
)
def test_the_metadata_name_the_class_that_a_folder_gave(
    asked: str, had: str, hook: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = hugging_face_folder(tmp_path / "model")
    flags = "--d_in 16 --d_sae 24 --context_size 16 --store_batch_size_prompts 2 --train_batch_size_tokens 32"
    flags += f" --training_tokens 64 --log_to_wandb false --verbose false --objective e2e --hook_name {hook}"
    flags += f" --model_class_name {asked} --model_name {folder} --dataset_path {rows(tmp_path)}"
    said(capsys, "train", *flags.split(), "--output_path", str(tmp_path / "out"), "--checkpoint_path")
    recorded = SAE.load_from_disk(tmp_path / "out").cfg.metadata
    assert (recorded.model_name, recorded.model_class_name) == (str(folder), had)
    assert recorded.model_from_pretrained_kwargs == {}
    settings = json.loads((tmp_path / "out" / "runner_cfg.json").read_text())
    assert (settings["model_class_name"], settings["model_from_pretrained_kwargs"]) == (had, {})
    again = str(tmp_path / "again")
    said(capsys, "train", "--config", str(tmp_path / "out" / "runner_cfg.json"), "--output_path", again)
    assert SAE.load_from_disk(again).cfg.metadata.model_class_name == had
