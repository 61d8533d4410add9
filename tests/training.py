"""Trainers for the tests, set up as the runner does it."""

from typing import Any

import torch
from datasets import Dataset
from sae_lens import LoggingConfig, StandardTrainingSAEConfig, TrainingSAE
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e import E2ERunnerConfig, E2ETrainer, E2ETrainingRunner
from tests.models import dataset_of, random_model, random_tokens


def runner_config(**overrides: Any) -> E2ERunnerConfig[Any]:
    """A config that fits `random_model()` and writes nothing, with any field overridden."""
    settings: dict[str, Any] = {
        "sae": StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02),
        "objective": "e2e_ds",
        "model_name": "tiny",
        "hook_name": "blocks.1.hook_resid_pre",
        "context_size": 12,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 4 * 12,
        "training_tokens": 5 * 48,
        "is_dataset_tokenized": True,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
        "n_checkpoints": 0,
    }
    return E2ERunnerConfig(**(settings | overrides))


def make_runner(
    cfg: E2ERunnerConfig[Any] | None = None,
    model: HookedRootModule | None = None,
    dataset: Dataset | None = None,
    sae: TrainingSAE[Any] | None = None,
) -> E2ETrainingRunner:
    """A runner over random tokens."""
    cfg = cfg or runner_config()
    dataset = dataset or dataset_of(random_tokens(64, cfg.context_size, 61))
    return E2ETrainingRunner(cfg, override_dataset=dataset, override_model=model or random_model(), override_sae=sae)


def make_trainer(runner: E2ETrainingRunner) -> E2ETrainer[Any, Any]:
    """The trainer that `runner.run()` would make."""
    return runner.make_trainer()


def gradients(trainer: E2ETrainer[Any, Any], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each parameter's gradient, summed over the micro-batches of one step on `tokens`."""
    trainer.sae.zero_grad()
    mask = trainer.plan.trained_positions(tokens)
    size = trainer.plan.prompts_per_forward
    for part, trained in zip(tokens.split(size), mask.split(size), strict=True):
        trainer.forward_backward(part, trained, int(trained.sum()) / int(mask.sum()))
    return {name: p.grad.clone() for name, p in trainer.sae.named_parameters() if p.grad is not None}
