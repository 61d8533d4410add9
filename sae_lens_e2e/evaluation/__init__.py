"""What an SAE costs the language model, and what it keeps."""

import sys

from sae_lens_e2e.evaluation.evaluate import evaluate, evaluate_each, evaluate_many
from sae_lens_e2e.evaluation.frame import evaluation_frame, firing_frame, layers_frame, together_frame
from sae_lens_e2e.evaluation.moved import MovedModules
from sae_lens_e2e.evaluation.options import EvaluationOptions
from sae_lens_e2e.evaluation.result import Evaluation, FiringHistogram, LayerEvaluation
from sae_lens_e2e.evaluation.together import SplicedIn, TogetherEvaluation, evaluate_replacement, evaluate_together

__all__ = [
    "Evaluation",
    "EvaluationOptions",
    "FiringHistogram",
    "LayerEvaluation",
    "SplicedIn",
    "TogetherEvaluation",
    "evaluate",
    "evaluate_each",
    "evaluate_many",
    "evaluate_replacement",
    "evaluate_together",
    "evaluation_frame",
    "firing_frame",
    "layers_frame",
    "together_frame",
]

sys.meta_path.append(MovedModules())
