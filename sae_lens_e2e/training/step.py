"""One optimizer step of any number of groups on the same prompts, with one clean pass for them all."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from sae_lens_e2e.splice import Clean, Remembered, SplicedModel, Where
from sae_lens_e2e.training import ranks
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

    def end(group: "Group") -> None:
        with group.clock:
            group.end_step()

    return standing(live, end, on_failure)


def backward(
    model: SplicedModel,
    groups: "Sequence[Group]",
    prompts: Int[Tensor, "prompts pos"],
    plan: StepPlan,
    on_failure: OnFailure = reraise,
) -> "list[Group]":
    """A step up to where it is applied: the gradient of each group's loss, the mean over all trained tokens of `prompts`.

    The prompts are worked through in micro-batches, each weighed by its share of the trained tokens; several ranks, all of which have the
    same prompts, deal the micro-batches among them. A group that raises is given to `on_failure` and does not stop the others. Returns the
    groups that have their gradients. Raises ValueError if there is a rank that has no token of the prompts to train on.
    """
    where, shared_clock = plan.positions.of(prompts), Clock(model.device)
    failed: dict[Group, Exception] = {}
    with ranks.together():
        micro_batches = _dealt(prompts, where, plan)
        for group in groups:
            group.begin_step()
        n_compared = sum(len(group.course.passes) for group in groups if group.objective.compares_logits)
        sites = {site for group in groups for site in group.sites.values()}
        hooks = list(dict.fromkeys(hook for group in groups for hook in group.objective.hooks))
        for tokens, micro in micro_batches:
            with shared_clock, plan.lm_autocast(model.device):
                clean = model.clean(tokens, sites, hooks, final=n_compared > 0)
            remembered = _remembered(model, clean, micro) if n_compared > 1 else None
            for group in [group for group in groups if group not in failed]:
                with _kept(failed, group), group.clock:
                    group.forward_backward(clean, micro, micro.n / where.n, where.n_labels / where.n, remembered)
    live = _settled(groups, failed, on_failure)
    for group in live:
        group.clock.add(shared_clock)
        with group.clock:
            group.sum_over_ranks(where.n, len(micro_batches))
    return live


def standing(groups: "Sequence[Group]", action: "Callable[[Group], None]", on_failure: OnFailure) -> "list[Group]":
    """The groups that came through an action on every rank; one that raised, as on a full disk, is given to `on_failure`."""
    failed: dict[Group, Exception] = {}
    for group in groups:
        with _kept(failed, group):
            action(group)
    return _settled(groups, failed, on_failure)


def _dealt(prompts: Int[Tensor, "prompts pos"], where: Where, plan: StepPlan) -> Sequence[tuple[Tensor, Where]]:
    """This rank's micro-batches, of those that have a trained token."""
    size = plan.prompts_per_forward
    micro_batches = [pair for pair in zip(prompts.split(size), where.split(size), strict=True) if pair[1].n]
    if not micro_batches:
        raise ValueError("exclude_special_tokens leaves no token to train on in a whole batch; exclude fewer")
    if len(micro_batches) < ranks.world_size():
        raise ValueError(
            f"exclude_special_tokens leaves tokens to train on in {len(micro_batches)} forward passes of a batch, fewer than the "
            f"{ranks.world_size()} ranks; exclude fewer"
        )
    return ranks.share(micro_batches)


def _settled(groups: "Sequence[Group]", failed: "Mapping[Group, Exception]", on_failure: OnFailure) -> "list[Group]":
    """The groups that failed on no rank; the others are given to `on_failure`, on all ranks."""
    live: list[Group] = []
    for group, error in zip(groups, ranks.agreed([failed.get(group) for group in groups]), strict=True):
        if error is None:
            live.append(group)
        else:
            on_failure(group, error)
    return live


def _remembered(model: SplicedModel, clean: Clean, where: Where) -> Remembered | None:
    """What several passes compare their next-token distributions with, unless it is too much to hold."""
    if clean.final is None or not Remembered.fits(where.n, model.unembedding.d_vocab):
        return None
    return Remembered(where.take(clean.final))


@contextmanager
def _kept(failed: "dict[Group, Exception]", group: "Group") -> "Iterator[None]":
    """Keep what a group raises, without what its frames hold of the device, which the others need."""
    try:
        yield
    except Exception as error:
        clear_frames(error.__traceback__)
        failed[group] = error
