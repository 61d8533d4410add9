"""Features times the norms of their decoder's rows, for a penalty on them that goes over those that are active."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree


class WeightedFeatures(Tensor):
    """`features * weights`, of which only those that fire are formed where their L1 norm is all that is asked for.

    A penalty's norm and its gradient are each a pass over all features of all tokens otherwise, and each step of it another tensor of that
    size: 188 MB for 46,080 features of 1,024 tokens. Asked for anything else it is the product that it stands for.
    """

    _features: Float[Tensor, "tokens d_sae"]
    _weights: Float[Tensor, " d_sae"]
    _active: Tensor

    @staticmethod
    def __new__(
        cls, features: Float[Tensor, "tokens d_sae"], weights: Float[Tensor, " d_sae"], active: Tensor
    ) -> "WeightedFeatures":
        """`active` is `features` as CSR."""
        # Its own numbers are never looked at: whatever is asked goes through `__torch_function__`.
        self = features.detach().as_subclass(cls)
        self._features, self._weights, self._active = features, weights, active
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.norm and len(args) == 1 and kwargs == {"p": 1, "dim": -1, "keepdim": False, "dtype": None}:
            return _L1.apply(args[0]._features, args[0]._weights, args[0]._active)
        args, kwargs = pytree.tree_map_only(cls, lambda one: one._features * one._weights, (args, kwargs))
        return func(*args, **kwargs)


class _L1(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Float[Tensor, "tokens d_sae"], weights: Float[Tensor, " d_sae"], active: Tensor
    ) -> Float[Tensor, " tokens"]:
        ctx.active = active
        ctx.save_for_backward(weights)
        rows, columns = _places(active)
        terms = (active.values() * weights.detach()[columns]).abs_()
        return terms.new_zeros(len(features)).index_add_(0, rows, terms)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (weights,) = grads, ctx.saved_tensors
        rows, columns = _places(ctx.active)
        values, own = ctx.active.values(), weights[columns]
        signed = grad[rows] * (values * own).sgn()
        of_features = torch.zeros(ctx.active.shape, dtype=grad.dtype)
        of_features.view(-1)[rows * len(weights) + columns] = signed * own
        return of_features, torch.zeros_like(weights).index_add_(0, columns, signed * values), None


def _places(active: Tensor) -> tuple[Tensor, Tensor]:
    """The token and the feature of each entry of a CSR matrix."""
    return torch.repeat_interleave(torch.arange(len(active)), active.crow_indices().diff()), active.col_indices()
