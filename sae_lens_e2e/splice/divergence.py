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
    """The clean side of a KL divergence that several passes are compared with: its logits, formed by the first, held for the others.

    Takes tokens x d_vocab numbers, so `fits` says whether to.
    """

    def __init__(self, hidden: Float[Tensor, "tokens d_final"]):
        self.hidden = hidden
        self._logits: dict[int, Tensor] = {}

    @staticmethod
    def fits(n_tokens: int, d_vocab: int) -> bool:
        """Whether so many tokens' logits are few enough to be held."""
        return n_tokens * d_vocab * 4 <= REMEMBERED_BYTES

    def logits(self, rows: slice, form: Callable[[], Tensor]) -> Tensor:
        """Those of a chunk of tokens, `form` being what gives them the first time; chunks are cut in one way."""
        if rows.start not in self._logits:
            self._logits[rows.start] = form()
        return self._logits[rows.start]


class Divergence(ABC):
    """What is made of each token's logits, against something known."""

    @abstractmethod
    def of_rows(
        self, write: Write, hidden: Tensor, rows: slice, buffers: Tensor, blocks: Iterable[slice], room: Tensor
    ) -> tuple[Tensor, Tensor]:
        """By hand, for a chunk of tokens: each one's value, and its scale.

        The gradient by its logits is in its row of the first of `buffers`, to be multiplied by that scale. `room` is that of a block, twice.
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

        def form() -> Tensor:
            out = of_clean if self.remembered is None else torch.empty_like(logits)
            write(self.clean[rows], out)
            return out

        clean = self._clean(rows, form)
        write(hidden, logits)
        values, scales = [], []
        for block in blocks:
            z, z_clean = logits[block], clean[block]
            p, difference = (one[: len(z)] for one in room)
            if self.remembered is None:
                difference = z_clean
            slope = write.slope(z)
            most_clean = z_clean.amax(-1, keepdim=True)
            of_p = torch.sub(z_clean, most_clean, out=p).exp_().sum(-1, keepdim=True)
            # Σ p (z_clean - z), which is several times as fast so as by `vecdot` or a product of matrices.
            apart = torch.sub(z_clean, z, out=difference).mul_(p).sum(-1, keepdim=True)
            most, of_q = _exp_(z)
            values.append(apart / of_p - (most_clean - most) - (of_p / of_q).log())
            # (q - p) Σq: what is left to divide by is a number a row, and no pass over all columns.
            z.addcmul_(p, of_q / of_p, value=-1)
            scales.append(1 / of_q)
            if slope is not None:
                z.mul_(slope)
        return torch.cat(values)[:, 0], torch.cat(scales)[:, 0]

    def of_logits(self, logits: Tensor, rows: slice, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            log_p = self._clean(rows, lambda: logits_of(self.clean[rows])).log_softmax(-1)
        return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)

    def _clean(self, rows: slice, form: Callable[[], Tensor]) -> Tensor:
        return form() if self.remembered is None else self.remembered.logits(rows, form)


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
        values, scales = [], []
        for block in blocks:
            z, label = logits[block], labels[block]
            slope, of_label = write.slope(z), z.gather(-1, label)
            most, of_q = _exp_(z)
            values.append(of_q.log() + most - of_label)
            z.scatter_add_(-1, label, -of_q)
            scales.append(1 / of_q)
            if slope is not None:
                z.mul_(slope)
        return torch.cat(values)[:, 0], torch.cat(scales)[:, 0]

    def of_logits(self, logits: Tensor, rows: slice, logits_of: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG002
        return -logits.log_softmax(-1).gather(-1, self.labels[rows, None])[:, 0]


def _exp_(logits: Float[Tensor, "rows d_vocab"]) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """In place e^(logits - the highest): that, and the sum of what is there then."""
    most = logits.amax(-1, keepdim=True)
    return most, logits.sub_(most).exp_().sum(-1, keepdim=True)
