"""From the last hidden state to next-token figures, without ever holding all logits.

The logits of a language model are its widest tensor: 50,257 columns where the residual stream has 768. What is computed of
them here is computed a chunk of tokens at a time, and the gradient with respect to the hidden state is formed within the
forward pass, so that nothing as wide as the vocabulary outlives its chunk.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_e2e.splice.divergence import CE, KL, Divergence, Remembered
from sae_lens_e2e.splice.positions import NO_LABEL

# How many tokens at a time: so many that the unembedding's own weights, which each chunk's products read again, are read seldom, and
# where the vocabulary is small as many as fill a CPU's cache. A GPU wants few and large launches.
CHUNK_ROWS = {"narrow": 64, "wide": 256}
WIDE = 256
CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 1 * 2**30}
MAX_CHUNK_BYTES = 256 * 2**20
N_BUFFERS = 2
"""Of chunk x d_vocab: the spliced model's logits and the clean model's; and as many of a block."""
BLOCK_BYTES = 2 * 2**20
"""On a CPU what is made of logits one by one is made of this much at a time, which a core's own cache holds; elsewhere a block is a chunk."""


class Unembedding(ABC):
    """What turns the last hidden state of a language model into next-token figures.

    `kl` and `cross_entropy` are differentiable in `hidden` and in nothing else. Softmax and sums are in float32 or better,
    whatever the dtype of the weights and under autocast too.
    """

    d_vocab: int
    """How many next tokens the model tells apart."""
    width: int | None = None
    """Of the hidden states that weights are multiplied with, if that is what it does."""

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "tokens d_final"]) -> Float[Tensor, "tokens d_vocab"]:
        """The model's logits, soft cap included, in float32 or better. All at once: for those who look at few."""

    @abstractmethod
    def _summed(self, hidden: Tensor, divergence: Divergence, weights: Tensor) -> Tensor:
        """Σ_t weights[t] · divergence_t, its gradient formed along the way."""

    def kl(
        self,
        hidden: Float[Tensor, "tokens d_final"],
        clean: Float[Tensor, "tokens d_final"] | Remembered,
        weights: Float[Tensor, "tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """KL(clean ‖ hidden) of the next-token distributions, in nats: mean over tokens, or summed with `weights`.

        Braun et al. (2024), section 2, the end-to-end loss.
        """
        return self._summed(hidden, KL(clean), uniform(hidden) if weights is None else weights)

    def cross_entropy(
        self,
        hidden: Float[Tensor, "tokens d_final"],
        labels: Int[Tensor, "tokens"],
        weights: Float[Tensor, "tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """-log p(label), in nats: mean over the tokens that have a label (not -100), or summed with `weights`."""
        labels = labels.to(hidden.device)
        known = labels != NO_LABEL
        if weights is None:
            weights = known.to(_figures_dtype(hidden)) / known.sum().clamp(min=1)
        return self._summed(hidden, CE(labels.clamp(min=0)), torch.where(known, weights, 0))

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of tokens whose logits fit the work buffers."""
        size = chunk_size(self.width, self.d_vocab, _figures_dtype(hidden), hidden.device)
        return (slice(start, start + size) for start in range(0, len(hidden), size))


class LinearUnembedding(Unembedding):
    """logits = hidden @ weight + bias, with an optional soft cap (Gemma): cap · tanh(logits / cap)."""

    def __init__(
        self,
        weight: Float[Tensor, "d_model d_vocab"],
        bias: Float[Tensor, "d_vocab"] | None = None,
        soft_cap: float | None = None,
        chunk_bytes: int | None = None,
    ):
        self.weight = weight
        # A bias of zeros is what many models have where they have none.
        self.bias = bias if bias is not None and bool(bias.any()) else None
        self.soft_cap = soft_cap if soft_cap and soft_cap > 0 and math.isfinite(soft_cap) else None
        self.width, self.d_vocab = weight.shape
        self.chunk_bytes = chunk_bytes
        self._kept: Tensor | None = None

    def buffers(self, n_rows: int, dtype: torch.dtype) -> Float[Tensor, "rows d_vocab"]:
        """Room for rows of logits. On a CPU it is kept, as fresh pages cost as much as what is written to them."""
        kept = self._kept
        if kept is None or len(kept) < n_rows or kept.dtype != dtype or kept.device != self.weight.device:
            # Written to in whatever mode comes next.
            with torch.inference_mode(False):
                kept = torch.empty((n_rows, self.d_vocab), dtype=dtype, device=self.weight.device)
        if kept.device.type == "cpu":
            self._kept = kept
        return kept[:n_rows]

    def logits(self, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_vocab"]:
        """See `Unembedding.logits`."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        logits = (hidden.to(self.weight.dtype) @ self.weight).to(dtype)
        if self.bias is not None:
            logits = logits + self.bias.to(dtype)
        return soft_capped(logits, self.soft_cap)

    def _summed(self, hidden: Tensor, divergence: Divergence, weights: Tensor) -> Tensor:
        loss: Any = _Linear.apply(_without_grad_if_disabled(hidden), self, divergence, weights)
        return loss


class ModuleUnembedding(Unembedding):
    """Any other, as a function from hidden states to logits, applied to a chunk of tokens at a time."""

    def __init__(self, function: Callable[[Tensor], Tensor], d_vocab: int):
        self.function = function
        self.d_vocab = d_vocab

    def logits(self, hidden: Float[Tensor, "tokens d_final"]) -> Float[Tensor, "tokens d_vocab"]:
        """See `Unembedding.logits`."""
        logits = self.function(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _summed(self, hidden: Tensor, divergence: Divergence, weights: Tensor) -> Tensor:
        loss: Any = _Chunked.apply(_without_grad_if_disabled(hidden), self, divergence, weights)
        return loss


def linear_kl(
    spliced: Float[Tensor, "tokens d_model"],
    clean: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "d_model d_vocab"],
    bias: Float[Tensor, "d_vocab"] | None = None,
    soft_cap: float | None = None,
    token_weights: Float[Tensor, "tokens"] | None = None,
    chunk_bytes: int | None = None,
) -> Float[Tensor, ""]:
    """KL(softmax(clean @ weight + bias) ‖ softmax(spliced @ weight + bias)) in nats, from hidden states.

    `LinearUnembedding.kl` as a function. Peak memory is two buffers of chunk x d_vocab, together `chunk_bytes`, and two of a block.
    """
    return LinearUnembedding(weight, bias, soft_cap, chunk_bytes).kl(spliced, clean, token_weights)


def soft_capped(logits: Tensor, cap: float | None, out: Tensor | None = None) -> Tensor:
    """cap · tanh(logits / cap); written to `out`, which may be `logits`, if that is given."""
    if cap is None:
        return logits
    return torch.mul(torch.tanh(torch.div(logits, cap, out=out), out=out), cap, out=out)


def uniform(hidden: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens"]:
    """The weights that make a sum over tokens their mean."""
    return hidden.new_full((len(hidden),), 1 / max(len(hidden), 1), dtype=_figures_dtype(hidden))


def _figures_dtype(hidden: Tensor) -> torch.dtype:
    """That of weights and sums: float32 or better."""
    return torch.promote_types(hidden.dtype, torch.float32)


def chunk_size(
    width: int | None, d_vocab: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None = None
) -> int:
    """How many tokens' logits are worked out at a time, at least one: what fits `chunk_bytes`, if they are given.

    `width` is that of the weights, or None where nothing but the logits is read for a chunk.
    """
    row_bytes = N_BUFFERS * d_vocab * dtype.itemsize
    if chunk_bytes is not None:
        return max(chunk_bytes // row_bytes, 1)
    if device.type != "cpu":
        return max(CHUNK_BYTES["cuda"] // (2 * row_bytes), 1)
    few = 1 if width is None else CHUNK_ROWS["wide" if width >= WIDE else "narrow"]
    return max(min(few, MAX_CHUNK_BYTES // row_bytes), CHUNK_BYTES["cpu"] // row_bytes, 1)


def _without_grad_if_disabled(hidden: Tensor) -> Tensor:
    """Under no_grad a function still sees a leaf as needing its gradient, and would work it out for nobody."""
    return hidden if torch.is_grad_enabled() else hidden.detach()


class _Write:
    """Writes chunks of logits, in the accumulation dtype, into buffers that the caller allocated once."""

    def __init__(self, unembedding: LinearUnembedding, chunk: int, dtype: torch.dtype):
        self.weight, self.soft_cap = unembedding.weight, unembedding.soft_cap
        self.bias = None if unembedding.bias is None else unembedding.bias.to(dtype)
        # torch.mm(out=) wants one dtype throughout, so low-precision logits pass through a buffer of their own.
        narrow = self.weight.dtype != dtype
        self.narrow = self.weight.new_empty((chunk, unembedding.d_vocab)) if narrow else None

    def __call__(self, hidden: Tensor, out: Tensor) -> None:
        target = out if self.narrow is None else self.narrow[: len(hidden)]
        torch.mm(hidden.to(self.weight.dtype), self.weight, out=target)
        if target is not out:
            out.copy_(target)
        if self.bias is not None:
            out.add_(self.bias)
        soft_capped(out, self.soft_cap, out=out)

    def slope(self, logits: Tensor) -> Tensor | None:
        """d capped / d logits of capped ones, if they are: d tanh(z) = 1 - tanh(z)²."""
        return None if self.soft_cap is None else (logits / self.soft_cap).square_().neg_().add_(1)

    def backward(self, grad_logits: Tensor, weights: Tensor, out: Tensor) -> None:
        torch.mul(grad_logits.to(self.weight.dtype) @ self.weight.T, weights[:, None], out=out)


def _block_size(chunk: int, d_vocab: int, device: torch.device) -> int:
    """How many rows of a chunk are worked on at once: on a CPU as many as the caches of its cores hold."""
    if device.type != "cpu":
        return chunk
    return min(max(BLOCK_BYTES // (3 * d_vocab * 4), 1) * torch.get_num_threads(), chunk)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: LinearUnembedding, divergence: Divergence, weights: Tensor
    ) -> Tensor:
        weight = unembedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        n_tokens, d_vocab = len(hidden), unembedding.d_vocab
        fitting = chunk_size(len(weight), d_vocab, dtype, weight.device, unembedding.chunk_bytes)
        chunk = min(fitting, max(n_tokens, 1))
        block = _block_size(chunk, d_vocab, weight.device)
        kept = unembedding.buffers(N_BUFFERS * (chunk + block), dtype)
        buffers = kept[: N_BUFFERS * chunk].view(N_BUFFERS, chunk, d_vocab)
        room = kept[N_BUFFERS * chunk :].view(N_BUFFERS, block, d_vocab)
        weights = weights.to(dtype)
        grad = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            write = _Write(unembedding, chunk, dtype)
            for start in range(0, n_tokens, chunk):
                rows = slice(start, min(start + chunk, n_tokens))
                w = weights[rows]
                blocks = [slice(first, min(first + block, len(w))) for first in range(0, len(w), block)]
                part = buffers[:, : len(w)]
                value, scale = divergence.of_rows(write, hidden[rows], rows, part, blocks, room)
                total += w @ value
                if grad is not None:
                    write.backward(part[0], w * scale, out=grad[rows])
        ctx.save_for_backward(None if grad is None else grad.to(hidden.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: ModuleUnembedding, divergence: Divergence, weights: Tensor
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))

        def logits_of(chunk: Tensor) -> Tensor:
            return unembedding.function(chunk).to(total.dtype)

        for rows in unembedding.chunks(hidden):
            with torch.set_grad_enabled(needs_grad):
                student = hidden[rows].detach().requires_grad_(needs_grad)
                value = weights[rows].to(total.dtype) @ divergence.of_logits(logits_of(student), rows, logits_of)
            total += value.detach()
            if grad is not None:
                grad[rows] = torch.autograd.grad(value, student)[0]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None
