"""What comes out of one optimizer step, for one SAE."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor


@dataclass
class StepOutput(TrainStepOutput):
    """SAELens' record of a step: losses added up over its forward passes, activations of the last one.

    `losses` holds the objective's terms before their coefficients, which are in `coefficients`, and the architecture's own
    as SAELens has them; terms without weight are there on logging steps only, and so are `parts`, what terms are made of.
    `firing` counts the tokens on which each feature fired.
    """

    coefficients: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    firing: Float[Tensor, "d_sae"] = field(default_factory=lambda: torch.empty(0))
    n_tokens: int = 0

    @property
    def added_up(self) -> list[Tensor]:
        """What of it is a sum over forward passes."""
        return [self.loss, *self.losses.values(), *self.parts.values(), self.firing]

    @classmethod
    def of_pass(
        cls,
        output: TrainStepOutput,
        loss: Tensor,
        losses: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        coefficients: Mapping[str, float],
        share: float,
    ) -> "StepOutput":
        """One forward pass's part of the step: every loss and metric times its share of the tokens."""
        return cls(
            sae_in=output.sae_in.detach(),
            sae_out=output.sae_out.detach(),
            feature_acts=output.feature_acts.detach(),
            hidden_pre=output.hidden_pre.detach(),
            loss=loss.detach() * share,
            losses={name: value.detach() * share for name, value in losses.items()},
            metrics=output.metrics,
            coefficients=dict(coefficients),
            parts={name: value.detach() * share for name, value in parts.items()},
            firing=count_firing(output.feature_acts),
            n_tokens=len(output.sae_in),
        )

    def plus(self, earlier: "StepOutput | None") -> "StepOutput":
        """The two passes' losses and counts together, with this one's activations."""
        if earlier is None:
            return self
        return replace(
            self,
            loss=self.loss + earlier.loss,
            losses={name: value + earlier.losses[name] for name, value in self.losses.items()},
            parts={name: value + earlier.parts[name] for name, value in self.parts.items()},
            firing=self.firing + earlier.firing,
            n_tokens=self.n_tokens + earlier.n_tokens,
        )


@torch.no_grad()
def count_firing(feature_acts: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, "d_sae"]:
    """On how many tokens each feature fired, (d_sae,); takes the sparse activations of SAELens' TopK too."""
    if not feature_acts.is_sparse:
        # So few tokens at a time that they can be counted in bytes; as a whole the sum would take eight for each number.
        few = [(some != 0).view(torch.uint8).sum(0, dtype=torch.uint8) for some in feature_acts.split(128)]
        return torch.stack(few).sum(0).float()
    feature_acts = feature_acts.coalesce()
    fired = feature_acts.indices()[1][feature_acts.values() != 0]
    return torch.bincount(fired, minlength=feature_acts.shape[1]).float()
