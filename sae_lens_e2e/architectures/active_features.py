"""The features that fire, where these are few: which they are, and their activations as one short differentiable tensor."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_e2e.architectures.csr import csr_with, times, times_transposed


@dataclass(frozen=True)
class Encoding:
    """How pre-activations came about: `x @ weights + bias`."""

    x: Float[Tensor, "tokens d_in"]
    weights: Float[Tensor, "d_in d_sae"]
    centre: Float[Tensor, " d_in"] | None
    """What was subtracted of `x`, if that alone of the two has a gradient."""
    bias: Float[Tensor, " d_sae"]


@dataclass(frozen=True)
class ActiveFeatures:
    """Features of some tokens, those that are on."""

    csr: Float[Tensor, "tokens d_sae"]
    """Which they are, and their activations, without gradient."""
    values: Float[Tensor, " n_active"]
    """Their activations, in the order of `csr`. The gradients of all that is made of them add up here, in a few numbers. Where it is known how they
    came about, what is trained gets its own of these; elsewhere one tensor of all features is formed: there are 188 MB of these for 46,080
    features of 1,024 tokens."""

    @classmethod
    def of(
        cls, source: Float[Tensor, "tokens d_sae"] | Encoding, csr: Float[Tensor, "tokens d_sae"]
    ) -> "ActiveFeatures":
        """Of `csr`, whose gradient goes to `source`: the features themselves, what a ReLU makes them of, or how that came about.

        No entry that is off gets any.
        """
        if isinstance(source, Encoding):
            x, centre = (source.x, None) if source.centre is None else (source.x.detach(), source.centre)
            values: Any = _EncodedValues.apply(x, source.weights, source.bias, centre, csr)
        else:
            values = _Values.apply(source, csr)
        return cls(csr, values)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Float[Tensor, "tokens d_sae"], csr: Tensor) -> Float[Tensor, " n_active"]:  # noqa: ARG004
        ctx.csr = csr
        return csr.values().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _with_values(ctx.csr, grads[0]).to_dense(), None


class _EncodedValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens d_in"],
        weights: Float[Tensor, "d_in d_sae"],
        bias: Float[Tensor, " d_sae"],  # noqa: ARG004
        centre: Float[Tensor, " d_in"] | None,  # noqa: ARG004
        csr: Tensor,
    ) -> Float[Tensor, " n_active"]:
        """`x` is less `centre` already."""
        ctx.csr = csr
        ctx.save_for_backward(x, weights)
        return csr.values().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (x, weights) = grads, ctx.saved_tensors
        wants_x, wants_weights, _, wants_centre, _ = ctx.needs_input_grad
        of_features = _with_values(ctx.csr, grad)
        of_bias = grad.new_zeros(weights.shape[1]).index_add_(0, ctx.csr.col_indices(), grad)
        return (
            times(of_features, weights.T) if wants_x else None,
            times_transposed(x, of_features) if wants_weights else None,
            of_bias,
            -(weights @ of_bias) if wants_centre else None,
            None,
        )


def _with_values(csr: Tensor, values: Tensor) -> Tensor:
    return csr_with(csr.crow_indices(), csr.col_indices(), values, csr.shape)
