"""A plugin for sae-lens-e2e: end-to-end training in which rare tokens count as much as frequent ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sae_lens_e2e import Batch, Objective, Term, hookimpl
from sae_lens_e2e.objectives.hookspecs import Register


@dataclass(frozen=True)
class TokenWeightedKL(Objective):
    """KL divergence in which all occurrences of a token together weigh what any other token's do.

    Occurrences are counted within a forward pass, so `store_batch_size_prompts` decides how rare a token can be.
    """

    name: ClassVar[str] = "token_weighted_kl"

    kl_coefficient: float = 1.0

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The KL divergence, each position weighted by one over its token's count; the weights sum to 1."""
        distinct, which, counts = torch.unique(batch.tokens, return_inverse=True, return_counts=True)
        weights = 1 / (len(distinct) * counts[which])
        return {"token_weighted_kl": Term(self.kl_coefficient, lambda: batch.kl(weights))}


@hookimpl
def register_objectives(register: Register) -> None:
    """Tell sae-lens-e2e what there is."""
    register(TokenWeightedKL)
