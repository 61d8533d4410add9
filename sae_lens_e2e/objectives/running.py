"""What an objective remembers from one forward pass to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class RunningMeans:
    """Exponential running means, by name, on the device of what they are means of; a checkpoint holds them."""

    values: dict[str, Float[Tensor, ""]] = field(default_factory=dict)

    def update(self, name: str, value: Float[Tensor, ""], decay: float) -> Float[Tensor, ""]:
        """`decay` times the mean so far and the rest of `value`, which is the first mean there is; detached."""
        import torch

        before = self.values.get(name)
        now = value.detach()
        self.values[name] = now if before is None else torch.lerp(now, before.to(now), decay)
        return self.values[name]
