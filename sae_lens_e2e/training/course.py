"""Where a run is among its stages, and what its objective remembers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae_lens_e2e.objectives import Objective
from sae_lens_e2e.objectives.plugins import said_of
from sae_lens_e2e.objectives.running import RunningMeans
from sae_lens_e2e.training.objective_state import read_objective_state, write_objective_state
from sae_lens_e2e.training.stages import AnyObjective, LearningRate, stages_of

_STAGE = "stage"


class Course:
    """The objective of the step under way: that of the current stage, with its schedules' values, and its passes and memory.

    `cfg` is the trainers' config, `names` those of the SAEs in order of depth. Raises ValueError for an objective whose passes do not fit
    the names.
    """

    def __init__(self, objective: AnyObjective, cfg: Any, names: Sequence[str]):
        self._stages = stages_of(objective)
        self._rates = self._stages.learning_rates(cfg)
        self._passes = [checked_passes(one, names) for one in self._stages.objectives]
        self.stage = 0
        """The number of the current stage, from 0."""
        self.objective: Objective = self._stages.objectives[0].at(0.0)
        self.means = RunningMeans()
        """What the objective remembers of earlier forward passes of its stage."""
        self._means_before = self.means.values

    @property
    def n_stages(self) -> int:
        """How many there are; most runs have one."""
        return len(self._stages.stages)

    @property
    def passes(self) -> list[list[str]]:
        """The names of the SAEs in each pass of the current stage, in order of depth."""
        return self._passes[self.stage]

    @property
    def learning_rate(self) -> LearningRate:
        """The current stage's."""
        return self._rates[self.stage]

    def begin_step(self, step: int, fraction: float) -> bool:
        """Get ready for a step, which comes after as many others, and say whether a new stage begins with it."""
        before, self.stage = self.stage, self._stage_of(step)
        if self.stage != before:
            self.means.values = {}
        self.objective = self._stages.objectives[self.stage].at(fraction)
        self._means_before = dict(self.means.values)
        return self.stage != before

    def undo_step(self) -> None:
        """Forget what a step that does not stand has seen."""
        self.means.values = self._means_before

    def save(self, folder: Path) -> None:
        """Write the stage, if there are several, and what the objective remembers, if anything, into an SAE's checkpoint."""
        stage = {_STAGE: torch.tensor(self.stage)} if self.n_stages > 1 else {}
        write_objective_state(self.means.values | stage, folder)

    def load(self, folder: Path) -> None:
        """Go on in the stage of a checkpoint, with what was remembered there."""
        self.means.values = read_objective_state(folder)
        stage = self.means.values.pop(_STAGE, None)
        self.stage = 0 if stage is None else min(int(stage), self.n_stages - 1)

    def check_loaded(self, steps: int) -> None:
        """Raise ValueError if a checkpoint that is after some steps is of another stage than they lead to now."""
        stage = self._stage_of(max(steps - 1, 0))
        if stage != self.stage:
            raise ValueError(
                f"resume_from_checkpoint is of stage {self.stage} ({self._stages.objectives[self.stage].name}), and by training_tokens and "
                f"until its {steps} steps would end in stage {stage} ({self._stages.objectives[stage].name}); set these so that they end in "
                f"stage {self.stage}"
            )

    def _stage_of(self, step: int) -> int:
        """That of the step which comes after as many others."""
        return max(number for number, rate in enumerate(self._rates) if rate.first_step <= step)


def checked_passes(objective: Objective, names: Sequence[str]) -> list[list[str]]:
    """The objective's passes, each in order of depth. Raises ValueError for names that are not there, or left out."""
    passes = [set(names_of_pass) for names_of_pass in objective.passes(names)]
    for of_pass in passes:
        if unknown := sorted(of_pass - set(names)):
            raise ValueError(f"{said_of(objective)}: a pass names the SAE {unknown[0]!r}; there are {', '.join(names)}")
    if not all(passes):
        raise ValueError(f"{said_of(objective)}: a pass names no SAE")
    if left_out := [name for name in names if not any(name in of_pass for of_pass in passes)]:
        raise ValueError(f"{said_of(objective)}: no pass has the SAE {left_out[0]!r}, which would not be trained")
    return [[name for name in names if name in of_pass] for of_pass in passes]
