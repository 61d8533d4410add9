"""How many features fire, how much, and how often each."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_e2e.evaluation.result import FiringHistogram
from sae_lens_e2e.evaluation.sums import TokenSums
from sae_lens_e2e.splice import Where

# From one token in a hundred million to every token, four bins a decade; the same for all SAEs, so that they compare.
LOG10_EDGES = tuple(edge / 4 for edge in range(-32, 1))


class FeatureSums:
    """Feature activations summed over batches; a feature fires where it is not 0, as in SAELens' `run_evals`.

    A feature is alive if it fired at least once within the first `alive_tokens` tokens.
    """

    def __init__(self, d_sae: int, alive_tokens: int, device: torch.device):
        self.alive_tokens = alive_tokens
        self.tokens = TokenSums()
        self.n_tokens = 0
        self.firing = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.alive = torch.zeros(d_sae, dtype=torch.bool, device=device)

    def add(self, features: Float[Tensor, "batch pos d_sae"], where: Where) -> None:
        """Add one batch, of which the tokens in `where` count."""
        features = features.to_dense() if features.is_sparse else features
        fired = where.take(features != 0)
        l1 = torch.linalg.vector_norm(features, 1, dim=-1, dtype=torch.promote_types(features.dtype, torch.float32))
        self.tokens.add({"l0": fired.sum(-1, dtype=torch.int32), "l1": where.take(l1)})
        self.firing += fired.sum(0, dtype=torch.int32)
        if self.n_tokens < self.alive_tokens:
            self.alive |= fired[: self.alive_tokens - self.n_tokens].any(0)
        self.n_tokens += where.n

    @property
    def n_tokens_alive(self) -> int:
        """On how many tokens it was decided which features are alive."""
        return min(self.n_tokens, self.alive_tokens)

    @property
    def frequency(self) -> Float[Tensor, "d_sae"]:
        """The fraction of all tokens added on which each feature fired."""
        return self.firing.cpu().double() / self.n_tokens


def firing_histogram(frequency: Float[Tensor, "d_sae"]) -> FiringHistogram:
    """The histogram of log10 of firing frequencies (a fraction of tokens), features that never fired apart."""
    fired = frequency[frequency > 0].log10().clamp(min=LOG10_EDGES[0])
    counts, _ = torch.histogram(fired, torch.tensor(LOG10_EDGES, dtype=torch.float64))
    return FiringHistogram(LOG10_EDGES, tuple(int(count) for count in counts), int((frequency == 0).sum()))
