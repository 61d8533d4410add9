"""TransformerLens' LayerNorm in one kernel, where it writes it out as eight and nobody looks in between."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sae_lens_e2e.splice.hooked_transformer import is_hooked_transformer

SHOWN = ("hook_scale", "hook_normalized")


@contextmanager
def fused_layer_norm(model: nn.Module) -> Iterator[None]:
    """Compute LayerNorm with PyTorch's kernel, equal but for rounding, until the block is left.

    Whether its scale or what it scales is hooked is asked at each call. Where it rounds in between, in half precision, it is
    left as it is, and so is RMSNorm, for which PyTorch has no kernel on a CPU. Models other than a `HookedTransformer` bring their own.
    """
    # Within itself it has nothing left to do.
    norms = [norm for norm in _layer_norms(model) if not is_in(norm)]
    for norm in norms:
        norm.forward = MethodType(_forward, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def is_in(norm: nn.Module) -> bool:
    """Whether it is in force."""
    return "forward" in vars(norm)


def _layer_norms(model: nn.Module) -> list[nn.Module]:
    if not is_hooked_transformer(model):
        return []
    # Whoever has such a model has these.
    from transformer_lens.components.layer_norm import LayerNorm
    from transformer_lens.components.layer_norm_pre import LayerNormPre

    return [module for module in model.modules() if type(module) in (LayerNorm, LayerNormPre)]


def _forward(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != norm.cfg.dtype or x.dtype.itemsize < 4 or any(getattr(norm, hook).has_hooks() for hook in SHOWN):
        return type(norm).forward(norm, x)
    return F.layer_norm(x, x.shape[-1:], getattr(norm, "w", None), getattr(norm, "b", None), norm.eps)
