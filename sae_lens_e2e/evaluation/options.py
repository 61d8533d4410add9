"""How much of which data SAEs are evaluated on, and what is compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How a dataset is run through a language model. Raises ValueError, naming the field, for a limit below 1."""

    batch_size_prompts: int = 16
    """Prompts a forward pass; the last prompts, if they fill no batch, are left out."""
    n_batches: int | None = None
    """At most so many are evaluated; None for the whole dataset."""
    max_tokens: int | None = None
    """At most so many are evaluated, in whole batches; None for the whole dataset."""
    context_size: int | None = None
    """Tokens a prompt; None for what the SAE's metadata say."""
    model_kwargs: Mapping[str, Any] | None = None
    """What the language model's forward pass takes besides tokens."""
    verbose: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        self._check_positive("batch_size_prompts", "n_batches", "max_tokens", "context_size")

    def limit(self, available: int | None, context_size: int) -> int | None:
        """How many of the available batches to evaluate; None for as many as there turn out to be.

        Raises ValueError if `max_tokens` does not allow one.
        """
        tokens_per_batch = self.batch_size_prompts * context_size
        if self.max_tokens is not None and self.max_tokens < tokens_per_batch:
            raise ValueError(
                f"max_tokens={self.max_tokens} is less than one batch, {tokens_per_batch} tokens; raise it, or lower "
                "batch_size_prompts"
            )
        of_tokens = None if self.max_tokens is None else self.max_tokens // tokens_per_batch
        return min((limit for limit in (available, self.n_batches, of_tokens) if limit is not None), default=None)

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(PassOptions):
    """`PassOptions`, and what is measured of each SAE. Raises ValueError, naming the field, for a limit below 1."""

    downstream_hooks: Sequence[str] | None = None
    """Later hooks to compare; None for the input of every later block and the output of the last."""
    alive_tokens: int = 500_000
    """Among how many measured tokens a feature has to fire to be alive; by default the paper's 500,000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("alive_tokens")
