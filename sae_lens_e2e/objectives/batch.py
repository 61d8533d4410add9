"""What an objective is given to compare: one spliced pass of one micro-batch, and the clean pass beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sae_lens_e2e.objectives.running import RunningMeans

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_lens_e2e.splice import Remembered, Unembedding, Where


@dataclass(frozen=True)
class Part:
    """One SAE in a pass, at the tokens that are trained on."""

    x: Float[Tensor, "tokens d_in"]
    """What it was given: what the SAEs before it have left of the activation."""
    features: Float[Tensor, "tokens d_sae"]
    target: Mapping[str, Float[Tensor, "tokens d_out"]]
    """By hook it writes, what its output stands for: an SAE's own input, and a transcoder's clean activation there."""
    output: Mapping[str, Float[Tensor, "tokens d_out"]]
    """By hook it writes, what it put there."""
    mse_loss: Float[Tensor, ""]
    """SAELens' reconstruction loss: ‖output - target‖² summed over d_in, mean over tokens, as the architecture scales it."""
    own_losses: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """The architecture's other losses (sparsity, auxiliary), coefficients included; the trainer adds them, not the objective."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch without the SAEs (clean) and with them (spliced), at the tokens that are trained on.

    `clean` and `spliced` hold the activations at the objective's own hooks. `kl` and `cross_entropy` are worked out when they
    are called.
    """

    prompts: Int[Tensor, "batch pos"]
    where: Where
    """Which of the prompts' tokens are trained on; all else here has those only, in order."""
    parts: Mapping[str, Part]
    """By name, the SAEs that are spliced in."""
    clean: Mapping[str, Float[Tensor, "tokens *d_act"]] = field(default_factory=dict)
    spliced: Mapping[str, Float[Tensor, "tokens *d_act"]] = field(default_factory=dict)
    clean_final: Float[Tensor, "tokens d_final"] | None = None
    spliced_final: Float[Tensor, "tokens d_final"] | None = None
    unembedding: Unembedding | None = None
    fraction: float = 0.0
    """Of the training done, from 0 to 1."""
    label_rate: float | None = None
    """The fraction of the whole step's trained tokens that have a next token; None where this batch is all there is."""
    means: RunningMeans = field(default_factory=RunningMeans)
    """What `running_mean` has seen in earlier forward passes."""
    remembered: Remembered | None = None
    """The clean distributions, where several passes are compared with them."""

    @property
    def tokens(self) -> Int[Tensor, "tokens"]:
        """The token at each trained position."""
        return self.where.take(self.prompts)

    @property
    def labels(self) -> Int[Tensor, "tokens"]:
        """The token that follows each; -100 where its prompt ends."""
        return self.where.labels(self.prompts)

    @property
    def place(self) -> Int[Tensor, "tokens 2"]:
        """(prompt, position) of each."""
        return self.where.place(self.prompts.device)

    @property
    def mse_loss(self) -> Float[Tensor, ""]:
        """SAELens' reconstruction loss, summed over the SAEs."""
        first, *others = (part.mse_loss for part in self.parts.values())
        return sum((loss.to(first.device) for loss in others), first)

    def kl(self, token_weights: Float[Tensor, "tokens"] | None = None) -> Float[Tensor, ""]:
        """KL(clean ‖ spliced) of the next-token distributions in nats: mean over tokens, or summed with `token_weights`.

        Raises ValueError for an objective with `compares_logits = False`.
        """
        unembedding, spliced, clean = self._finals()
        return unembedding.kl(spliced, self.remembered or clean, token_weights)

    def cross_entropy(self, token_weights: Float[Tensor, "tokens"] | None = None) -> Float[Tensor, ""]:
        """-log p(next token) of the spliced model in nats: mean over tokens that have one, or summed with `token_weights`.

        The mean is such that micro-batches, each weighed by its trained tokens, add up to that of the step. Raises ValueError
        for an objective with `compares_logits = False`.
        """
        import torch

        unembedding, spliced, _ = self._finals()
        if token_weights is None and self.label_rate:
            # Of a micro-batch with few tokens this may be less than one.
            n_labels = self.where.n * self.label_rate
            dtype = torch.promote_types(spliced.dtype, torch.float32)
            token_weights = spliced.new_full((self.where.n,), 1 / n_labels, dtype=dtype)
        return unembedding.cross_entropy(spliced, self.labels, token_weights)

    def running_mean(self, name: str, value: Float[Tensor, ""], decay: float) -> Float[Tensor, ""]:
        """The mean of `value` over this pass and, each weighed `decay` times the next, those of the same SAEs before; detached.

        To be called once a pass for each name. It is on the device, and a run that goes on from a checkpoint has it as it was.
        """
        return self.means.update(f"{name}/{'+'.join(self.parts)}", value, decay)

    def _finals(self) -> tuple[Unembedding, Tensor, Tensor]:
        if self.unembedding is None or self.clean_final is None or self.spliced_final is None:
            raise ValueError(
                "this objective has compares_logits=False, so there are no logits to compare; set it to True"
            )
        return self.unembedding, self.spliced_final, self.clean_final
