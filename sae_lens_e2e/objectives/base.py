"""What an objective is, and what it is given to compare."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Self

from sae_lens_e2e.splice.unembedding import Head


@dataclass(frozen=True)
class SplicedBatch:
    """One forward pass without the SAE (clean) and one with it (spliced), at the tokens that are trained on.

    Masked positions are already left out. `clean` and `spliced` hold the activations at the objective's own hooks;
    `clean_final` and `spliced_final` are what the language model's head takes, None where the objective does not need them.
    """

    tokens: Int[Tensor, "tokens"]
    mse_loss: Float[Tensor, ""]
    """SAELens' reconstruction loss at the SAE's own hook: summed over d_in, mean over tokens."""
    clean: Mapping[str, Float[Tensor, "tokens *d_act"]] = field(default_factory=dict)
    spliced: Mapping[str, Float[Tensor, "tokens *d_act"]] = field(default_factory=dict)
    clean_final: Float[Tensor, "tokens d_final"] | None = None
    spliced_final: Float[Tensor, "tokens d_final"] | None = None
    head: Head | None = None

    def kl(self, token_weights: Float[Tensor, "tokens"] | None = None) -> Float[Tensor, ""]:
        """KL(clean ‖ spliced) of the next-token distributions in nats: mean over tokens, or summed with `token_weights`.

        Raises ValueError for an objective with `compares_logits = False`.
        """
        if self.head is None or self.clean_final is None or self.spliced_final is None:
            raise ValueError(
                "this objective has compares_logits=False, so there are no logits to compare; set it to True"
            )
        if token_weights is None:
            dtype = torch.promote_types(self.clean_final.dtype, torch.float32)
            token_weights = self.clean_final.new_full((len(self.tokens),), 1 / len(self.tokens), dtype=dtype)
        return self.head.kl(self.spliced_final, self.clean_final, token_weights)


class Term(NamedTuple):
    """One term of an objective: the loss gains coefficient · value; `value` is what is logged."""

    value: Float[Tensor, ""]
    coefficient: float
    parts: Mapping[str, Float[Tensor, ""]] = {}
    """What the value is made of, logged beside it: for instance the MSE at each downstream hook."""


@dataclass(frozen=True)
class Objective(ABC):
    """What the output of an SAE is compared with, and at what weight.

    A frozen dataclass whose fields are its settings. Fields named `..._coefficient` must be finite and not negative. The
    architecture's own terms (sparsity, auxiliary) are added by the trainer and are no business of an objective.
    """

    name: ClassVar[str]
    """What users write for `objective=`."""
    compares_logits: ClassVar[bool] = True
    """Whether `terms` calls `SplicedBatch.kl`; if not, the language model's last layers need not run."""

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
        """The hooks downstream of the SAE at which clean and spliced activations are compared."""
        return ()

    def resolve(self, later_blocks: Sequence[str], hook_name: str) -> Self:  # noqa: ARG002
        """The objective with whatever it leaves to the model made explicit.

        `later_blocks` are the hooks between blocks after the SAE's `hook_name`, in order; there may be none.
        """
        return self

    @abstractmethod
    def terms(self, batch: SplicedBatch) -> dict[str, Term]:
        """The terms of the loss, by the name under which they are logged."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, with the objective's name; `plugins.make_objective` takes them back."""
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}
