"""What each number of an evaluation is called, in which unit it is and how it is written, wherever it is shown."""

from collections.abc import Callable
from dataclasses import dataclass

from sae_lens_e2e.evaluation.formats import count, decimals, nats, significant

NATS_A_TOKEN = "nats a token"


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation, by the name that `Evaluation` or `LayerEvaluation` and their frames have for it."""

    name: str
    label: str
    """What heads its row or column."""
    format: Callable[[float], str]
    """How it is written in a table."""
    unit: str = ""
    noun: str = ""
    """What it is called in a sentence, if not by its label."""
    axis_title: str = ""
    """What stands at an axis, if not the title."""

    @property
    def title(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def axis(self) -> str:
        """What stands at an axis of it."""
        return self.axis_title or self.title

    @property
    def in_a_sentence(self) -> str:
        """What a sentence calls it."""
        return self.noun or self.label


OF_SAE = (
    Measure("ce_loss_increase", "CE loss increase", nats, "nats", axis_title=f"CE loss increase ({NATS_A_TOKEN})"),
    Measure("ce_loss_without_sae", "CE loss without the SAE", nats, "nats"),
    Measure("ce_loss_with_sae", "CE loss with the SAE", nats, "nats"),
    Measure("ce_loss_with_ablation", "CE loss with zeros in its place", nats, "nats"),
    Measure("ce_loss_score", "CE loss score", decimals(3)),
    Measure("kl", "KL divergence", nats, "nats", axis_title=f"KL divergence ({NATS_A_TOKEN})"),
    Measure("kl_with_ablation", "KL divergence with zeros in its place", nats, "nats"),
    Measure("top1_agreement", "top-1 agreement", decimals(3)),
    Measure("top1_accuracy_without_sae", "top-1 accuracy without the SAE", decimals(3)),
    Measure("top1_accuracy_with_sae", "top-1 accuracy with the SAE", decimals(3)),
    Measure("statistical_distance", "statistical distance", decimals(3)),
    Measure("l0", "L0", decimals(1), axis_title="L0 (features active a token)"),
    Measure("l1", "L1", significant(4)),
    Measure("n_alive", "alive features", count, noun="number of alive features"),
    Measure("fraction_alive", "fraction of features alive", decimals(3)),
    Measure("n_tokens", "tokens evaluated", count),
    Measure("n_tokens_measured", "tokens measured", count),
    Measure("n_tokens_alive", "tokens that decide which features are alive", count),
)
"""Of an SAE, in the order of a list of all: what it costs the model, then what fires, then on how much data."""

OF_LAYER = (
    Measure("mse", "MSE", decimals(4), "squared activation"),
    Measure("explained_variance", "explained variance", decimals(3), "fraction"),
    Measure("mse_ln", "MSE after layer norm", decimals(4)),
    Measure("explained_variance_ln", "explained variance after layer norm", decimals(3), "fraction"),
    Measure("l2_ratio", "L2 ratio", decimals(2), axis_title="L2 ratio, output / input"),
    Measure("l2_ratio_first", "L2 ratio, position 0", decimals(2)),
    Measure("l2_ratio_later", "L2 ratio, later", decimals(2)),
    Measure("cosine", "cosine", decimals(2), axis_title="cosine of output and input"),
    Measure("cosine_first", "cosine, position 0", decimals(2)),
    Measure("cosine_later", "cosine, later", decimals(2)),
)
"""Of the activations at one hook, with the SAE against without."""

MEASURES = {measure.name: measure for measure in (*OF_SAE, *OF_LAYER)}

SUMMARY = ("l0", "n_alive", "ce_loss_increase", "kl")
"""The few that say most, for a table with a row an SAE."""
