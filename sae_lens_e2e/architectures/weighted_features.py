"""Features times the norms of their decoder's rows, for a penalty on them that goes over those that are active."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from sae_lens_e2e.architectures.active_features import ActiveFeatures
from sae_lens_e2e.architectures.csr import places


class WeightedFeatures(Tensor):
    """`features * weights`, of which only those that fire are formed where their L1 norm is all that is asked for.

    A penalty's norm and its gradient are each a pass over all features of all tokens otherwise, and each step of it another tensor of that
    size: 188 MB for 46,080 features of 1,024 tokens. Asked for anything else it is the product that it stands for.
    """

    _features: Float[Tensor, "tokens d_sae"]
    _weights: Float[Tensor, " d_sae"]
    _active: ActiveFeatures

    @staticmethod
    def __new__(
        cls, features: Float[Tensor, "tokens d_sae"], weights: Float[Tensor, " d_sae"], active: ActiveFeatures
    ) -> "WeightedFeatures":
        """`active` are those of `features` that are on."""
        # Its own numbers are never looked at: whatever is asked goes through `__torch_function__`.
        self = features.detach().as_subclass(cls)
        self._features, self._weights, self._active = features, weights, active
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.norm and len(args) == 1 and kwargs == {"p": 1, "dim": -1, "keepdim": False, "dtype": None}:
            active = args[0]._active
            return _L1.apply(active.values, args[0]._weights, active.csr)
        args, kwargs = pytree.tree_map_only(cls, lambda one: one._features * one._weights, (args, kwargs))
        return func(*args, **kwargs)


class _L1(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Float[Tensor, " n_active"], weights: Float[Tensor, " d_sae"], csr: Tensor
    ) -> Float[Tensor, " tokens"]:
        """`values` are those of `csr`."""
        ctx.csr = csr
        ctx.save_for_backward(weights)
        rows, columns = places(csr)
        terms = (values * weights[columns]).abs_()
        return terms.new_zeros(len(csr)).index_add_(0, rows, terms)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (weights,) = grads, ctx.saved_tensors
        rows, columns = places(ctx.csr)
        values, own = ctx.csr.values(), weights[columns]
        signed = grad[rows] * (values * own).sgn()
        return signed * own, torch.zeros_like(weights).index_add_(0, columns, signed * values), None
