"""The one training loop: a run is one group, a sweep is many on one clean pass, a joint run is a group of many SAEs."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.splice import SplicedModel
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.memory import kept_memory, largest_block
from sae_lens_e2e.training.plan import StepPlan
from sae_lens_e2e.training.progress import Progress
from sae_lens_e2e.training.prompts import PromptBatches
from sae_lens_e2e.training.statistics import estimate_statistics
from sae_lens_e2e.training.step import OnFailure, reraise, standing, step

if TYPE_CHECKING:
    from sae_lens_e2e.training.group import Group


def fit(
    model: SplicedModel,
    groups: "Sequence[Group]",
    batches: PromptBatches,
    plan: StepPlan,
    on_end: "Callable[[Group], None]" = lambda _: None,
    on_failure: OnFailure = reraise,
) -> None:
    """Train each group to its own end, in step with the others, on the same prompts.

    Around each step it does what SAELens' `fit` does: sparsity log, log, evaluation, checkpoint. `on_end` is called as soon as
    a group has finished, `on_failure` for one that raised, which leaves the others be. When `batches` is interrupted, those that
    still train write a checkpoint, and the interruption is raised.
    """
    with ranks.together():
        estimate_statistics(model, groups, batches, plan)
    for group in groups:
        group.copy_first()

    def end(group: "Group") -> None:
        group.finish()
        on_end(group)

    running = list(groups)
    tokens_per_step = groups[0].first.cfg.train_batch_size_samples
    largest = largest_block(groups, plan.prompts_per_forward * batches.store.context_size)
    with kept_memory(largest), Progress(groups) as progress:
        while running:
            standing([group for group in running if group.is_done], end, on_failure)
            running = [group for group in running if not group.is_done]
            if not running:
                break
            try:
                prompts = next(batches)
            except InterruptedException:
                standing(running, lambda g: g.save_checkpoint(str(g.first.n_training_samples)), on_failure)
                raise
            running = standing(running, _log_sparsity, on_failure)
            running = step(model, running, prompts, plan, on_failure)
            running = standing(running, lambda g: g.log_step(), on_failure)
            progress.update(tokens_per_step, running)


def _log_sparsity(group: "Group") -> None:
    for trainer in group.trainers.values():
        trainer.log_sparsity()
