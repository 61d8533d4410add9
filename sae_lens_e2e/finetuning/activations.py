"""What an SAE is given, on a few batches of documents."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.config import HfDataset
from torch import Tensor
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.evaluation.tokens import Setting, token_batches
from sae_lens_e2e.splice import SplicedModel


@torch.no_grad()
def activations_of(
    sae: SAE[Any], model: HookedRootModule, documents: HfDataset, batch_size_prompts: int, n_batches: int
) -> Iterator[Float[Tensor, "tokens d_in"]]:
    """The clean model's activations where an SAE sits, a batch of prompts at a time, at the tokens that count; at most `n_batches`."""
    setting = Setting.of(sae, model)
    spliced = SplicedModel(model)
    with spliced.running():
        batches = token_batches(documents, model, setting, batch_size_prompts)
        for _, tokens in zip(range(n_batches), batches, strict=False):
            where = setting.positions.of(tokens)
            if where.n:
                clean = spliced.clean(tokens.to(spliced.device), [setting.site], final=False)
                x = setting.site.take(where.take(clean.at[setting.site.read]))
                yield x.to(sae.device, torch.promote_types(x.dtype, torch.float32))
