"""What an SAE costs the language model, and what it keeps."""

from sae_lens_e2e.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
