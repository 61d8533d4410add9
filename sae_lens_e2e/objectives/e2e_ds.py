"""SAE_e2e+ds: preserve the output, and the activations on the way to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import Self, override

from sae_lens_e2e.objectives.base import KL_PRODUCTS, Coefficient, Term
from sae_lens_e2e.objectives.in_passes import InPasses

if TYPE_CHECKING:
    from sae_lens_e2e.objectives.batch import Batch


@dataclass(frozen=True)
class E2EDownstream(InPasses):
    """KL divergence of the logits plus the reconstruction error at later layers (Braun et al. 2024, section 2).

    The downstream term is the mean over `downstream_hooks` of the MSE at each; left at None they are every later block's
    `hook_resid_pre` (but not one that is the SAE's own activation). The default coefficients are the paper's for GPT2-small, layers 2 and 6. `mse_coefficient` weighs
    SAELens' reconstruction loss at the SAE's own hook; the paper has none.
    """

    name: ClassVar[str] = "e2e_ds"

    kl_coefficient: Coefficient = 0.5
    downstream_coefficient: Coefficient = 2.5
    downstream_hooks: tuple[str, ...] | None = None
    mse_coefficient: Coefficient = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.downstream_hooks is None:
            return
        if not isinstance(self.downstream_hooks, (list, tuple)) or not all(
            isinstance(hook, str) for hook in self.downstream_hooks
        ):
            raise ValueError(
                f"{self.name}: downstream_hooks={self.downstream_hooks!r} must be a sequence of hook names"
            )
        hooks = tuple(self.downstream_hooks)
        if not hooks or len(set(hooks)) < len(hooks):
            raise ValueError(f"{self.name}: downstream_hooks={list(hooks)} must name at least one hook, and each once")
        # A frozen dataclass should be hashable, whatever kind of sequence it was given.
        object.__setattr__(self, "downstream_hooks", hooks)

    @property
    @override
    def hooks(self) -> tuple[str, ...]:
        return self.downstream_hooks or ()

    @override
    def resolve(self, later_blocks: Sequence[str], hook_name: str) -> Self:
        if self.downstream_hooks is not None:
            return self
        if not later_blocks:
            raise ValueError(
                f"{self.name}: no block comes after hook_name={hook_name!r}; move the SAE to an earlier layer, name "
                "downstream_hooks yourself, or use objective='e2e'"
            )
        return replace(self, downstream_hooks=tuple(later_blocks))

    @property
    @override
    def logit_products(self) -> int:
        return KL_PRODUCTS if self.kl_coefficient else 0

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        from sae_lens_e2e.objectives.terms import downstream_mse, mean_over_hooks

        by_hook = cache(lambda: downstream_mse(batch.spliced, batch.clean))
        return {
            "kl": Term(self.kl_coefficient, lambda: batch.kl()),
            "downstream_mse": Term(self.downstream_coefficient, lambda: mean_over_hooks(by_hook()), parts=by_hook),
            "mse_loss": Term(self.mse_coefficient, lambda: batch.mse_loss),
        }
