"""Where each feature of a dictionary fires most, found in one pass over any amount of data."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_e2e.splice import Where


class TopPlaces:
    """For every feature the `n` prompts in which it is most active, and the token at which it is; nothing else of a pass is kept.

    Activation counts by its size, as some architectures have negative ones.
    """

    def __init__(self, d_sae: int, n: int, device: torch.device):
        self.n = n
        self.size: Float[Tensor, "n d_sae"] = torch.zeros(n, d_sae, device=device)
        self.prompt: Int[Tensor, "n d_sae"] = torch.zeros(n, d_sae, dtype=torch.int64, device=device)
        self.position: Int[Tensor, "n d_sae"] = torch.zeros(n, d_sae, dtype=torch.int64, device=device)
        self._n_prompts = 0

    def add(self, features: Float[Tensor, "batch pos d_sae"], where: Where) -> None:
        """Add the next prompts, of whose tokens those in `where` count."""
        counts = where.mask.to(features.device)
        best = [(one.abs() * counted[:, None]).max(0) for one, counted in zip(features, counts, strict=True)]
        size = torch.stack([one.values for one in best]).to(self.size)
        prompts = self._n_prompts + torch.arange(len(size), device=size.device)
        self._n_prompts += len(size)
        sizes = torch.cat([self.size, size])
        self.size, order = sizes.topk(self.n, dim=0)
        positions = torch.cat([self.position, torch.stack([one.indices for one in best])])
        self.prompt = torch.cat([self.prompt, prompts[:, None].expand_as(size)]).gather(0, order)
        self.position = positions.gather(0, order)

    def of(self, feature: int) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
        """The prompts, by their number, and the positions at which a feature is most active; fewer than `n` if it fires in fewer."""
        fires = self.size[:, feature] > 0
        return self.prompt[fires, feature].cpu(), self.position[fires, feature].cpu()
