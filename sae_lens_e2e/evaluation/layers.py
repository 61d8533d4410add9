"""How far one layer's activations move when an SAE is spliced in."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_e2e.evaluation.result import LayerEvaluation
from sae_lens_e2e.evaluation.sums import TokenSums, TotalVariance, at_least_float32

# As in SAELens: a shorter activation counts as it is, rather than as a ratio to nothing.
SHORTEST = 1e-4


class Layer:
    """One batch of the clean model's activations in one place, as all SAEs are compared with them."""

    def __init__(self, activation: Float[Tensor, "tokens d"]):
        self.activation = at_least_float32(activation)
        self.normalised = layer_norm(self.activation)


class LayerVariance:
    """How much the clean activations in one place vary, plain and after layer norm."""

    def __init__(self) -> None:
        self.plain, self.normalised = TotalVariance(), TotalVariance()

    def add(self, clean: Layer) -> None:
        self.plain.add(clean.activation)
        self.normalised.add(clean.normalised)


class LayerSums:
    """What one SAE does to the activations in one place, summed over batches."""

    def __init__(self, variance: LayerVariance) -> None:
        self.variance = variance
        self.tokens = TokenSums()
        self.d = 0

    def add(
        self,
        clean: Layer,
        changed: Float[Tensor, "tokens d"],
        first: Int[Tensor, "n_first"],
        later: Int[Tensor, "n_later"],
    ) -> None:
        """Add one batch; `first` and `later` are the rows of the tokens at position 0 of their prompt, and of the others."""
        changed = at_least_float32(changed)
        self.d = changed.shape[-1]
        ratio, cosine = l2_ratio(changed, clean.activation), F.cosine_similarity(changed, clean.activation, dim=-1)
        self.tokens.add(
            {
                "squared_error": (changed - clean.activation).square().sum(-1),
                "squared_error_ln": (layer_norm(changed) - clean.normalised).square().sum(-1),
                "l2_ratio": ratio,
                "l2_ratio_first": ratio[first],
                "l2_ratio_later": ratio[later],
                "cosine": cosine,
                "cosine_first": cosine[first],
                "cosine_later": cosine[later],
            }
        )

    def evaluation(self) -> LayerEvaluation:
        """The figures over all tokens added, of which there is at least one."""
        sums, variance = self.tokens, self.variance
        return LayerEvaluation(
            mse=sums.mean("squared_error") / self.d,
            explained_variance=variance.plain.explained(sums.total("squared_error")),
            mse_ln=sums.mean("squared_error_ln") / self.d,
            explained_variance_ln=variance.normalised.explained(sums.total("squared_error_ln")),
            l2_ratio=sums.mean("l2_ratio"),
            l2_ratio_first=sums.mean_if_any("l2_ratio_first"),
            l2_ratio_later=sums.mean_if_any("l2_ratio_later"),
            cosine=sums.mean("cosine"),
            cosine_first=sums.mean_if_any("cosine_first"),
            cosine_later=sums.mean_if_any("cosine_later"),
        )


def layer_norm(x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
    """Each token's activation with mean 0 and variance 1 over its dimensions, without weights; as in Apollo's library."""
    return F.layer_norm(x, x.shape[-1:])


def l2_ratio(changed: Float[Tensor, "tokens d"], clean: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens"]:
    """‖changed‖ / ‖clean‖ of each token, as SAELens defines it and Braun et al. (2024), table 5, report it."""
    norm = clean.norm(dim=-1)
    return changed.norm(dim=-1) / torch.where(norm < SHORTEST, 1.0, norm)
