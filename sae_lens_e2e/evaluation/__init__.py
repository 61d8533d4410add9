"""What an SAE costs the language model, and what it keeps."""

from sae_lens_e2e.evaluation.evaluate import evaluate, evaluate_many
from sae_lens_e2e.evaluation.frame import evaluation_frame, firing_frame, layers_frame
from sae_lens_e2e.evaluation.result import Evaluation, FiringHistogram, LayerEvaluation

__all__ = [
    "Evaluation",
    "FiringHistogram",
    "LayerEvaluation",
    "evaluate",
    "evaluate_many",
    "evaluation_frame",
    "firing_frame",
    "layers_frame",
]
