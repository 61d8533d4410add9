"""End-to-end training objectives for SAELens (Braun et al. 2024)."""

from sae_lens_e2e.apollo import ApolloTrainingSAE, ApolloTrainingSAEConfig
from sae_lens_e2e.config import E2ERunnerConfig
from sae_lens_e2e.hookspecs import hookimpl
from sae_lens_e2e.objectives import E2E, E2EDownstream, Local, Objective, SplicedBatch, Term
from sae_lens_e2e.plugins import PluginWarning, RegisteredObjective, available_objectives, get_objective
from sae_lens_e2e.runner import E2ETrainingRunner
from sae_lens_e2e.trainer import E2ETrainer, NonFiniteLossError

__version__ = "0.1.0"

__all__ = [
    "E2E",
    "ApolloTrainingSAE",
    "ApolloTrainingSAEConfig",
    "E2EDownstream",
    "E2ERunnerConfig",
    "E2ETrainer",
    "E2ETrainingRunner",
    "Local",
    "NonFiniteLossError",
    "Objective",
    "PluginWarning",
    "RegisteredObjective",
    "SplicedBatch",
    "Term",
    "available_objectives",
    "get_objective",
    "hookimpl",
]
