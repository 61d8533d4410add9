"""Which tokens of a batch are trained, measured and replaced."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

NO_LABEL = -100
"""The label of a token that nothing follows, as in PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Positions:
    """The one rule by which tokens count: inside `seqpos_slice` of their prompt, and not one of `excluded_tokens`.

    A token that counts is trained on, measured, and replaced in a spliced pass; every other keeps the model's own activation.
    """

    seqpos_slice: tuple[int | None, ...] = (None,)
    excluded_tokens: tuple[int, ...] = ()

    def of(self, tokens: Int[Tensor, "batch pos"]) -> "Where":
        """Which tokens of a batch count. Excluded tokens are looked for on the host, which waits for tokens on a device."""
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        mask[:, slice(*self.seqpos_slice)] = True
        if self.excluded_tokens:
            mask &= ~torch.isin(tokens.cpu(), torch.tensor(self.excluded_tokens))
        return Where(mask)

    def check(self, context_size: int) -> None:
        """Raise ValueError if a prompt has no position that predicts a next token."""
        if not any(position < context_size - 1 for position in range(context_size)[slice(*self.seqpos_slice)]):
            raise ValueError(
                f"seqpos_slice={self.seqpos_slice} of context_size={context_size} has no position with a next token to "
                "predict; choose earlier positions or a longer context"
            )


@dataclass(frozen=True)
class Where:
    """The tokens of one batch that count, known on the host, so that nothing waits for a device to count them."""

    mask: Bool[Tensor, "batch pos"]

    @classmethod
    def everywhere(cls, tokens: Int[Tensor, "batch pos"]) -> "Where":
        """All tokens of a batch."""
        return cls(torch.ones(tokens.shape, dtype=torch.bool))

    @cached_property
    def n(self) -> int:
        """How many tokens count."""
        return int(self.mask.numpy().sum())

    @cached_property
    def is_all(self) -> bool:
        """Whether every token does."""
        return self.n == self.mask.numel()

    def split(self, prompts: int) -> "list[Where]":
        """The same for each micro-batch of `prompts` prompts."""
        return [Where(mask) for mask in self.mask.split(prompts)]

    def take(self, values: Tensor) -> Tensor:
        """(batch, pos, ...) to (n, ...): those of the tokens that count, in order."""
        flat = values.flatten(0, 1)
        return flat if self.is_all else flat.index_select(0, self._rows_on(values.device))

    def put(self, values: Tensor, new: Tensor) -> Tensor:
        """`values` (batch, pos, ...) with `new` (n, ...) at the tokens that count; gradients flow to both."""
        if self.is_all:
            return new.reshape(values.shape)
        return values.flatten(0, 1).index_copy(0, self._rows_on(values.device), new).reshape(values.shape)

    def labels(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "n"]:
        """The token that follows each; NO_LABEL at the end of a prompt."""
        return self.take(F.pad(tokens[:, 1:], (0, 1), value=NO_LABEL))

    @cached_property
    def n_labels(self) -> int:
        """How many of them have a next token."""
        return int(self.mask.numpy()[:, :-1].sum())

    def place(self, device: torch.device | str = "cpu") -> Int[Tensor, "n 2"]:
        """(prompt, position) of each."""
        return self.mask.nonzero().to(device)

    def _rows_on(self, device: torch.device) -> Int[Tensor, "n"]:
        rows = self._rows
        if device not in rows:
            rows[device] = rows[torch.device("cpu")].to(device)
        return rows[device]

    @cached_property
    def _rows(self) -> dict[torch.device, Tensor]:
        return {torch.device("cpu"): self.mask.flatten().nonzero()[:, 0]}


def excluded(tokens: Sequence[int] | Tensor | None) -> tuple[int, ...]:
    """Token ids as `Positions` takes them, however they are given."""
    if tokens is None:
        return ()
    return tuple(sorted(int(token) for token in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)))
