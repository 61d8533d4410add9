"""The terms of an objective: pure functions, tensors in and a scalar out."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
