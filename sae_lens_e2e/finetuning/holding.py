"""Keeping L0 where it was while an SAE is finetuned: the size of its sparsity penalty, and its thresholds at the end."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.step import backward

POWER = 10
"""How fast the penalty grows with L0. A coefficient that is wrong by a factor of 2 moves L0 by 2^(1/POWER) - 1, 7 %."""
_MOST = 100.0


class _HeldL0:
    """What `hold_l0` puts before a training SAE's class."""

    l0_held_at: float

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The architecture's own losses, the sparsity loss times (L0 / `l0_held_at`)^POWER of these tokens."""
        losses = super().calculate_aux_loss(  # pyright: ignore[reportAttributeAccessIssue]
            step_input=step_input, feature_acts=feature_acts, hidden_pre=hidden_pre, sae_out=sae_out
        )
        l0 = (feature_acts.detach() != 0).sum(-1).float().mean()
        factor = ((l0 / self.l0_held_at) ** POWER).clamp(max=_MOST)
        sparsity = {f"{name}_loss" for name in self.get_coefficients()}  # pyright: ignore[reportAttributeAccessIssue]
        return {name: loss * factor if name in sparsity else loss for name, loss in losses.items()}


def hold_l0(sae: TrainingSAE[Any], l0: float) -> None:
    """Have an SAE with a sparsity penalty stay at an L0 in training: the penalty weighs (L0 / `l0`)^POWER times its coefficient.

    The factor is of the tokens of each forward pass and takes no gradient, so there is nothing to keep between steps.
    """
    sae.__class__ = type(f"Held{type(sae).__name__}", (_HeldL0, type(sae)), {"l0_held_at": l0})


def balanced_coefficients(
    without: Group, with_penalty: Group, batches: Sequence[Int[Tensor, "prompts pos"]]
) -> dict[str, float]:
    """By SAE, the sparsity coefficient at which a gradient step leaves the sparsity penalty as it is, at the start of training.

    With g the gradient of the objective and h that of the penalty, the penalty's change along -(g + c·h) is 0 at
    c = -⟨g, h⟩ / ⟨h, h⟩; 0 where the objective lowers the penalty by itself. The groups are the same but for the coefficients, 0 and 1;
    their SAEs stay as they are. Each of `batches` is the prompts of a step.
    """
    of_objective, of_all = _gradients(without, batches), _gradients(with_penalty, batches)
    return {name: _balance(of_objective[name], of_all[name]) for name in of_objective}


@torch.no_grad()
def calibrate_thresholds(sae: Any, source: SAE[Any], activations: Iterable[Float[Tensor, "tokens d_in"]]) -> float:
    """Scale all thresholds of a training SAE by one factor, so that as many features fire as in its source; gives the factor.

    On each batch of activations that is the ratio of pre-activation to threshold that so many reach, and the mean over batches is
    taken. A threshold of 0 stays.
    """
    threshold: Tensor = getattr(sae, "topk_threshold" if hasattr(sae, "topk_threshold") else "threshold")
    factors = [
        _factor(sae.encode_with_hidden_pre(x)[1], threshold, int((source.encode(x) != 0).sum())) for x in activations
    ]
    factor = float(torch.stack(factors).mean()) if factors else 1.0
    threshold.data.mul_(factor)
    return factor


def _factor(
    hidden_pre: Float[Tensor, "tokens d_sae"], threshold: Float[Tensor, "*d_sae"], n_firing: int
) -> Float[Tensor, ""]:
    ratios = hidden_pre.float() / threshold.float().clamp(min=1e-30)
    # Without a threshold, what is positive fires whatever the factor.
    ratios = torch.where(threshold > 0, ratios, torch.where(hidden_pre > 0, torch.inf, -torch.inf)).flatten()
    n = min(max(n_firing, 1), ratios.numel() - 1)
    largest = ratios.topk(n + 1).values
    between = (largest[n - 1] + largest[n]) / 2
    return between.clamp(min=0) if bool(between.isfinite()) else torch.ones_like(between)


def _gradients(group: Group, batches: Iterable[Int[Tensor, "prompts pos"]]) -> dict[str, dict[str, Tensor]]:
    """The gradient of each SAE's parameters, summed over batches, by SAE and parameter; none is applied."""
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in group.trainers}
    for prompts in batches:
        backward(group.model, [group], prompts, group.plan)
        for name, trainer in group.trainers.items():
            for parameter, p in trainer.sae.named_parameters():
                if p.grad is not None:
                    sums[name][parameter] = sums[name].get(parameter, 0) + p.grad
        group.undo_step()
    return sums


def _balance(without: Mapping[str, Tensor], with_penalty: Mapping[str, Tensor]) -> float:
    penalty = {name: gradient - without[name] for name, gradient in with_penalty.items()}
    along = sum(float((without[name] * h).sum()) for name, h in penalty.items())
    length = sum(float(h.square().sum()) for h in penalty.values())
    return max(-along / length, 0.0) if length else 0.0
