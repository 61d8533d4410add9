"""KL divergence between two next-token distributions, without ever holding their logits.

The logits of a language model are its widest tensor: 50,257 columns where the residual stream has 768. Both heads here work
through the tokens a chunk at a time, and form the gradient with respect to the spliced residual stream within the forward
pass, so that nothing as wide as the vocabulary outlives its chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

# The four chunk x d_vocab work buffers together. On a CPU they should stay in its last-level cache, and below the size
# from which malloc maps (and the kernel zeroes) fresh pages for each allocation; a GPU wants few and large launches.
CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 1 * 2**30}
N_BUFFERS = 4


class Head(Protocol):
    """What turns the last hidden state of a language model into logits, so far as a KL divergence needs it."""

    def kl(
        self,
        spliced: Float[Tensor, "tokens d_final"],
        clean: Float[Tensor, "tokens d_final"],
        token_weights: Float[Tensor, "tokens"],
    ) -> Float[Tensor, ""]:
        """Σ_t token_weights[t] · KL(clean_t ‖ spliced_t), in nats; differentiable in `spliced` only."""
        ...


@dataclass(frozen=True)
class LinearHead:
    """An unembedding: logits = h @ weight + bias, with an optional soft cap (Gemma), cap · tanh(logits / cap)."""

    weight: Float[Tensor, "d_model d_vocab"]
    bias: Float[Tensor, "d_vocab"] | None = None
    soft_cap: float | None = None

    def kl(
        self,
        spliced: Float[Tensor, "tokens d_model"],
        clean: Float[Tensor, "tokens d_model"],
        token_weights: Float[Tensor, "tokens"],
    ) -> Float[Tensor, ""]:
        """See `Head.kl`."""
        return linear_kl(spliced, clean, self.weight, self.bias, self.soft_cap, token_weights)


@dataclass(frozen=True)
class LogitsHead:
    """Any other head, as a function from hidden states to logits, applied to a chunk of tokens at a time."""

    logits: Callable[[Float[Tensor, "tokens d_final"]], Float[Tensor, "tokens d_vocab"]]
    d_vocab: int

    def kl(
        self,
        spliced: Float[Tensor, "tokens d_final"],
        clean: Float[Tensor, "tokens d_final"],
        token_weights: Float[Tensor, "tokens"],
    ) -> Float[Tensor, ""]:
        """See `Head.kl`."""
        loss: Tensor = _ChunkedKL.apply(  # pyright: ignore[reportAssignmentType]
            _without_grad_if_disabled(spliced), clean, token_weights, self
        )
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

    Braun et al. (2024), section 2, the end-to-end loss. Mean over tokens, or the sum weighted by `token_weights`. Peak memory is four buffers of
    chunk x d_vocab, together `chunk_bytes`. Gradients reach `spliced` and nothing else: its gradient,
    token_weights · (softmax(spliced) - softmax(clean)) @ weightᵀ, is formed in the forward pass. Softmax and sums are in
    float32 or better, whatever the dtype of the weights and under autocast too.
    """
    if token_weights is None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        token_weights = spliced.new_full((len(spliced),), 1 / max(len(spliced), 1), dtype=dtype)
    loss: Tensor = _LinearKL.apply(  # pyright: ignore[reportAssignmentType]
        _without_grad_if_disabled(spliced), clean, weight, bias, soft_cap, token_weights, chunk_bytes
    )
    return loss


def chunk_size(d_vocab: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None = None) -> int:
    """How many tokens' logits fit the work buffers' budget in bytes; at least one."""
    budget = chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(budget // (N_BUFFERS * d_vocab * dtype.itemsize), 1)


def _log_sum_exp(logits: Tensor, probabilities: Tensor) -> Tensor:
    """log Σ exp(logits) per row, from logits and their softmax: at the largest, logit - log p, exact and cheap."""
    return logits.amax(-1) - probabilities.amax(-1).log()


def _without_grad_if_disabled(spliced: Tensor) -> Tensor:
    """Under no_grad a function still sees a leaf as needing its gradient, and would work it out for nobody."""
    return spliced if torch.is_grad_enabled() else spliced.detach()


class _Logits:
    """Writes chunks of logits, in the accumulation dtype, into buffers that the caller allocated once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, soft_cap: float | None, chunk: int, dtype: torch.dtype):
        self.weight, self.soft_cap = weight, soft_cap
        self.bias = None if bias is None else bias.to(dtype)
        # torch.mm(out=) wants one dtype throughout, so low-precision logits pass through a buffer of their own.
        narrow = weight.dtype != dtype
        self.narrow = weight.new_empty((chunk, weight.shape[1])) if narrow else None

    def write(self, hidden: Tensor, out: Tensor) -> None:
        target = out if self.narrow is None else self.narrow[: len(hidden)]
        torch.mm(hidden.to(self.weight.dtype), self.weight, out=target)
        if target is not out:
            out.copy_(target)
        if self.bias is not None:
            out.add_(self.bias)
        if self.soft_cap is not None:
            out.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def backward(self, grad_logits: Tensor, logits_after_cap: Tensor | None, out: Tensor) -> None:
        if self.soft_cap is not None and logits_after_cap is not None:
            # d tanh(z) = 1 - tanh(z)²
            slope = logits_after_cap.div_(self.soft_cap).square_().neg_().add_(1)
            grad_logits.mul_(slope)
        out.copy_(grad_logits.to(self.weight.dtype) @ self.weight.T)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spliced: Tensor,
        clean: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        soft_cap: float | None,
        token_weights: Tensor,
        chunk_bytes: int | None,
    ) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        n_tokens, d_vocab = len(spliced), weight.shape[1]
        chunk = min(chunk_size(d_vocab, dtype, weight.device, chunk_bytes), max(n_tokens, 1))
        difference, p_spliced, z_clean, p_clean = weight.new_empty((N_BUFFERS, chunk, d_vocab), dtype=dtype)
        token_weights = token_weights.to(dtype)
        grad = torch.empty_like(spliced, dtype=dtype) if ctx.needs_input_grad[0] else None
        kl = spliced.new_zeros((), dtype=dtype)
        with torch.autocast(spliced.device.type, enabled=False):
            logits = _Logits(weight, bias, soft_cap, chunk, dtype)
            for start in range(0, n_tokens, chunk):
                rows = slice(start, min(start + chunk, n_tokens))
                n = rows.stop - rows.start
                d, q, z, p, w = difference[:n], p_spliced[:n], z_clean[:n], p_clean[:n], token_weights[rows]
                logits.write(spliced[rows], out=d)
                torch.softmax(d, -1, out=q)
                lse_spliced = _log_sum_exp(d, q)
                logits.write(clean[rows], out=z)
                torch.softmax(z, -1, out=p)
                lse_clean = _log_sum_exp(z, p)
                # KL = Σ p (log p - log q), with log p = z - lse
                d.sub_(z)
                kl += w @ (lse_spliced - lse_clean - torch.linalg.vecdot(p, d))
                if grad is not None:
                    q.sub_(p).mul_(w[:, None])
                    capped = None if soft_cap is None else d.add_(z)
                    logits.backward(q, capped, out=grad[rows])
        ctx.save_for_backward(None if grad is None else grad.to(spliced.dtype))
        return kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_outputs[0].to(grad.dtype), *([None] * 6))


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spliced: Tensor, clean: Tensor, token_weights: Tensor, head: LogitsHead) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        chunk = chunk_size(head.d_vocab, torch.float32, spliced.device)
        grad = torch.empty_like(spliced) if needs_grad else None
        kl = spliced.new_zeros((), dtype=torch.promote_types(spliced.dtype, torch.float32))
        for start in range(0, len(spliced), chunk):
            rows = slice(start, start + chunk)
            with torch.no_grad():
                log_p = head.logits(clean[rows]).to(kl.dtype).log_softmax(-1)
            with torch.set_grad_enabled(needs_grad):
                student = spliced[rows].detach().requires_grad_(needs_grad)
                log_q = head.logits(student).to(kl.dtype).log_softmax(-1)
                kl_chunk = token_weights[rows].to(kl.dtype) @ (log_p.exp() * (log_p - log_q)).sum(-1)
            kl += kl_chunk.detach()
            if grad is not None:
                grad[rows] = torch.autograd.grad(kl_chunk, student)[0]
        ctx.save_for_backward(grad)
        return kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None
