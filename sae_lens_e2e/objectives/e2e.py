"""SAE_e2e: preserve the output of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from sae_lens_e2e.objectives.base import KL_PRODUCTS, Coefficient, Term
from sae_lens_e2e.objectives.in_passes import InPasses

if TYPE_CHECKING:
    from sae_lens_e2e.objectives.batch import Batch


@dataclass(frozen=True)
class E2E(InPasses):
    """KL divergence from the language model's own logits to those with the SAE spliced in (Braun et al. 2024, section 2).

    `mse_coefficient` weighs SAELens' reconstruction loss at the SAE's own hook; the paper has none.
    """

    name: ClassVar[str] = "e2e"

    kl_coefficient: Coefficient = 1.0
    mse_coefficient: Coefficient = 0.0

    @property
    @override
    def logit_products(self) -> int:
        return KL_PRODUCTS if self.kl_coefficient else 0

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        return {
            "kl": Term(self.kl_coefficient, lambda: batch.kl()),
            "mse_loss": Term(self.mse_coefficient, lambda: batch.mse_loss),
        }
