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

from sae_lens_e2e.splice.positions import NO_LABEL

# The four chunk x d_vocab work buffers together. On a CPU they should stay in its last-level cache, and below the size
# from which malloc maps (and the kernel zeroes) fresh pages for each allocation; a GPU wants few and large launches.
CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 1 * 2**30}
N_BUFFERS = 4


class Unembedding(ABC):
    """What turns the last hidden state of a language model into next-token figures.

    `kl` and `cross_entropy` are differentiable in `hidden` and in nothing else. Softmax and sums are in float32 or better,
    whatever the dtype of the weights and under autocast too.
    """

    d_vocab: int
    """How many next tokens the model tells apart."""

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "tokens d_final"]) -> Float[Tensor, "tokens d_vocab"]:
        """The model's logits, soft cap included, in float32 or better. All at once: for those who look at few."""

    @abstractmethod
    def _summed(self, hidden: Tensor, divergence: "_Divergence", weights: Tensor) -> Tensor:
        """Σ_t weights[t] · divergence_t, its gradient formed along the way."""

    def kl(
        self,
        hidden: Float[Tensor, "tokens d_final"],
        clean: Float[Tensor, "tokens d_final"],
        weights: Float[Tensor, "tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """KL(clean ‖ hidden) of the next-token distributions, in nats: mean over tokens, or summed with `weights`.

        Braun et al. (2024), section 2, the end-to-end loss.
        """
        return self._summed(hidden, _KL(clean), uniform(hidden) if weights is None else weights)

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
        return self._summed(hidden, _CrossEntropy(labels.clamp(min=0)), torch.where(known, weights, 0))

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of tokens whose logits fit the work buffers."""
        size = chunk_size(self.d_vocab, torch.promote_types(hidden.dtype, torch.float32), hidden.device)
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
        self.d_vocab = weight.shape[1]
        self.chunk_bytes = chunk_bytes

    def logits(self, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_vocab"]:
        """See `Unembedding.logits`."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        logits = (hidden.to(self.weight.dtype) @ self.weight).to(dtype)
        if self.bias is not None:
            logits = logits + self.bias.to(dtype)
        return soft_capped(logits, self.soft_cap)

    def _summed(self, hidden: Tensor, divergence: "_Divergence", weights: Tensor) -> Tensor:
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

    def _summed(self, hidden: Tensor, divergence: "_Divergence", weights: Tensor) -> Tensor:
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

    `LinearUnembedding.kl` as a function. Peak memory is four buffers of chunk x d_vocab, together `chunk_bytes`.
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


def chunk_size(d_vocab: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None = None) -> int:
    """How many tokens' logits fit the work buffers' budget in bytes; at least one."""
    budget = chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(budget // (N_BUFFERS * d_vocab * dtype.itemsize), 1)


class _Divergence(ABC):
    """What is made of each token's logits, against something known."""

    @abstractmethod
    def of_rows(self, write: "_Write", hidden: Tensor, rows: slice, buffers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By hand: (each row's value, its gradient by the logits, the logits), the last two in `buffers`."""

    @abstractmethod
    def of_logits(self, logits: Tensor, rows: slice, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Each row's value, to be differentiated by autograd."""


class _KL(_Divergence):
    def __init__(self, clean: Float[Tensor, "tokens d_final"]):
        self.clean = clean

    def of_rows(self, write: "_Write", hidden: Tensor, rows: slice, buffers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d, q, z, p = buffers
        write(hidden, d)
        torch.softmax(d, -1, out=q)
        lse = _log_sum_exp(d, q)
        write(self.clean[rows], z)
        torch.softmax(z, -1, out=p)
        lse_clean = _log_sum_exp(z, p)
        # KL = Σ p (log p - log q), with log p = z - lse
        d.sub_(z)
        value = lse - lse_clean - torch.linalg.vecdot(p, d)
        return value, q.sub_(p), d.add_(z) if write.soft_cap is not None else d

    def of_logits(self, logits: Tensor, rows: slice, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            log_p = logits_of(self.clean[rows]).log_softmax(-1)
        return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


class _CrossEntropy(_Divergence):
    def __init__(self, labels: Int[Tensor, "tokens"]):
        self.labels = labels

    def of_rows(self, write: "_Write", hidden: Tensor, rows: slice, buffers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, q, _, _ = buffers
        labels = self.labels[rows, None]
        write(hidden, z)
        torch.softmax(z, -1, out=q)
        value = _log_sum_exp(z, q) - z.gather(-1, labels)[:, 0]
        return value, q.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=q.dtype)), z

    def of_logits(self, logits: Tensor, rows: slice, logits_of: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG002
        return -logits.log_softmax(-1).gather(-1, self.labels[rows, None])[:, 0]


def _log_sum_exp(logits: Tensor, probabilities: Tensor) -> Tensor:
    """log Σ exp(logits) per row, from logits and their softmax: at the largest, logit - log p, exact and cheap."""
    return logits.amax(-1) - probabilities.amax(-1).log()


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

    def backward(self, grad_logits: Tensor, logits: Tensor, out: Tensor) -> None:
        if self.soft_cap is not None:
            # d tanh(z) = 1 - tanh(z)²
            slope = logits.div_(self.soft_cap).square_().neg_().add_(1)
            grad_logits.mul_(slope)
        out.copy_(grad_logits.to(self.weight.dtype) @ self.weight.T)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: LinearUnembedding, divergence: _Divergence, weights: Tensor
    ) -> Tensor:
        weight = unembedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        n_tokens, d_vocab = len(hidden), unembedding.d_vocab
        chunk = min(chunk_size(d_vocab, dtype, weight.device, unembedding.chunk_bytes), max(n_tokens, 1))
        buffers = weight.new_empty((N_BUFFERS, chunk, d_vocab), dtype=dtype)
        weights = weights.to(dtype)
        grad = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            write = _Write(unembedding, chunk, dtype)
            for start in range(0, n_tokens, chunk):
                rows = slice(start, min(start + chunk, n_tokens))
                w = weights[rows]
                value, grad_logits, logits = divergence.of_rows(write, hidden[rows], rows, buffers[:, : len(w)])
                total += w @ value
                if grad is not None:
                    write.backward(grad_logits.mul_(w[:, None]), logits, out=grad[rows])
        ctx.save_for_backward(None if grad is None else grad.to(hidden.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: ModuleUnembedding, divergence: _Divergence, weights: Tensor
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
