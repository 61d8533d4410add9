"""What an objective is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from typing_extensions import Self

from sae_lens_e2e.objectives.schedule import Schedule

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_lens_e2e.objectives.batch import Batch

Coefficient: TypeAlias = Any
"""A number, or a `Schedule` or its points, in whose place `Objective.at` puts a number before `terms` is called.

Type checkers are told no more, so that a term may be made of it; what it is, is checked when an objective is made.
"""


KL_PRODUCTS = 3
"""Of a KL divergence: the clean logits, the spliced ones, and the gradient by the hidden state."""
CE_PRODUCTS = 2
"""Of a cross-entropy: the spliced logits, and the gradient by the hidden state."""


@dataclass(frozen=True)
class Term:
    """One term of an objective: the loss gains coefficient · value(); value() is what is logged.

    `value` is called only if the term weighs anything, or on a logging step (without gradients, then); `parts`, what the
    value is made of, on logging steps only. Raises TypeError for a value that is no function or a coefficient that is no number,
    ValueError for one that is negative or not finite.
    """

    coefficient: float
    value: Callable[[], Float[Tensor, ""]]
    parts: Callable[[], Mapping[str, Float[Tensor, ""]]] | None = None

    def __post_init__(self) -> None:
        if not callable(self.value):
            raise TypeError(
                f"Term({type(self.coefficient).__name__}, {type(self.value).__name__}): since 0.2 a term is its coefficient "
                "and a function, such as Term(0.5, lambda: batch.kl()), and `parts` is a function too"
            )
        if self.parts is not None and not callable(self.parts):
            raise TypeError(f"Term.parts is a {type(self.parts).__name__} and must be a function that returns a dict")
        coefficient: object = self.coefficient
        if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
            raise TypeError(
                f"Term: the coefficient {coefficient!r} must be a number, not a {type(coefficient).__name__}"
            )
        if not math.isfinite(coefficient) or coefficient < 0:
            raise ValueError(f"Term: the coefficient {coefficient!r} must be a finite number that is not negative")


@dataclass(frozen=True)
class Objective(ABC):
    """What the output of SAEs is compared with, and at what weight.

    A frozen dataclass whose fields are its settings. Fields named `..._coefficient` must be finite and not negative, or a `Schedule`
    of such numbers over the training done. The architecture's own terms (sparsity, auxiliary) are added by the trainer and are no
    business of an objective.
    """

    name: ClassVar[str]
    """What users write for `objective=`."""
    compares_logits: ClassVar[bool] = True
    """Whether `terms` calls `Batch.kl` or `cross_entropy`; if not, the language model's last layers need not run.

    With neither logits nor hooks to compare nothing is spliced in, and each SAE is given clean activations.
    """

    def __post_init__(self) -> None:
        coefficients = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_coefficient")}
        for field_name, value in coefficients.items():
            if isinstance(value, list | tuple | Schedule):
                coefficients[field_name] = self._schedule(field_name, value)
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{self.name}: {field_name}={value!r} must be a finite number that is not negative")
        for fraction in _turns(coefficients.values()) if coefficients else ():
            if not any(_at(value, fraction) for value in coefficients.values()):
                when = f" at the fraction {fraction:g} of training" if self._schedules else ""
                raise ValueError(
                    f"{self.name}: {', '.join(coefficients)} are all 0{when}, which leaves nothing to train on; raise one"
                )

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks downstream of the SAEs at which clean and spliced activations are compared."""
        return ()

    @property
    def logit_products(self) -> int | None:
        """Products of a token's last hidden state with the unembedding in a pass of `terms`, the backward pass included.

        It is what `equal: flops` of a sweep cannot see by itself: `KL_PRODUCTS` if `terms` calls `Batch.kl`, `CE_PRODUCTS` if
        `cross_entropy`, their sum if both. None, which it is of an objective that compares logits and does not say, is not known.
        """
        return None if self.compares_logits else 0

    def resolve(self, later_blocks: Sequence[str], hook_name: str) -> Self:  # noqa: ARG002
        """The objective with whatever it leaves to the model made explicit.

        `later_blocks` are the hooks between blocks after `hook_name`, that of the last SAE, in order; there may be none.
        """
        return self

    def passes(self, names: Sequence[str]) -> Sequence[Collection[str]]:
        """Which of the SAEs, by name, are spliced in together: a pass for each set, and the loss is their sum. All in one."""
        return [names]

    def at(self, fraction: float) -> Self:
        """The objective when a fraction of the training is done: itself, with a number in the place of each schedule."""
        values = {name: schedule.at(fraction) for name, schedule in self._schedules.items()}
        return replace(self, **values) if values else self

    @abstractmethod
    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the loss, by the name under which they are logged."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, with the objective's name; `plugins.make_objective` takes them back."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        schedules = {name: schedule.to_list() for name, schedule in self._schedules.items()}
        return {"name": self.name, **settings, **schedules}

    @property
    def _schedules(self) -> dict[str, Schedule]:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Schedule)}

    def _schedule(self, field_name: str, value: Any) -> Schedule:
        try:
            schedule = value if isinstance(value, Schedule) else Schedule(value)
        except ValueError as error:
            raise ValueError(f"{self.name}: {field_name}={value!r}: {error}") from error
        object.__setattr__(self, field_name, schedule)
        return schedule


def _turns(coefficients: Collection[Coefficient]) -> list[float]:
    """The fractions of training at which linear stretches begin: what is not 0 at one of them is not 0 all along the next."""
    points = [point for value in coefficients if isinstance(value, Schedule) for point in value.points]
    return sorted({0.0, *(fraction for fraction, _ in points if fraction < 1)})


def _at(coefficient: Coefficient, fraction: float) -> float:
    return coefficient.at(fraction) if isinstance(coefficient, Schedule) else coefficient
