"""An encoder's pre-activations: formed in one go, and with a gradient of those features alone that have one, where these are few."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from sae_lens_e2e.architectures.csr import as_csr_if_few, times, times_transposed, with_values


@dataclass(frozen=True)
class Encoding:
    """How pre-activations come about: `x @ weights + bias`."""

    x: Float[Tensor, "tokens d_in"]
    weights: Float[Tensor, "d_in d_sae"]
    centre: Float[Tensor, " d_in"] | None
    """What was subtracted of `x`, such as a decoder's bias, if that alone of the two has a gradient: one row of it, not one a token."""
    bias: Float[Tensor, " d_sae"] | None = None

    def pre_activations(self) -> Float[Tensor, "tokens d_sae"]:
        """All of them."""
        return _PreActivations.apply(*self._given)  # pyright: ignore[reportReturnType]

    def values_of(self, csr: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, " n_active"]:
        """Those in the places of `csr`, whose values they are; what is trained gets its gradient of these alone."""
        return _EncodedValues.apply(*self._given, csr)  # pyright: ignore[reportReturnType]

    @property
    def _given(self) -> tuple[Tensor | None, ...]:
        return self.x if self.centre is None else self.x.detach(), self.weights, self.centre, self.bias


class EncoderProduct(Tensor):
    """`x @ weights`, not formed before it is known whether a bias is added to it, which then takes no tensor of all features more.

    Asked for anything else it is the product that it stands for.
    """

    _encoding: Encoding
    _versions: tuple[int, int]
    _formed: Tensor | None

    @staticmethod
    def __new__(cls, encoding: Encoding) -> "EncoderProduct":
        # Its own numbers, which are one, are never looked at: whatever is asked goes through `__torch_function__`.
        shape = len(encoding.x), encoding.weights.shape[1]
        self = encoding.x.new_empty(()).expand(shape).as_subclass(cls)
        self._encoding, self._formed = encoding, None
        self._versions = encoding.x._version, encoding.weights._version
        return self

    def formed(self) -> Float[Tensor, "tokens d_sae"]:
        """The product. Raises RuntimeError where it would be another by now."""
        if self._formed is None:
            self._check()
            self._formed = self._encoding.pre_activations()
        return self._formed

    def with_bias(self, bias: Any) -> Encoding | None:
        """How their sum comes about, if it is that of a row for each token's, and the product is not in use.

        Raises RuntimeError as `formed` does.
        """
        weights = self._encoding.weights
        if self._formed is not None or not isinstance(bias, Tensor) or isinstance(bias, EncoderProduct):
            return None
        if bias.shape != weights.shape[1:] or bias.dtype != weights.dtype or bias.device != weights.device:
            return None
        self._check()
        return replace(self._encoding, bias=bias)

    def _check(self) -> None:
        # Its gradient would be refused by PyTorch for the same reason.
        if self._versions != (self._encoding.x._version, self._encoding.weights._version):
            raise RuntimeError("what an SAE encodes was modified by an inplace operation before its product was used")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = formed((args, kwargs or {}))
        return func(*args, **kwargs)


def formed(given: Any) -> Any:
    """Arguments of an operation with products formed that are not yet."""
    return pytree.tree_map_only(EncoderProduct, EncoderProduct.formed, given)


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens d_in"],
        weights: Float[Tensor, "d_in d_sae"],
        centre: Float[Tensor, " d_in"] | None,  # noqa: ARG004
        bias: Float[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, "tokens d_sae"]:
        """`x` is less `centre` already."""
        ctx.save_for_backward(x, weights)
        return x @ weights if bias is None else torch.addmm(bias, x, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (x, weights) = grads, ctx.saved_tensors
        wants_x, wants_weights, wants_centre, wants_bias = ctx.needs_input_grad
        summed = grad.sum(0) if wants_centre or wants_bias else None
        features = as_csr_if_few(grad)
        of_x = (grad @ weights.T if features is None else times(features, weights.T)) if wants_x else None
        of_weights = (x.T @ grad if features is None else times_transposed(x, features)) if wants_weights else None
        return of_x, of_weights, -(weights @ summed) if wants_centre else None, summed if wants_bias else None


class _EncodedValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens d_in"],
        weights: Float[Tensor, "d_in d_sae"],
        centre: Float[Tensor, " d_in"] | None,  # noqa: ARG004
        bias: Float[Tensor, " d_sae"],  # noqa: ARG004
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
        wants_x, wants_weights, wants_centre, *_ = ctx.needs_input_grad
        of_features = with_values(ctx.csr, grad)
        of_bias = grad.new_zeros(weights.shape[1]).index_add_(0, ctx.csr.col_indices(), grad)
        return (
            times(of_features, weights.T) if wants_x else None,
            times_transposed(x, of_features) if wants_weights else None,
            -(weights @ of_bias) if wants_centre else None,
            of_bias,
            None,
        )
