"""The terms of an objective: pure functions, tensors in and a scalar out."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-8
"""Karvonen's, which keeps quotients finite."""


def reconstruction_mse(
    spliced: Float[Tensor, "tokens *d_act"], clean: Float[Tensor, "tokens *d_act"]
) -> Float[Tensor, ""]:
    """How far an activation moved when the SAE was spliced in: mean squared error over tokens and dimensions.

    Braun et al. (2024), section 2, the downstream reconstruction at one layer. Accumulated in at least float32.
    """
    dtype = torch.promote_types(clean.dtype, torch.float32)
    return F.mse_loss(spliced.to(dtype), clean.to(dtype))


def downstream_mse(
    spliced: Mapping[str, Float[Tensor, "tokens *d_act"]], clean: Mapping[str, Float[Tensor, "tokens *d_act"]]
) -> dict[str, Float[Tensor, ""]]:
    """`reconstruction_mse` at each hook that both mappings name, by hook name."""
    return {hook: reconstruction_mse(spliced[hook], clean[hook]) for hook in clean}


def mean_over_hooks(by_hook: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """The mean of what was found at each hook, on the device of the last, which is that of the model's end."""
    losses = list(by_hook.values())
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()


def relative_mse(
    output: Mapping[str, Float[Tensor, "tokens d_out"]], target: Mapping[str, Float[Tensor, "tokens d_out"]]
) -> Float[Tensor, ""]:
    """The part of the variance of one SAE's targets, over tokens, that its output leaves: 0 is perfect, 1 is no better than their mean.

    Σ ‖output - target‖² / Σ ‖target - mean target‖², both sums over tokens, dimensions and the hooks it writes; in at least float32.
    The variance is not differentiated.
    """
    error, variance = (_total([f(output[hook], target[hook]) for hook in target]) for f in (_squared_error, _spread))
    return error / (variance + EPSILON)


def balance(loss: Float[Tensor, ""], kl: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """By what to multiply a KL divergence for it to weigh as much as another loss (Karvonen 2025): loss / (KL + 1e-8), detached."""
    return loss.detach() / (kl.detach() + EPSILON)


def _squared_error(output: Float[Tensor, "tokens d_out"], target: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    dtype = torch.promote_types(target.dtype, torch.float32)
    return (output.to(target.device, dtype) - target.to(dtype)).square().sum()


@torch.no_grad()
def _spread(_: Tensor, target: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    return (target - target.mean(0)).square().sum()


def _total(sums: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    return torch.stack([one.to(sums[0].device) for one in sums]).sum()
