"""The W&B runs of a sweep's points, one each, in the sweep's group."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from sae_lens import logger

from sae_lens_e2e.sweep.plan import AnyConfig
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.wandb_run import WandbRun, unheard

Item = TypeVar("Item")
Given = TypeVar("Given")


class UnheardRun:
    """In the place of a run, on ranks that are not the first."""

    log = staticmethod(unheard)

    def summarise(self, figures: Mapping[str, Any]) -> None:
        """As `log` does."""


@contextmanager
def runs_of_ranks(group: str, configs: Mapping[str, AnyConfig]) -> Iterator[Mapping[str, WandbRun | UnheardRun]]:
    """`wandb_runs` of rank 0; the others log where nothing is heard, as many points as W&B takes."""
    with ranks.on_first(lambda: wandb_runs(group, configs), {}) as runs:
        taken = ranks.first(lambda: list(runs))
        yield runs if ranks.is_first() else dict.fromkeys(taken, UnheardRun())


@contextmanager
def wandb_runs(group: str, configs: Mapping[str, AnyConfig]) -> Iterator[dict[str, WandbRun]]:
    """The runs of those points that ask for one, by name; a point whose run W&B does not take goes on without, with a warning."""

    def begun(name: str) -> WandbRun | None:
        try:
            return WandbRun(configs[name], group=group, name=name, reinit="create_new")
        except ConnectionError as error:
            logger.warning(f"point {name} is trained without W&B: {error}")
            return None

    wanted = [name for name, cfg in configs.items() if cfg.logger.log_to_wandb]
    found = zip(wanted, _at_once(begun, wanted), strict=True)
    runs = {name: run for name, run in found if run is not None}
    try:
        yield runs
    finally:
        _at_once(WandbRun.finish, list(runs.values()))


def _at_once(action: Callable[[Item], Given], items: Sequence[Item]) -> list[Given]:
    """What an action gives for each item; all are waited for together, lest a server that is gone be waited for each time."""
    if not items:
        return []
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(action, items))
