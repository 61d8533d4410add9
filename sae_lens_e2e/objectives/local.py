"""The baseline: reconstruct the activation where the SAE sits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from sae_lens_e2e.objectives.base import Coefficient, Objective, Term

if TYPE_CHECKING:
    from sae_lens_e2e.objectives.batch import Batch


@dataclass(frozen=True)
class Local(Objective):
    """SAELens' own objective: the MSE at the SAE's hook, summed over d_in, mean over tokens."""

    name: ClassVar[str] = "local"
    compares_logits: ClassVar[bool] = False

    mse_coefficient: Coefficient = 1.0

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        return {"mse_loss": Term(self.mse_coefficient, lambda: batch.mse_loss)}
