"""The products of an SAE as sums over its active features, where these are few.

Of 46,080 features some 70 fire on a token. Decoding and the whole backward pass need these alone; as dense products they are four fifths of an
SAE's work. SAELens' own classes are left as they are: while one runs its training pass, the matrix products in it are taken over.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainingSAEConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from sae_lens_e2e.architectures.active_features import ActiveFeatures
from sae_lens_e2e.architectures.csr import as_csr_if_few, times, transposed
from sae_lens_e2e.architectures.encoding import EncoderProduct, Encoding, formed
from sae_lens_e2e.architectures.row_norms import is_row_norms, row_norms
from sae_lens_e2e.architectures.weighted_features import WeightedFeatures

MIN_WIDTH = 128
"""A product over active features pays where an SAE has at least so many inputs: for fewer, looking for the features that fire takes as
long as the dense products (at 64 a step took 0.19 s against 0.18)."""
MIN_FEATURES = 2048

ZERO_WHERE_OFF = frozenset(
    {
        *("standard", "apollo", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "gated"),
        *("transcoder", "skip_transcoder", "batchtopk_transcoder", "batchtopk_skip_transcoder"),
    }
)
"""Training architectures that pass no gradient on to a feature that is off. JumpReLU's thresholds get one from features just below them."""

_MATMULS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}
_PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__}
_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__}
_DIFFERENCES = {torch.sub, torch.Tensor.sub, torch.Tensor.__sub__}
_RELUS = {torch.relu, torch.nn.functional.relu, torch.Tensor.relu}


@dataclass(frozen=True)
class _Made:
    """What an operation made of something; `version` counts what was done to it in place since."""

    source: Any
    result: Tensor
    version: int

    @classmethod
    def of(cls, source: Any, result: Tensor) -> "_Made":
        return cls(source, result, result._version)

    def still_is(self, x: Tensor) -> bool:
        return x is self.result and x._version == self.version


class SparseProducts(TorchFunctionMode):
    """While it is entered, matrix products with features on one side go over those that are not zero, if they are few.

    So does a penalty on decoded features (see `WeightedFeatures`), and the norms of a wide decoder's rows have a gradient of one pass (see
    `row_norms`). Exact but for the order of sums, whatever the architecture: what is few is counted each time. On a CPU, in float32 or float64; anything
    else is left to PyTorch, and so is an SAE that is too small to gain. `zero_where_off` says that nothing asks for the gradient of a feature
    that is off (see `ZERO_WHERE_OFF`), so that it need not be formed.
    """

    def __init__(self, zero_where_off: bool):
        super().__init__()
        self.zero_where_off = zero_where_off
        # The last centre that was subtracted of what has no gradient itself, and what is left.
        self._centred: _Made | None = None
        # How the last pre-activations came about.
        self._encoded: _Made | None = None
        # What went into the last ReLU, and what came out of it.
        self._rectified: _Made | None = None
        # Those that are on of the features that were decoded last, if they are few.
        self._decoded: _Made | None = None

    @classmethod
    def of(cls, cfg: TrainingSAEConfig) -> "SparseProducts":
        """That of an SAE's training pass. Where it has fewer features than inputs, these could be taken for them, and have a gradient each."""
        return cls(cfg.architecture() in ZERO_WHERE_OFF and cfg.d_sae > cfg.d_in)

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if EncoderProduct in types:
            encoding = args[0].with_bias(args[1]) if func in _SUMS and not kwargs else None
            if encoding is not None:
                self._encoded = _Made.of(encoding, encoding.pre_activations())
                return self._encoded.result
            args, kwargs = formed((args, kwargs))
        if func in _MATMULS and not kwargs and _pays(*args):
            return self._product(*args)
        if func in _PRODUCTS and not kwargs and self._weighs_decoded(*args):
            assert self._decoded is not None
            return WeightedFeatures(args[0], args[1], self._decoded.source)
        if is_row_norms(func, args, kwargs) and len(args[0]) >= MIN_FEATURES:
            return row_norms(args[0])
        found = func(*args, **kwargs)
        if func in _DIFFERENCES and not kwargs and _is_centring(*args):
            self._centred = _Made.of(args[1], found)
        if func in _RELUS and not any(kwargs.values()):
            self._rectified = _Made.of(args[0], found)
        return found

    @override
    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        self._centred = self._encoded = self._rectified = self._decoded = None
        super().__exit__(exc_type, exc_val, exc_tb)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        # Features are on the wide side: on the left where they are decoded, on the right where they are encoded.
        if left.shape[1] <= right.shape[1]:
            centre = self._centred.source if self._centred is not None and self._centred.still_is(left) else None
            encoding = Encoding(left, right, centre)
            # An architecture that we do not know may hand it to an autograd function of its own, which asks for its graph.
            return EncoderProduct(encoding) if self.zero_where_off else encoding.pre_activations()
        csr = as_csr_if_few(left)
        if csr is None:
            return _Product.apply(left, right, None)  # pyright: ignore[reportReturnType]
        active = ActiveFeatures.of(self._source_of(left), csr)
        self._decoded = _Made.of(active, left)
        if self.zero_where_off:
            return _Decode.apply(active.values, csr, right)  # pyright: ignore[reportReturnType]
        return _Product.apply(left, right, csr)  # pyright: ignore[reportReturnType]

    def _source_of(self, features: Tensor) -> Tensor | Encoding:
        """Where the gradient of the features that are on can go at once: past a ReLU, and to what was encoded, unless somebody waits for it there."""
        rectified, encoded = self._rectified, self._encoded
        if rectified is None or not rectified.still_is(features):
            return features
        pre: Tensor = rectified.source
        watched = pre._backward_hooks or pre.retains_grad
        return encoded.source if encoded is not None and encoded.still_is(pre) and not watched else pre

    def _weighs_decoded(self, features: Any, weights: Any) -> bool:
        decoded = self._decoded
        return decoded is not None and decoded.still_is(features) and isinstance(weights, Tensor) and weights.ndim == 1


def _is_centring(x: Any, centre: Any) -> bool:
    """Whether the same is subtracted of each row of what has no gradient itself."""
    if not (isinstance(x, Tensor) and isinstance(centre, Tensor)) or x.requires_grad or x.ndim != 2:
        return False
    return centre.shape == x.shape[1:] and centre.dtype == x.dtype


def _pays(left: Tensor, right: Tensor) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor) and left.ndim == right.ndim == 2):
        return False
    return (
        left.device.type == right.device.type == "cpu"
        and left.layout == right.layout == torch.strided
        and left.dtype == right.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and max(left.shape[1], right.shape[1]) >= MIN_FEATURES
        and min(left.shape[1], right.shape[1]) >= MIN_WIDTH
    )


class _Decode(torch.autograd.Function):
    """A product over the features that are on; nobody asks for the gradient of the others."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, " n_active"],  # noqa: ARG004
        csr: Float[Tensor, "m k"],
        right: Float[Tensor, "k n"],
    ) -> Float[Tensor, "m n"]:
        """`values` are those of `csr`."""
        ctx.csr = csr
        ctx.save_for_backward(right)
        return times(csr, right)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (right,) = grads, ctx.saved_tensors
        wants_values, _, wants_right = ctx.needs_input_grad
        of_values = torch.sparse.sampled_addmm(ctx.csr, grad, right.T, beta=0.0).values() if wants_values else None
        return of_values, None, times(transposed(ctx.csr), grad) if wants_right else None


class _Product(torch.autograd.Function):
    """A product of features, whose gradient is over those that are on, if they are few."""

    @staticmethod
    def forward(
        ctx: Any, left: Float[Tensor, "m k"], right: Float[Tensor, "k n"], features: Tensor | None
    ) -> Float[Tensor, "m n"]:
        """`features` is `left` as CSR, if few of its entries are other than zero."""
        ctx.features = features
        ctx.save_for_backward(left if features is None else None, right)
        return left @ right if features is None else times(features, right)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (left, right) = grads, ctx.saved_tensors
        wants_left, wants_right, _ = ctx.needs_input_grad
        if ctx.features is not None:
            of_left = grad @ right.T if wants_left else None
            return of_left, times(transposed(ctx.features), grad) if wants_right else None, None
        return grad @ right.T if wants_left else None, left.T @ grad if wants_right else None, None
