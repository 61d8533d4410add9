"""What goes into one optimizer step, and what comes out of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor


class PromptBatches(Iterator[Tensor]):
    """Whole prompts for one optimizer step at a time, (prompts, context_size), from SAELens' activation store."""

    def __init__(self, store: ActivationsStore, prompts_per_step: int):
        self.store = store
        self.prompts_per_step = prompts_per_step
        self.interrupted = False

    def __next__(self) -> Int[Tensor, "prompts pos"]:
        # Here, between two steps, nothing is half done: an interruption waits for it.
        if self.interrupted:
            raise InterruptedException
        return self.store.get_batch_tokens(self.prompts_per_step)


@dataclass(frozen=True)
class StepPlan:
    """How the tokens of one optimizer step are worked through."""

    prompts_per_forward: int
    seqpos_slice: tuple[int | None, ...] = (None,)
    excluded_tokens: Int[Tensor, "n_excluded"] | None = None
    max_grad_norm: float = 1.0
    autocast_lm: bool = False

    def trained_positions(self, tokens: Int[Tensor, "prompts pos"]) -> Bool[Tensor, "prompts pos"]:
        """Which positions the SAE replaces and is trained on: inside the slice, and not an excluded token."""
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, slice(*self.seqpos_slice)] = True
        if self.excluded_tokens is not None:
            mask &= ~torch.isin(tokens, self.excluded_tokens.to(tokens.device))
        return mask


@dataclass
class StepOutput(TrainStepOutput):
    """SAELens' record of a step: losses added up over its forward passes, activations of the last one.

    `losses` holds the objective's terms before their coefficients, which are in `coefficients`, and the architecture's own
    as SAELens has them; `parts` what the terms are made of. `firing` counts the tokens on which each feature fired.
    """

    coefficients: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    firing: Float[Tensor, "d_sae"] = field(default_factory=lambda: torch.empty(0))
    n_tokens: int = 0

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
