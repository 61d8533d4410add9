"""What a run may find in its folder or checkpoint: its own work, that of other settings, another process."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sae_lens import LoggingConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from safetensors.torch import load_file, save_file

from sae_lens_e2e import E2ERunnerConfig, E2ETrainingRunner
from sae_lens_e2e.output import LOCK, PARTIAL, check_writable, claim_output, locked
from sae_lens_e2e.splice import Site
from sae_lens_e2e.training.trainer import NonFiniteLossError
from tests.models import dataset_of, random_model, random_tokens
from tests.processes import run_code
from tests.training import EVERY_STEP, make_multi_runner, make_runner, multi_config, runner_config

STEPS = 8
STANDARD = StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02)


def config(folder: Path, **settings: Any) -> E2ERunnerConfig[Any]:
    paths = {"output_path": str(folder / "out"), "checkpoint_path": str(folder / "checkpoints"), "n_checkpoints": 1}
    # In a folder of a name that is known.
    return runner_config(**(paths | {"training_tokens": STEPS * 48, "logger": EVERY_STEP} | settings))


def run(cfg: E2ERunnerConfig[Any], overwrite: bool = False) -> None:
    make_runner(cfg, dataset=dataset_of(random_tokens(64, cfg.context_size, 61))).run(overwrite)


def rates(folder: Path) -> list[float]:
    return pd.read_csv(folder / "out" / "history.csv")["details/current_learning_rate"].tolist()


def checkpoint_of(folder: Path) -> str:
    (checkpoint,) = (folder / "checkpoints").glob("*/*")
    return str(checkpoint)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("straight")
    run(config(folder))
    return checkpoint_of(folder)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "local"}, "objective.name=.local., .* .e2e_ds."),
    "seed": ({"seed": 1}, "seed=1, .* 42"),
    "hook": (
        {"hook_name": "blocks.2.hook_resid_pre"},
        "hook_name='blocks.2.hook_resid_pre', .*'blocks.1.hook_resid_pre'",
    ),
    "context": ({"context_size": 24}, "context_size=24, .* 12"),
    "batch": ({"train_batch_size_tokens": 96}, "train_batch_size_tokens=96, .* 48"),
    "micro-batch": ({"store_batch_size_prompts": 4}, "store_batch_size_prompts=4, .* 2"),
    "dataset": ({"dataset_path": "other"}, "dataset_path='other', .* ''"),
    "l1": ({"sae": replace(STANDARD, l1_coefficient=0.5)}, r"sae.l1_coefficient=0.5, .* 0.02"),
    "width": ({"sae": replace(STANDARD, d_sae=80)}, "sae.d_sae=80, .* 40"),
    "architecture": ({"sae": TopKTrainingSAEConfig(d_in=16, d_sae=40, k=3)}, "sae.architecture='topk', .* 'standard'"),
    "clipping": ({"max_grad_norm": 5.0}, "max_grad_norm=5.0, .* 1.0"),
}


@pytest.mark.parametrize("other", OTHER)
def test_a_run_does_not_go_on_with_other_settings(checkpoint: str, other: str, tmp_path: Path) -> None:
    settings, message = OTHER[other]
    with pytest.raises(ValueError, match=message) as error:
        make_runner(config(tmp_path, resume_from_checkpoint=checkpoint, **settings))
    assert "resume_from_checkpoint=" in str(error.value)


def test_a_joint_run_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    sites = {
        "a": (Site.of_sae("blocks.1.hook_resid_pre"), STANDARD),
        "b": (Site.of_sae("blocks.2.hook_resid_pre"), STANDARD),
    }
    make_multi_runner(multi_config(sites, objective="e2e", checkpoint_path=str(tmp_path), n_checkpoints=1)).run()
    (found,) = tmp_path.glob("*/*")
    sites["b"] = (sites["b"][0], replace(STANDARD, l1_coefficient=0.5))
    with pytest.raises(ValueError, match=r"saes\.b\.l1_coefficient=0\.5, .* 0\.02"):
        make_multi_runner(multi_config(sites, objective="e2e", resume_from_checkpoint=str(found)))


SCHEDULES: dict[str, dict[str, Any]] = {
    "warm-up and decay": {"lr_warm_up_steps": 5, "lr_decay_steps": 3},
    "cosine": {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 2},
    "restarts": {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 2},
    "lower": {"lr": 1e-5},
    "longer": {"lr_decay_steps": 3, "training_tokens": (STEPS + 4) * 48},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_goes_on_follows_the_schedule_it_is_given(checkpoint: str, schedule: str, tmp_path: Path) -> None:
    settings = SCHEDULES[schedule]
    run(config(tmp_path / "straight", n_checkpoints=0, **settings))
    run(config(tmp_path / "resumed", resume_from_checkpoint=checkpoint, **settings))
    done = int(Path(checkpoint).name) // 48
    straight, resumed = rates(tmp_path / "straight"), rates(tmp_path / "resumed")
    assert len(straight) == len(resumed)
    assert resumed[done:] == straight[done:]
    recorded = json.loads((tmp_path / "resumed" / "out" / "runner_cfg.json").read_text())
    assert all(recorded[name] == value for name, value in settings.items())


def test_a_rate_of_almost_nothing_moves_almost_nothing(checkpoint: str, tmp_path: Path) -> None:
    run(config(tmp_path, resume_from_checkpoint=checkpoint, lr=1e-12))
    before, after = (
        load_file(f"{checkpoint}/sae_weights.safetensors"),
        load_file(tmp_path / "out/sae_weights.safetensors"),
    )
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-9, rtol=0)


def test_training_that_ended_before_the_checkpoint_is_refused(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training_tokens=96, but .* is after 240; set it to more"):
        run(config(tmp_path, resume_from_checkpoint=checkpoint, training_tokens=96))


def test_the_advice_for_a_loss_that_is_not_finite_works(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"objective": "local", "n_checkpoints": 4, "lr_warm_up_steps": 6}
    with pytest.raises(NonFiniteLossError, match=r"step 3: .* Resume from the last checkpoint with a lower lr"):
        run(config(tmp_path, lr=3e3, **settings))
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint.endswith("/96")
    run(config(tmp_path, resume_from_checkpoint=checkpoint, lr=1e-3, **settings))
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "sae_weights.safetensors").values())


@pytest.mark.parametrize("where", ["W_dec", "exp_avg"])
def test_a_checkpoint_that_is_blown_up_is_refused_with_better_advice_than_a_rate(
    where: str, checkpoint: str, tmp_path: Path
) -> None:
    bad = shutil.copytree(checkpoint, tmp_path / "bad")
    if where == "W_dec":
        weights = load_file(bad / "sae_weights.safetensors")
        weights["W_dec"][3, 4] = float("nan")
        save_file(weights, bad / "sae_weights.safetensors")
    else:
        state = torch.load(bad / "trainer_state.pt")
        state["optimizer"]["state"][0]["exp_avg"][0] = float("inf")
        torch.save(state, bad / "trainer_state.pt")
    with pytest.raises(ValueError, match=f"bad'.*{where} holds values that are not finite .* from an earlier check"):
        run(config(tmp_path, resume_from_checkpoint=str(bad), lr=1e-5))
    assert not (tmp_path / "out").exists()


def test_one_of_numbers_too_large_to_go_on_from_is_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_checkpoints": STEPS + 2}
    with pytest.raises(NonFiniteLossError, match=r"step 1: .* Resume from the last checkpoint with a lower lr"):
        run(config(tmp_path, lr=1e30, **settings))
    advice = "It is so in .*48' already, whatever the lr; resume from an earlier checkpoint"
    with pytest.raises(NonFiniteLossError, match=advice):
        run(config(tmp_path, resume_from_checkpoint=checkpoint_of(tmp_path), lr=1e-9, **settings))


def test_a_finished_sae_is_not_overwritten_by_one_of_other_settings_unasked(tmp_path: Path) -> None:
    run(config(tmp_path))
    weights = (tmp_path / "out" / "sae_weights.safetensors").read_bytes()
    run(config(tmp_path, device="cpu", n_checkpoints=0))
    with pytest.raises(
        FileExistsError, match=r"holds a run with seed=42, and this one has 1; .*overwrite=True\), or --overwrite"
    ):
        run(config(tmp_path, seed=1))
    assert (tmp_path / "out" / "sae_weights.safetensors").read_bytes() == weights
    run(config(tmp_path, seed=1), overwrite=True)
    assert (tmp_path / "out" / "sae_weights.safetensors").read_bytes() != weights
    (tmp_path / "out" / "runner_cfg.json").unlink()
    with pytest.raises(FileExistsError, match="holds an SAE of another run"):
        run(config(tmp_path, seed=1))


def test_a_run_that_goes_on_may_write_over_what_it_goes_on_from(tmp_path: Path) -> None:
    run(config(tmp_path))
    longer = (STEPS + 2) * 48
    run(config(tmp_path, resume_from_checkpoint=checkpoint_of(tmp_path), training_tokens=longer, n_checkpoints=0))
    assert len(rates(tmp_path)) == STEPS + 2


def test_a_joint_run_overwrites_nothing_of_another(tmp_path: Path) -> None:
    run(config(tmp_path, output_path=str(tmp_path / "joint" / "a")))
    sites = {
        "a": (Site.of_sae("blocks.1.hook_resid_pre"), STANDARD),
        "b": (Site.of_sae("blocks.2.hook_resid_pre"), STANDARD),
    }
    with pytest.raises(FileExistsError, match=r"joint/a' holds an SAE of another run"):
        make_multi_runner(multi_config(sites, objective="e2e", output_path=str(tmp_path / "joint"))).run()
    make_multi_runner(multi_config(sites, objective="e2e", output_path=str(tmp_path / "own"))).run()
    make_multi_runner(multi_config(sites, objective="e2e", output_path=str(tmp_path / "own"))).run()
    with pytest.raises(FileExistsError, match="holds a run with hook_name=None, and this one has 'blocks"):
        run(config(tmp_path, output_path=str(tmp_path / "own"), objective="e2e"))
    with pytest.raises(FileExistsError, match=r"with seed=42, and this one has 1"):
        make_multi_runner(multi_config(sites, objective="e2e", output_path=str(tmp_path / "own"), seed=1)).run()


def test_a_folder_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as was_left:
        assert not was_left
        with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on .* is at work in .*out'; wait for it"):
            run(config(tmp_path))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    run(config(tmp_path))
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_lock_that_a_killed_process_left_stands_in_nobody_s_way(tmp_path: Path) -> None:
    code = f"import os; from sae_lens_e2e.output import locked\nwith locked({str(tmp_path)!r}): os.kill(os.getpid(), 9)"
    assert run_code(code, tmp_path.parent).returncode == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    claim_output(tmp_path)
    with locked(tmp_path) as was_left:
        assert was_left
    check_writable(tmp_path)


@pytest.mark.parametrize("left", ["checkpoints", "partial", "both"])
def test_what_a_killed_run_left_is_known_as_ours(tmp_path: Path, left: str) -> None:
    if left != "checkpoints":
        (tmp_path / f"{PARTIAL}somewhere-1-ab").mkdir()
    if left != "partial":
        checkpoint = tmp_path / "checkpoints" / "run" / "240"
        checkpoint.mkdir(parents=True)
        (checkpoint / "runner_cfg.json").write_text('{"objective": {}}')
        (checkpoint / "sae_weights.safetensors").touch()
        (checkpoint.parent / f"{PARTIAL}somewhere-1-ab").mkdir()
    claim_output(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is not one of our runs"):
        claim_output(tmp_path)


def test_a_setting_that_another_version_had_not_is_passed_over(checkpoint: str, tmp_path: Path) -> None:
    old = shutil.copytree(checkpoint, tmp_path / "old")
    recorded = json.loads((old / "runner_cfg.json").read_text())
    del recorded["objective"]["mse_coefficient"], recorded["autocast_lm"], recorded["sae"]["normalize_activations"]
    (old / "runner_cfg.json").write_text(json.dumps(recorded | {"no_more": 1}))
    make_runner(config(tmp_path, resume_from_checkpoint=str(old)))


def test_logging_may_change(checkpoint: str) -> None:
    make_runner(
        runner_config(
            training_tokens=STEPS * 48,
            resume_from_checkpoint=checkpoint,
            logger=LoggingConfig(log_to_wandb=False, run_name="other"),
        )
    )


def test_other_documents_are_refused_as_other_settings_are(checkpoint: str, tmp_path: Path) -> None:
    def resumed(held_out: float | None) -> None:
        data = dataset_of(random_tokens(64, 12, 61))
        cfg = config(tmp_path, resume_from_checkpoint=str(tmp_path / "kept"))
        E2ETrainingRunner(cfg, override_dataset=data, override_model=random_model(), held_out=held_out)

    cfg_file = shutil.copytree(checkpoint, tmp_path / "kept") / "cfg.json"
    # What nobody has said cannot be other.
    resumed(0.5)
    recorded = json.loads(cfg_file.read_text())
    recorded["metadata"]["held_out"] = 0.1
    cfg_file.write_text(json.dumps(recorded))
    resumed(0.1)
    for other in (0.5, 0.0, None):
        with pytest.raises(ValueError, match=f"held_out={other}, but resume_from_.* is of a run with 0.1; set it to"):
            resumed(other)
