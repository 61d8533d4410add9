"""KL divergence and reconstruction, balanced: Karvonen's finetuning loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from sae_lens_e2e.objectives.base import KL_PRODUCTS, Coefficient, Term
from sae_lens_e2e.objectives.in_passes import InPasses

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_lens_e2e.objectives.batch import Batch

    Scalar = Float[Tensor, ""]


@dataclass(frozen=True)
class KLAndMSE(InPasses):
    """½ (α KL + MSE), where α = MSE / (KL + 1e-8), not differentiated, makes both weigh the same (Karvonen 2025).

    KL is that of the next-token distributions in nats. MSE is SAELens' reconstruction loss, so that its scale, and with it an
    architecture's sparsity coefficient, is that of a local run. Of several SAEs in one pass it is the sum over them of
    Σ ‖output - target‖² / Σ ‖target - mean target‖² over the pass's trained tokens (and over the hooks that one writes), the variance
    not differentiated, so that none counts for more because its activations are larger; a sparsity coefficient is then beside a loss of
    about one or less an SAE, not beside squared activations.

    α is that of each forward pass: under gradient accumulation every micro-batch has its own. With `alpha_decay` it is the running
    mean α ← alpha_decay · α + (1 - alpha_decay) · MSE / (KL + 1e-8) over forward passes instead, which starts at the first one's and goes
    on from checkpoints; with a number for `alpha` it is that number. Logged are the plain `kl`, which
    has no weight of its own, `balanced_kl` (α KL) and, on logging steps, `metrics/balanced_kl/alpha`; of several
    SAEs `relative_mse`, each one's part of it, and each one's own plain `mse_loss`.

    Raises ValueError for an `alpha` that is no finite number above 0, an `alpha_decay` outside [0, 1), or both.
    """

    name: ClassVar[str] = "kl_mse"

    kl_coefficient: Coefficient = 0.5
    mse_coefficient: Coefficient = 0.5
    alpha: float | None = None
    alpha_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field_name, value in (("alpha", self.alpha), ("alpha_decay", self.alpha_decay)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{self.name}: {field_name}={value!r} must be a number, not {type(value).__name__}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"{self.name}: alpha={self.alpha!r} must be a finite number above 0, or None to balance")
        if not 0 <= self.alpha_decay < 1:
            raise ValueError(f"{self.name}: alpha_decay={self.alpha_decay!r} must be at least 0 and below 1")
        if self.alpha is not None and self.alpha_decay:
            raise ValueError(
                f"{self.name}: alpha={self.alpha!r} is fixed and has no running mean; leave out alpha_decay or alpha"
            )

    @property
    @override
    def logit_products(self) -> int:
        return KL_PRODUCTS if self.kl_coefficient else 0

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        # The MSE comes first: what is worked out for a term of no weight has no gradient to give to a later one.
        mse_terms, mse = self._mse(batch)
        kl = cache(lambda: batch.kl())
        alpha = cache(lambda: self._alpha(batch, kl(), mse))
        return {
            **mse_terms,
            "balanced_kl": Term(self.kl_coefficient, lambda: alpha() * kl(), parts=lambda: {"alpha": alpha()}),
            "kl": Term(0.0, kl),
        }

    def _mse(self, batch: Batch) -> tuple[dict[str, Term], Callable[[], Scalar]]:
        if len(batch.parts) == 1:
            return {"mse_loss": Term(self.mse_coefficient, lambda: batch.mse_loss)}, lambda: batch.mse_loss
        from sae_lens_e2e.objectives.terms import relative_mse

        by_name = cache(lambda: {name: relative_mse(part.output, part.target) for name, part in batch.parts.items()})
        total = cache(lambda: _sum(by_name()))
        return {
            "relative_mse": Term(self.mse_coefficient, total, parts=by_name),
            "mse_loss": Term(0.0, lambda: batch.mse_loss),
        }, total

    def _alpha(self, batch: Batch, kl: Scalar, mse: Callable[[], Scalar]) -> Scalar:
        import torch

        from sae_lens_e2e.objectives.terms import balance

        with torch.no_grad():
            if self.alpha is not None:
                return torch.full_like(kl, self.alpha)
            now = balance(mse().to(kl.device), kl)
            return batch.running_mean("alpha", now, self.alpha_decay) if self.alpha_decay else now


def _sum(losses: Mapping[str, Scalar]) -> Scalar:
    first, *others = losses.values()
    return sum((loss.to(first.device) for loss in others), first)
