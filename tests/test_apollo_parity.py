"""The engine against what Apollo's own library computed: losses, gradients, ten optimizer steps, and a run from its config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from safetensors.torch import load_file

from sae_lens_e2e import (
    ApolloTrainingSAE,
    ApolloTrainingSAEConfig,
    E2EDownstream,
    E2ERunnerConfig,
    E2ETrainer,
    Local,
    Objective,
)
from sae_lens_e2e.apollo import load_apollo_model
from sae_lens_e2e.splice import frozen
from tests.apollo import run_config, write_run, write_tiny4l
from tests.models import D_MODEL, GOLDEN, N_CTX, apollo_tiny4l
from tests.servers import hub
from tests.training import EVERY_STEP, make_runner, make_trainer, runner_config, tried_step

HOOK = "blocks.2.hook_resid_pre"
DOWNSTREAM = ("blocks.2.hook_resid_post", "blocks.3.hook_resid_pre", "blocks.3.hook_resid_post")
OBJECTIVES: dict[str, Objective] = {
    # Apollo's reconstruction is a mean over d_in where SAELens' is a sum.
    "local": Local(mse_coefficient=1 / D_MODEL),
    "e2e_ds": E2EDownstream(kl_coefficient=0.5, downstream_coefficient=2.5, downstream_hooks=DOWNSTREAM),
}
D_SAE, BATCH = 8 * D_MODEL, 8
SPARSITY = 0.3


def apollo_runner(run: str, parameters: dict[str, torch.Tensor], prefix: str) -> Any:
    cfg = runner_config(
        logger=EVERY_STEP,
        sae=ApolloTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, sparsity_coefficient=SPARSITY),
        objective=OBJECTIVES[run],
        max_grad_norm=10.0,
        hook_name=HOOK,
        context_size=N_CTX,
        store_batch_size_prompts=BATCH,
        train_batch_size_tokens=2 * BATCH * N_CTX,
        training_tokens=20 * BATCH * N_CTX,
        lr=1.0,
    )
    sae = ApolloTrainingSAE(cfg.sae)
    sae.load_state_dict(to_ours(parameters, prefix))
    return make_runner(cfg, apollo_tiny4l(), sae=sae)


def to_ours(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Apollo's parameters (or their gradients) under SAELens' names."""
    module = f"{prefix}.blocks-2-hook_resid_pre."
    return {
        "W_enc": tensors[f"{module}encoder.0.weight"].T.contiguous(),
        "b_enc": tensors[f"{module}encoder.0.bias"],
        "W_dec": tensors[f"{module}decoder.weight"].T.contiguous(),
        "b_dec": tensors[f"{module}decoder.bias"],
    }


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("run", OBJECTIVES)
def test_losses_and_gradients_of_one_batch_are_apollos(run: str) -> None:
    golden = load_file(GOLDEN / f"apollo_{run}.safetensors")
    trainer = make_trainer(apollo_runner(run, golden, "param"))
    with frozen(trainer.group.model.model):
        output, ours = tried_step(trainer, golden["tokens"])

    def close(ours: torch.Tensor | float, theirs: str) -> None:
        torch.testing.assert_close(float(ours), float(golden[f"loss.{theirs}"]), rtol=1e-5, atol=0)

    close(output.loss, "total")
    close(output.losses["sparsity_loss"] / SPARSITY, f"sparsity.{HOOK}")
    close(output.losses["mse_loss"] / D_MODEL, f"out_to_in.{HOOK}")
    if run == "e2e_ds":
        close(output.losses["kl"], "logits_kl")
        for hook in DOWNSTREAM:
            close(output.parts[f"downstream_mse/{hook}"], f"in_to_orig.{hook}")
    for name, theirs in to_ours(golden, "grad").items():
        assert relative_difference(ours[name], theirs) < 1e-4, name


@pytest.mark.parametrize("run", OBJECTIVES)
def test_ten_optimizer_steps_follow_apollos(run: str) -> None:
    trajectory = apollo_trajectory(run)
    follows(run, make_trainer(apollo_runner(run, trajectory, "init")), trajectory)


def test_a_run_repeated_from_its_own_config_follows_apollos(tmp_path: Path) -> None:
    # What was traced is the run itself, but shorter.
    config = run_config({"n_samples": 160, "warmup_samples": 48})
    trajectory = apollo_trajectory("e2e_ds")
    write_tiny4l(tmp_path / "tiny4l")
    folder = write_run(tmp_path / "e2e_ds", config, {})
    cfg = E2ERunnerConfig.from_apollo(folder, output_path=None, checkpoint_path=None, verbose=False, logger=EVERY_STEP)
    sae = TrainingSAE.from_dict(cfg.sae.to_dict())
    assert isinstance(sae, ApolloTrainingSAE)
    sae.load_state_dict(to_ours(trajectory, "init"))
    # The model's tokenizer is nowhere, and nothing here needs it.
    with hub({}):
        model = load_apollo_model(cfg.model_name)
    trainer = make_trainer(make_runner(cfg, model, sae=sae))
    assert trainer.cfg.total_training_samples == trajectory["tokens"].numel()
    follows("e2e_ds", trainer, trajectory)


def apollo_trajectory(run: str) -> dict[str, torch.Tensor]:
    """Ten optimizer steps of Apollo's own training loop."""
    golden = load_file(GOLDEN / f"apollo_{run}.safetensors")
    return {k.removeprefix("trajectory."): v for k, v in golden.items() if k.startswith("trajectory.")}


def follows(run: str, trainer: E2ETrainer[Any, Any], trajectory: dict[str, torch.Tensor]) -> None:
    """Trained on the same tokens, the trainer must have every loss, gradient norm and weight that Apollo's had."""
    tokens = trajectory["tokens"].reshape(10, 2 * BATCH, N_CTX)

    def step_mean(name: str) -> torch.Tensor:
        return trajectory[f"traj.loss.{name}"].reshape(10, 2).mean(1)

    with frozen(trainer.group.model.model):
        for step in range(10):
            # Apollo's schedule is its own function: each step takes the rate that it used.
            trainer.optimizer.param_groups[0]["lr"] = float(trajectory["traj.lr"][step])
            output = trainer.step(tokens[step])
            theirs = {"total": step_mean("total"), f"sparsity.{HOOK}": step_mean(f"sparsity.{HOOK}")}
            ours = {"total": output.loss, f"sparsity.{HOOK}": output.losses["sparsity_loss"] / SPARSITY}
            if run == "e2e_ds":
                theirs |= {"logits_kl": step_mean("logits_kl")}
                ours |= {"logits_kl": output.losses["kl"]}
                for hook in DOWNSTREAM:
                    theirs[hook] = step_mean(f"in_to_orig.{hook}")
                    ours[hook] = output.parts[f"downstream_mse/{hook}"]
            theirs["out_to_in"] = step_mean(f"out_to_in.{HOOK}")
            ours["out_to_in"] = output.losses["mse_loss"] / D_MODEL
            for name, value in ours.items():
                assert float(value) == pytest.approx(float(theirs[name][step]), rel=1e-3), (step, name)
            norm: Any = output.metrics["grad_norm"]
            assert float(norm) == pytest.approx(float(trajectory["traj.grad_norm"][step]), rel=1e-3), step
    final = dict(trainer.sae.named_parameters())
    for name, theirs in to_ours(trajectory, "final").items():
        assert relative_difference(final[name].detach(), theirs) < 1e-3, name
