"""Stages of a run: one objective after the other, each with a learning rate of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from sae_lens_e2e.objectives import Objective
from sae_lens_e2e.objectives.plugins import available_objectives, make_objective

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

WARM = "warm_"
"""What an objective's name begins with that is to follow a local start: 'warm_e2e_ds'."""
WARM_UNTIL = 0.4
"""Which part of the training that start takes, unless `until` says otherwise."""
_LOCAL = "local"


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with an objective and a learning rate of its own.

    It ends when the fraction `until` of the whole run's optimizer steps is done (rounded to a step), and begins where the one before
    ends. What is left at None is the run's own, but a stage with its own `lr` and no `lr_end` ends at a tenth of it, as in SAELens.
    Warm-up, schedule and decay run over the stage's own steps, with a new Adam: its moments are those of another loss, and are forgotten at the
    border, as if a second run had been started from the first one's SAE. All else goes on: the data, the warm-up of sparsity coefficients,
    which features are dead, the fraction of training done that a `Schedule` goes by.

    Raises what `make_objective` raises; the numbers are checked when they are part of a run's config.
    """

    objective: str | dict[str, Any] | Objective
    until: float = 1.0
    lr: float | None = None
    lr_end: float | None = None
    lr_scheduler_name: str | None = None
    lr_warm_up_steps: int | None = None
    lr_decay_steps: int | None = None
    n_restart_cycles: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", make_objective(self.objective))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings."""
        assert isinstance(self.objective, Objective)
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**settings, "objective": self.objective.to_dict()}


class LearningRate(NamedTuple):
    """A stage's learning rate over its own steps."""

    first_step: int
    """The optimizer step of the run with which the stage begins."""
    steps: int
    lr: float
    lr_end: float
    scheduler_name: str
    warm_up_steps: int
    decay_steps: int
    n_restart_cycles: int

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """SAELens' schedule, at the stage's first step. Raises ValueError for settings that make none."""
        # Here, so that `sae-lens-e2e objectives` says what stages there are without it.
        from sae_lens.training.optim import get_lr_scheduler

        return get_lr_scheduler(
            self.scheduler_name,
            optimizer=optimizer,
            training_steps=self.steps,
            lr=self.lr,
            warm_up_steps=self.warm_up_steps,
            decay_steps=self.decay_steps,
            lr_end=self.lr_end,
            num_cycles=self.n_restart_cycles,
        )


@dataclass(frozen=True)
class Stages:
    """The stages of a run, in order; it goes by the name 'warm_X' if it is local first and then X, else by those of all.

    Raises ValueError if there are none.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("objective=[] has no stages; give it one")

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What each stage compares."""
        found = tuple(stage.objective for stage in self.stages)
        assert all(isinstance(objective, Objective) for objective in found)
        return found  # pyright: ignore[reportReturnType]

    @property
    def name(self) -> str:
        """What tables and figures call it."""
        names = [objective.name for objective in self.objectives]
        return f"{WARM}{names[1]}" if names[0] == _LOCAL and len(names) == 2 else "-then-".join(names)

    @property
    def compares_logits(self) -> bool:
        """Whether any of the stages does."""
        return any(objective.compares_logits for objective in self.objectives)

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that any of the stages compares."""
        return tuple(dict.fromkeys(hook for objective in self.objectives for hook in objective.hooks))

    def resolve(self, later_blocks: Sequence[str], hook_name: str) -> Stages:
        """The stages with whatever their objectives leave to the model made explicit."""
        resolved = [objective.resolve(later_blocks, hook_name) for objective in self.objectives]
        return Stages(tuple(replace(s, objective=o) for s, o in zip(self.stages, resolved, strict=True)))

    def steps(self, n_steps: int) -> list[range]:
        """The optimizer steps of each stage, of so many in all."""
        ends = [*(round(stage.until * n_steps) for stage in self.stages[:-1]), n_steps]
        return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def learning_rates(self, cfg: Any) -> list[LearningRate]:
        """Each stage's learning rate and steps in a run of these settings, a runner config's or a trainer's."""
        rates: list[LearningRate] = []
        for stage, steps in zip(self.stages, self.steps(cfg.total_training_steps), strict=True):
            of_run = cfg.lr_end if stage.lr is None else stage.lr / 10
            rates.append(
                LearningRate(
                    first_step=steps.start,
                    steps=len(steps),
                    lr=_or(stage.lr, cfg.lr),
                    lr_end=_or(stage.lr_end, of_run),
                    scheduler_name=_or(stage.lr_scheduler_name, cfg.lr_scheduler_name),
                    warm_up_steps=_or(stage.lr_warm_up_steps, cfg.lr_warm_up_steps),
                    decay_steps=_or(stage.lr_decay_steps, cfg.lr_decay_steps),
                    n_restart_cycles=_or(stage.n_restart_cycles, cfg.n_restart_cycles),
                )
            )
        return rates

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, with the name; `objective_of` takes them back."""
        return {"name": self.name, "stages": [stage.to_dict() for stage in self.stages]}


AnyObjective: TypeAlias = Objective | Stages
"""What a run is trained on."""


def stages_of(objective: AnyObjective) -> Stages:
    """The stages of a run; one objective is one stage."""
    return objective if isinstance(objective, Stages) else Stages((Stage(objective),))


def objective_of(spec: Any) -> AnyObjective:
    """What a run is trained on, from what a user may write for `objective=`.

    That is an objective, its name or its settings; stages in a list, each a `Stage` or its settings; `Stages` or what their `to_dict`
    gave; or 'warm_X' for any objective X: local for the first 40 % of training, then X. {"name": "warm_X", ...} takes settings of X, and
    `until` and the learning rate's of `Stage`, which are the second stage's. Raises ValueError or TypeError, in one line, for anything else.
    """
    if isinstance(spec, Stages):
        return spec
    if isinstance(spec, list | tuple):
        return Stages(tuple(_stage(one) for one in spec))
    if isinstance(spec, dict) and "stages" in spec:
        return _recorded(spec)
    settings = {"name": spec} if isinstance(spec, str) else spec
    if isinstance(settings, dict) and (after := _warm(settings.get("name"))) is not None:
        return _warm_start(after, settings)
    return make_objective(spec)


def _stage(spec: Any) -> Stage:
    if isinstance(spec, Stage):
        return spec
    known = [f.name for f in fields(Stage)]
    if not isinstance(spec, Mapping) or "objective" not in spec:
        raise ValueError(f"objective: {spec!r} is no stage; write a Stage, or its settings: {', '.join(known)}")
    if unknown := [key for key in spec if key not in known]:
        raise ValueError(f"objective: a stage has no setting {unknown[0]!r}; it has {', '.join(known)}")
    return Stage(**spec)


def _recorded(spec: Mapping[str, Any]) -> Stages:
    if unknown := [key for key in spec if key not in ("name", "stages")]:
        raise ValueError(f"objective: {unknown[0]!r} is no setting of stages; put it into the stage that it is of")
    if not isinstance(spec["stages"], list | tuple):
        raise ValueError(f"objective: stages={spec['stages']!r} must be a list")
    stages = Stages(tuple(_stage(one) for one in spec["stages"]))
    if spec.get("name", stages.name) != stages.name:
        raise ValueError(f"objective: name={spec['name']!r}, but these stages are {stages.name!r}; leave the name out")
    return stages


def _warm(name: Any) -> str | None:
    """The objective that is to follow a local start, if a name says so and no objective has that name itself."""
    if not isinstance(name, str) or not name.startswith(WARM):
        return None
    known = available_objectives()
    return name.removeprefix(WARM) if name not in known and name.removeprefix(WARM) in known else None


def _warm_start(after: str, settings: Mapping[str, Any]) -> Stages:
    of_stage = {f.name for f in fields(Stage)} - {"objective", "until"}
    second = {key: value for key, value in settings.items() if key in of_stage}
    of_objective = {key: value for key, value in settings.items() if key not in {"until", *of_stage}}
    first = Stage(_LOCAL, until=settings.get("until", WARM_UNTIL))
    return Stages((first, Stage({**of_objective, "name": after}, **second)))


def _or(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given
