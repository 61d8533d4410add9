"""Preserve what the language model is for: its loss on the text itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from sae_lens_e2e.objectives.base import CE_PRODUCTS, Coefficient, Term
from sae_lens_e2e.objectives.in_passes import InPasses

if TYPE_CHECKING:
    from sae_lens_e2e.objectives.batch import Batch


@dataclass(frozen=True)
class CrossEntropy(InPasses):
    """The spliced model's cross-entropy on the next token, in nats; the last position of a prompt takes no part.

    Unlike the KL divergence it asks for the text that is there, not for the distribution the model would have had.
    `mse_coefficient` weighs SAELens' reconstruction loss at the SAE's own hook.
    """

    name: ClassVar[str] = "ce"

    ce_coefficient: Coefficient = 1.0
    mse_coefficient: Coefficient = 0.0

    @property
    @override
    def logit_products(self) -> int:
        return CE_PRODUCTS if self.ce_coefficient else 0

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        return {
            "ce": Term(self.ce_coefficient, lambda: batch.cross_entropy()),
            "mse_loss": Term(self.mse_coefficient, lambda: batch.mse_loss),
        }
