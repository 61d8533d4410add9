"""The features that fire, where these are few: which they are, and their activations as one short differentiable tensor."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_e2e.architectures.csr import with_values
from sae_lens_e2e.architectures.encoding import Encoding


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
        values: Any = source.values_of(csr) if isinstance(source, Encoding) else _Values.apply(source, csr)
        return cls(csr, values)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Float[Tensor, "tokens d_sae"], csr: Tensor) -> Float[Tensor, " n_active"]:  # noqa: ARG004
        ctx.csr = csr
        return csr.values().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return with_values(ctx.csr, grads[0]).to_dense(), None
