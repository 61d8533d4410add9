"""What an objective is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from sae_lens_e2e.objectives.batch import Batch


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

    A frozen dataclass whose fields are its settings. Fields named `..._coefficient` must be finite and not negative. The
    architecture's own terms (sparsity, auxiliary) are added by the trainer and are no business of an objective.
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
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{self.name}: {field_name}={value!r} must be a finite number that is not negative")
        if coefficients and not any(coefficients.values()):
            raise ValueError(
                f"{self.name}: {', '.join(coefficients)} are all 0, which leaves nothing to train on; raise one"
            )

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks downstream of the SAEs at which clean and spliced activations are compared."""
        return ()

    def resolve(self, later_blocks: Sequence[str], hook_name: str) -> Self:  # noqa: ARG002
        """The objective with whatever it leaves to the model made explicit.

        `later_blocks` are the hooks between blocks after `hook_name`, that of the last SAE, in order; there may be none.
        """
        return self

    def passes(self, names: Sequence[str]) -> Sequence[Collection[str]]:
        """Which of the SAEs, by name, are spliced in together: a pass for each set, and the loss is their sum. All in one."""
        return [names]

    @abstractmethod
    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the loss, by the name under which they are logged."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, with the objective's name; `plugins.make_objective` takes them back."""
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}
