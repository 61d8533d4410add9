"""How the tokens of one optimizer step are worked through."""

from dataclasses import dataclass, field

import torch

from sae_lens_e2e.splice import Positions


@dataclass(frozen=True)
class StepPlan:
    """What all SAEs that share a clean pass have in common of a step."""

    prompts_per_forward: int
    positions: Positions = field(default_factory=Positions)
    max_grad_norm: float = 1.0
    autocast_lm: bool = False
    checkpoint_activations: bool = False

    def lm_autocast(self, device: torch.device) -> torch.autocast:
        """The language model's mixed precision, as SAELens' `autocast_lm` has it."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast_lm)
