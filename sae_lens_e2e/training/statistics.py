"""What some SAEs want to know of their activations before they are trained: the norm, or mean and covariance."""

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from sae_lens_e2e.splice import Site, SplicedModel
from sae_lens_e2e.training.plan import StepPlan
from sae_lens_e2e.training.prompts import PromptBatches

if TYPE_CHECKING:
    from sae_lens_e2e.training.group import Group

ESTIMATED = ("expected_average_only_in", "covariance_whitening")
"""The `normalize_activations` that need an estimate."""


def estimate_statistics(model: SplicedModel, groups: "Sequence[Group]", batches: PromptBatches, plan: StepPlan) -> None:
    """Have each SAE's scaler estimated as SAELens does, once for all that sit at one place; those loaded are kept.

    One place has its activations from SAELens' own store, shuffled; several have them from whole prompts.
    """
    sites = {site for group in groups for site in group.sites.values()}
    estimated: dict[tuple[Any, ...], Any] = {}
    for group in groups:
        for name, trainer in group.trainers.items():
            normalize = trainer.sae.cfg.normalize_activations
            key = (group.sites[name], normalize)
            if normalize not in ESTIMATED:
                continue
            if key in estimated:
                trainer.activation_scaler = copy.deepcopy(estimated[key])
                continue
            here = iter(batches.store) if len(sites) == 1 else _activations(model, group.sites[name], batches, plan)
            trainer.estimate_activation_statistics(here)
            estimated[key] = trainer.activation_scaler


def _activations(
    model: SplicedModel, site: Site, batches: PromptBatches, plan: StepPlan
) -> Iterator[Float[Tensor, "tokens d_in"]]:
    """A step's worth of activations at a time, at the trained positions."""
    while True:
        prompts = batches.store.get_batch_tokens(batches.prompts_per_step)
        clean = model.clean(prompts, [site], final=False)
        yield site.take(plan.positions.of(prompts).take(clean.at[site.read]))
