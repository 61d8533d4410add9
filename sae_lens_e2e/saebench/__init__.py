"""SAEBench's core evaluation, on the tokens that ours reads: of the others each needs a gated model, data of its own or somebody's API."""

from sae_lens_e2e.saebench.results import CoreResults, read_core_results
from sae_lens_e2e.saebench.run import evaluate_with_saebench

__all__ = ["CoreResults", "evaluate_with_saebench", "read_core_results"]
