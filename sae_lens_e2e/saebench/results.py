"""What SAEBench's core evaluation found of an SAE, from the file that lies beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILENAME = "saebench_core.json"
"""In the SAE's folder: SAEBench's own result file."""
SHOWN = ("ce_loss_increase", "ce_loss_score", "kl", "l0", "fraction_alive", "cosine")
"""By the names that our measures have."""


@dataclass(frozen=True)
class CoreResults:
    """The figures that stand beside ours, by our names, and on which tokens they are; losses and divergences in nats a token.

    SAEBench's explained variance is not among them: what 0.6.0 takes for the activations' variance subtracts the square of their mean
    square, and not that of their mean.
    """

    dataset: str
    context_size: int
    n_tokens: int
    ce_loss_increase: float
    kl: float
    l0: float
    ce_loss_score: float
    """(CE without the activation − CE with the SAE) / (CE without the activation − CE of the model): 1 is all of it."""
    cosine: float
    """Between the activation and its reconstruction."""
    fraction_alive: float


def read_core_results(folder: str | Path) -> CoreResults | None:
    """What lies beside an SAE, None if nothing does. Raises ValueError for a file that is not SAEBench's."""
    path = Path(folder) / FILENAME
    if not path.exists():
        return None
    try:
        return core_results(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no result of SAEBench's core evaluation; run saebench again") from error


def core_results(written: Mapping[str, Any]) -> CoreResults:
    """The figures of SAEBench's result file. Raises KeyError, TypeError or ValueError for what is not there."""
    config, metrics = written["eval_config"], written["eval_result_metrics"]
    performance = metrics["model_performance_preservation"]
    return CoreResults(
        dataset=str(config["dataset"]),
        context_size=int(config["context_size"]),
        n_tokens=int(metrics["token_stats"]["total_tokens_eval_reconstruction"]),
        ce_loss_increase=float(performance["ce_loss_with_sae"]) - float(performance["ce_loss_without_sae"]),
        kl=float(metrics["model_behavior_preservation"]["kl_div_with_sae"]),
        l0=float(metrics["sparsity"]["l0"]),
        ce_loss_score=float(performance["ce_loss_score"]),
        cosine=float(metrics["reconstruction_quality"]["cossim"]),
        fraction_alive=float(metrics["misc_metrics"]["frac_alive"]),
    )
