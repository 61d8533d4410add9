"""What a sweep is: its points, and how they are made comparable."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens_e2e.loading.documents import HELD_OUT
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig

AnyConfig = E2ERunnerConfig[Any] | E2EMultiRunnerConfig


@dataclass(frozen=True)
class Point:
    """One SAE of a sweep."""

    name: str
    """What varies, fit for a folder: 'e2e_ds-l1_coefficient=0.1-seed=0'."""
    settings: Mapping[str, Any]
    """As in the file, base and grid together."""

    def config(self, folder: Path) -> AnyConfig:
        """The run that trains it into `folder`. Raises ValueError, naming the field, for what cannot be honoured."""
        settings = {
            "logger": {"log_to_wandb": False},
            **deepcopy(dict(self.settings)),
            "output_path": str(folder),
            "checkpoint_path": str(folder / "checkpoints"),
        }
        try:
            return (E2EMultiRunnerConfig if "saes" in settings else E2ERunnerConfig).from_dict(settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"point {self.name}: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Tune:
    """How a point's learning rate is chosen: by the CE loss increase on documents that are neither trained on nor reported.

    Raises ValueError, in one line, for what is no choice.
    """

    lr: tuple[float, ...]
    """The candidates."""
    fraction: float = 1.0
    """Of a point's training tokens, those of each candidate's run."""
    validation: float = HELD_OUT
    """Which part of the training documents candidates are not trained on, but scored by."""

    def __post_init__(self) -> None:
        rates = list(self.lr) if isinstance(self.lr, list | tuple) else [self.lr]
        numbers = [rate for rate in rates if isinstance(rate, int | float) and not isinstance(rate, bool)]
        if len(set(rates)) < 2 or len(set(numbers)) < len(rates) or not all(0 < rate < math.inf for rate in numbers):
            raise ValueError(f"tune: lr={self.lr!r} must be a list of two or more different numbers above 0")
        object.__setattr__(self, "lr", tuple(sorted(map(float, rates))))
        for name, value, most in (("fraction", self.fraction, 1), ("validation", self.validation, 0.9)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ValueError(f"tune: {name}={value!r} must be a number above 0, at most {most}")


@dataclass(frozen=True)
class Sweep:
    """What to train and evaluate, in the order of the file."""

    name: str
    points: tuple[Point, ...]
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """`batch_size_prompts` and `max_tokens` of the evaluation, and `held_out`, the part of the documents kept for it."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """All of the file."""
    tune: Tune | None = None
    """How the points' learning rates are chosen, if they are."""
    equal: str = "tokens"
    """What is the same for all points of a model and of the file's training_tokens: those tokens, or the FLOPs of training."""
