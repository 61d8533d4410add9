"""One optimizer step of any number of groups on the same prompts, with one clean pass for them all."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from sae_lens_e2e.splice import Clean, Remembered, SplicedModel, Where
from sae_lens_e2e.training.clock import Clock
from sae_lens_e2e.training.plan import StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_lens_e2e.training.group import Group

OnFailure = Callable[["Group", Exception], None]


def reraise(_group: "Group", error: Exception) -> None:
    """What a group's failure means where there is nothing else to go on with."""
    raise error


def step(
    model: SplicedModel,
    groups: "Sequence[Group]",
    prompts: Int[Tensor, "prompts pos"],
    plan: StepPlan,
    on_failure: OnFailure = reraise,
) -> "list[Group]":
    """One optimizer step of each group on `prompts`: the gradient of its loss, clipped, checked and applied once.

    A group that raises is given to `on_failure` and does not stop the others. Returns the groups whose step stands. Raises what
    `backward` raises.
    """
    live = backward(model, groups, prompts, plan, on_failure)
    for group in list(live):
        with _guarded(group, live, on_failure):
            group.end_step()
    return live


def backward(
    model: SplicedModel,
    groups: "Sequence[Group]",
    prompts: Int[Tensor, "prompts pos"],
    plan: StepPlan,
    on_failure: OnFailure = reraise,
) -> "list[Group]":
    """A step up to where it is applied: the gradient of each group's loss, the mean over all trained tokens of `prompts`.

    The prompts are worked through in micro-batches, each weighed by its share of the trained tokens. A group that raises is given
    to `on_failure` and does not stop the others. Returns the groups that have their gradients. Raises ValueError if no token of
    the prompts is trained on.
    """
    where = plan.positions.of(prompts)
    if where.n == 0:
        raise ValueError("exclude_special_tokens leaves no token to train on in a whole batch; exclude fewer")
    live = list(groups)
    for group in groups:
        group.begin_step()
    n_compared = sum(len(group.course.passes) for group in groups if group.objective.compares_logits)
    sites = {site for group in groups for site in group.sites.values()}
    hooks = list(dict.fromkeys(hook for group in groups for hook in group.objective.hooks))
    size, shared_clock = plan.prompts_per_forward, Clock(model.device)
    for tokens, micro in zip(prompts.split(size), where.split(size), strict=True):
        if micro.n == 0:
            continue
        with shared_clock, plan.lm_autocast(model.device):
            clean = model.clean(tokens, sites, hooks, final=n_compared > 0)
        remembered = _remembered(model, clean, micro) if n_compared > 1 else None
        for group in list(live):
            with _guarded(group, live, on_failure):
                group.forward_backward(clean, micro, micro.n / where.n, where.n_labels / where.n, remembered)
    for group in live:
        group.clock.add(shared_clock)
    return live


def _remembered(model: SplicedModel, clean: Clean, where: Where) -> Remembered | None:
    """What several passes compare their next-token distributions with, unless it is too much to hold."""
    if clean.final is None or not Remembered.fits(where.n, model.unembedding.d_vocab):
        return None
    return Remembered(where.take(clean.final))


@contextmanager
def _guarded(group: "Group", live: "list[Group]", on_failure: OnFailure) -> "Iterator[None]":
    """Time what a group does; one that raises is live no more."""
    try:
        with group.clock:
            yield
    except Exception as error:
        live.remove(group)
        on_failure(group, error)
