"""End-to-end training objectives for SAELens (Braun et al. 2024).

Importing this costs next to nothing: a name is imported when it is first asked for, and what SAELens finds of ours by name is registered
as soon as both packages are imported, in either order.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sae_lens_e2e.registration import register_with_sae_lens

if TYPE_CHECKING:
    from sae_lens_e2e.apollo import (
        ApolloTrainingSAE,
        ApolloTrainingSAEConfig,
        apollo_disk_loader,
        apollo_huggingface_loader,
        load_apollo_model,
        load_apollo_sae,
        load_apollo_saes,
        load_neuronpedia_apollo_sae,
    )
    from sae_lens_e2e.architectures.going_on import training_sae_from
    from sae_lens_e2e.architectures.transcoder import (
        BatchTopKSkipTrainingTranscoderConfig,
        BatchTopKTrainingTranscoderConfig,
        JumpReLUSkipTrainingTranscoderConfig,
        JumpReLUTrainingTranscoderConfig,
        SkipTrainingTranscoderConfig,
        StandardTrainingTranscoderConfig,
    )
    from sae_lens_e2e.finetuning import Finetuned, finetune
    from sae_lens_e2e.objectives import (
        E2E,
        Batch,
        CrossEntropy,
        E2EDownstream,
        KLAndMSE,
        Local,
        Objective,
        Part,
        Schedule,
        SplicedBatch,
        Term,
    )
    from sae_lens_e2e.objectives.hookspecs import hookimpl
    from sae_lens_e2e.objectives.plugins import PluginWarning, RegisteredObjective, available_objectives, get_objective
    from sae_lens_e2e.publishing.circuit_tracer import save_for_circuit_tracer
    from sae_lens_e2e.publishing.neuronpedia import save_for_neuronpedia
    from sae_lens_e2e.training.config import E2ERunnerConfig
    from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
    from sae_lens_e2e.training.multi_runner import E2EMultiTrainingRunner
    from sae_lens_e2e.training.runner import E2ETrainingRunner
    from sae_lens_e2e.training.stages import Stage, Stages
    from sae_lens_e2e.training.trainer import E2ETrainer, NonFiniteLossError

__version__ = "0.2.0"

__all__ = [
    "E2E",
    "ApolloTrainingSAE",
    "ApolloTrainingSAEConfig",
    "Batch",
    "BatchTopKSkipTrainingTranscoderConfig",
    "BatchTopKTrainingTranscoderConfig",
    "CrossEntropy",
    "E2EDownstream",
    "E2EMultiRunnerConfig",
    "E2EMultiTrainingRunner",
    "E2ERunnerConfig",
    "E2ETrainer",
    "E2ETrainingRunner",
    "Finetuned",
    "JumpReLUSkipTrainingTranscoderConfig",
    "JumpReLUTrainingTranscoderConfig",
    "KLAndMSE",
    "Local",
    "NonFiniteLossError",
    "Objective",
    "Part",
    "PluginWarning",
    "RegisteredObjective",
    "Schedule",
    "SkipTrainingTranscoderConfig",
    "SplicedBatch",
    "Stage",
    "Stages",
    "StandardTrainingTranscoderConfig",
    "Term",
    "apollo_disk_loader",
    "apollo_huggingface_loader",
    "available_objectives",
    "finetune",
    "get_objective",
    "hookimpl",
    "load_apollo_model",
    "load_apollo_sae",
    "load_apollo_saes",
    "load_neuronpedia_apollo_sae",
    "save_for_circuit_tracer",
    "save_for_neuronpedia",
    "training_sae_from",
]

# Where each is; type checkers read the imports above, and a test holds them and `__all__` together.
_IN_MODULE = {
    "apollo": "ApolloTrainingSAE ApolloTrainingSAEConfig apollo_disk_loader apollo_huggingface_loader load_apollo_model "
    "load_apollo_sae load_apollo_saes load_neuronpedia_apollo_sae",
    "architectures.going_on": "training_sae_from",
    "architectures.transcoder": "BatchTopKSkipTrainingTranscoderConfig BatchTopKTrainingTranscoderConfig "
    "JumpReLUSkipTrainingTranscoderConfig JumpReLUTrainingTranscoderConfig SkipTrainingTranscoderConfig "
    "StandardTrainingTranscoderConfig",
    "finetuning": "Finetuned finetune",
    "objectives": "E2E Batch CrossEntropy E2EDownstream KLAndMSE Local Objective Part Schedule SplicedBatch Term",
    "objectives.hookspecs": "hookimpl",
    "objectives.plugins": "PluginWarning RegisteredObjective available_objectives get_objective",
    "publishing.circuit_tracer": "save_for_circuit_tracer",
    "publishing.neuronpedia": "save_for_neuronpedia",
    "training.config": "E2ERunnerConfig",
    "training.multi_config": "E2EMultiRunnerConfig",
    "training.multi_runner": "E2EMultiTrainingRunner",
    "training.runner": "E2ETrainingRunner",
    "training.stages": "Stage Stages",
    "training.trainer": "E2ETrainer NonFiniteLossError",
}
_HOME = {name: f"{__name__}.{module}" for module, names in _IN_MODULE.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_sae_lens()
