"""What is made of next-token logits, a chunk of tokens at a time: a value each, and its gradient, formed by hand in place."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

REMEMBERED_BYTES = 256 * 2**20
"""The most that is held of clean distributions which several passes are compared with."""


class Write(Protocol):
    """Forms a chunk's logits from hidden states, soft cap included."""

    def __call__(self, hidden: Tensor, out: Tensor) -> None:
        """Write them to `out`."""
        ...

    def slope(self, logits: Tensor) -> Tensor | None:
        """d capped / d logits of capped ones, if they are."""
        ...


class Remembered:
    """The clean side of a KL divergence that several passes are compared with: worked out by the first, held for the others.

    Takes tokens x d_vocab numbers, so `fits` says whether to.
    """

    def __init__(self, hidden: Float[Tensor, "tokens d_final"]):
        self.hidden = hidden
        self._log_p: dict[int, Tensor] = {}

    @staticmethod
    def fits(n_tokens: int, d_vocab: int) -> bool:
        """Whether so many tokens' distributions are few enough to be held."""
        return n_tokens * d_vocab * 4 <= REMEMBERED_BYTES

    def log_p(self, rows: slice, form: Callable[[], Tensor]) -> Tensor:
        """log p of a chunk of tokens, `form` being what gives it the first time; chunks are cut in one way."""
        if rows.start not in self._log_p:
            self._log_p[rows.start] = form()
        return self._log_p[rows.start]


class Divergence(ABC):
    """What is made of each token's logits, against something known."""

    @abstractmethod
    def of_rows(
        self, write: Write, hidden: Tensor, rows: slice, buffers: Tensor, blocks: Iterable[slice], room: Tensor
    ) -> tuple[Tensor, Tensor]:
        """By hand, for a chunk of tokens: each one's value, and its gradient by the logits, which is in `buffers`.

        `room` is that of a block, twice.
        """

    @abstractmethod
    def of_logits(self, logits: Tensor, rows: slice, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Each row's value, to be differentiated by autograd."""


class KL(Divergence):
    """KL(clean ‖ spliced) in nats, from the clean model's hidden states."""

    def __init__(self, clean: Float[Tensor, "tokens d_final"] | Remembered):
        self.remembered = clean if isinstance(clean, Remembered) else None
        self.clean = clean.hidden if isinstance(clean, Remembered) else clean

    def of_rows(
        self, write: Write, hidden: Tensor, rows: slice, buffers: Tensor, blocks: Iterable[slice], room: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, of_clean = buffers

        def form(out: Tensor) -> Tensor:
            write(self.clean[rows], out)
            for block in blocks:
                _log_softmax_(out[block])
            return out

        log_p = self._log_p(rows, lambda: form(of_clean if self.remembered is None else torch.empty_like(logits)))
        write(hidden, logits)
        values: list[Tensor] = []
        for block in blocks:
            log_q = logits[block]
            slope = write.slope(log_q)
            _log_softmax_(log_q)
            p, ratio = (one[: len(log_q)] for one in room)
            torch.exp(log_p[block], out=p)
            # Σ p (log p - log q), which is several times as fast in two steps as by `vecdot` or a product of matrices.
            values.append(torch.sub(log_p[block], log_q, out=ratio).mul_(p).sum(-1))
            log_q.exp_().sub_(p)
            if slope is not None:
                log_q.mul_(slope)
        return torch.cat(values), logits

    def of_logits(self, logits: Tensor, rows: slice, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            log_p = self._log_p(rows, lambda: logits_of(self.clean[rows]).log_softmax(-1))
        return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)

    def _log_p(self, rows: slice, form: Callable[[], Tensor]) -> Tensor:
        return form() if self.remembered is None else self.remembered.log_p(rows, form)


class CE(Divergence):
    """-log p(label) in nats; every token has a label here."""

    def __init__(self, labels: Int[Tensor, "tokens"]):
        self.labels = labels

    def of_rows(
        self,
        write: Write,
        hidden: Tensor,
        rows: slice,
        buffers: Tensor,
        blocks: Iterable[slice],
        room: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        logits, labels = buffers[0], self.labels[rows, None]
        write(hidden, logits)
        values: list[Tensor] = []
        for block in blocks:
            log_q, label = logits[block], labels[block]
            slope = write.slope(log_q)
            _log_softmax_(log_q)
            values.append(-log_q.gather(-1, label)[:, 0])
            log_q.exp_().scatter_add_(-1, label, torch.full_like(label, -1, dtype=log_q.dtype))
            if slope is not None:
                log_q.mul_(slope)
        return torch.cat(values), logits

    def of_logits(self, logits: Tensor, rows: slice, logits_of: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG002
        return -logits.log_softmax(-1).gather(-1, self.labels[rows, None])[:, 0]


def _log_softmax_(logits: Float[Tensor, "rows d_vocab"]) -> None:
    """In place: each number is read for the last time before it is written."""
    torch.log_softmax(logits, -1, out=logits)
