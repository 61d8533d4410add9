"""Trainers for the tests, set up as the runner does it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import LoggingConfig, StandardTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e import E2EMultiRunnerConfig, E2EMultiTrainingRunner, E2ERunnerConfig, E2ETrainer, E2ETrainingRunner
from sae_lens_e2e.splice import Site, SplicedModel
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.output import StepOutput
from tests.models import dataset_of, random_model, random_tokens

_SETTINGS: dict[str, Any] = {
    "objective": "e2e_ds",
    "model_name": "tiny",
    "context_size": 12,
    "store_batch_size_prompts": 2,
    "train_batch_size_tokens": 4 * 12,
    "training_tokens": 5 * 48,
    "checkpoint_path": None,
    "output_path": None,
    "n_checkpoints": 0,
}


def runner_config(**overrides: Any) -> E2ERunnerConfig[Any]:
    """A config that fits `random_model()` and writes nothing, with any field overridden."""
    settings: dict[str, Any] = {
        "sae": StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02),
        "hook_name": "blocks.1.hook_resid_pre",
        "is_dataset_tokenized": True,
        "logger": LoggingConfig(log_to_wandb=False),
        "verbose": False,
    }
    return E2ERunnerConfig(**(_SETTINGS | settings | overrides))


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


def multi_config(saes: Mapping[str, tuple[Site, TrainingSAEConfig]], **overrides: Any) -> E2EMultiRunnerConfig:
    """The same for several SAEs, each at its site."""
    settings: dict[str, Any] = {
        "saes": {name: sae for name, (_, sae) in saes.items()},
        "hook_names": {name: site.read for name, (site, _) in saes.items()},
        "hook_names_out": {name: site.writes[0] for name, (site, _) in saes.items() if not site.is_sae},
        "hook_head_indices": {name: site.head_index for name, (site, _) in saes.items()},
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return E2EMultiRunnerConfig(**(_SETTINGS | settings | overrides))


def make_multi_runner(
    cfg: E2EMultiRunnerConfig, model: Any = None, splice: SplicedModel | None = None
) -> E2EMultiTrainingRunner:
    """A runner of several SAEs over random tokens; with `splice` on a model that another runner has."""
    dataset = dataset_of(random_tokens(64, cfg.context_size, 61))
    model = splice.model if splice is not None else model or random_model()
    return E2EMultiTrainingRunner(cfg, override_dataset=dataset, override_model=model, splice=splice)


def make_trainer(runner: E2ETrainingRunner) -> E2ETrainer[Any, Any]:
    """The trainer that `runner.run()` would make."""
    return runner.make_trainer()


def gradients(trainer: E2ETrainer[Any, Any], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient by which one step on `tokens` would move each parameter, before clipping; the SAE stays as it was."""
    found = group_gradients(trainer.group, tokens)
    return next(found[name] for name, other in trainer.group.trainers.items() if other is trainer)


EVERY_STEP = LoggingConfig(log_to_wandb=False, wandb_log_frequency=1)
"""Log each step, so that terms without weight and the parts of terms are worked out in each."""


def tried_step(trainer: E2ETrainer[Any, Any], tokens: torch.Tensor) -> tuple[StepOutput, dict[str, torch.Tensor]]:
    """What comes out of a step on `tokens`, and its gradients before clipping; the SAE stays as it was."""
    found = gradients(trainer, tokens)
    return next(
        output for name, output in trainer.group.outputs.items() if trainer.group.trainers[name] is trainer
    ), found


def group_gradients(group: Group, tokens: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """The same for each SAE of a group, by name: a real step, stopped where the first optimizer would make it."""
    found: dict[str, dict[str, torch.Tensor]] = {}

    def stop(*_: Any) -> None:
        for name, trainer in group.trainers.items():
            found[name] = {n: p.grad.clone() for n, p in trainer.sae.named_parameters() if p.grad is not None}
        raise _Stopped

    before = [(trainer, _statistics(trainer)) for trainer in group.trainers.values()]
    plan, group.plan = group.plan, replace(group.plan, max_grad_norm=math.inf)
    handle = group.first.optimizer.register_step_pre_hook(stop)
    with pytest.raises(_Stopped):
        group.step(tokens)
    handle.remove()
    group.plan = plan
    group.undo_step()
    for trainer, statistics in before:
        vars(trainer).update(statistics)
    return found


class _Stopped(Exception):  # noqa: N818
    """The optimizer was about to step."""


def _statistics(trainer: Any) -> dict[str, Any]:
    """What a trainer counts before its optimizer steps."""
    return {
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired.clone(),
        "act_freq_scores": trainer.act_freq_scores.clone(),
        "n_frac_active_samples": trainer.n_frac_active_samples,
    }
