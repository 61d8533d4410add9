"""What a feature does to the next token: log-probabilities with it, against those of the same model without its part."""

from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_e2e.evaluation.running import in_prompts
from sae_lens_e2e.splice import Clean, Site, SplicedModel, Where


@torch.no_grad()
def feature_activations(
    sae: SAE[Any], site: Site, clean: Clean, feature: int
) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos d_out"]]:
    """A feature's activation at every token of a clean pass, and what it adds to the SAE's output there.

    The SAE is to be in `inference`.
    """
    x = in_prompts(site, clean.at[site.read]).to(sae.device)
    whole = sae.decode(sae.encode(x))
    # Again, as some scale what they decode by what encoding has left, and once.
    features = sae.encode(x)
    features = features.to_dense() if features.is_sparse else features.clone()
    activation = features[..., feature].clone()
    features[..., feature] = 0
    return activation, whole - sae.decode(features)


@torch.no_grad()
def logit_effects(
    splice: SplicedModel,
    site: Site,
    clean: Clean,
    contribution: Float[Tensor, "batch pos d_out"],
    where: Where,
) -> Float[Tensor, "n d_vocab"]:
    """log p(next token) less the same with `contribution` taken from the activation, in nats, at each of the tokens in `where`.

    The contribution is taken away at those tokens, once each prompt or more; everything after it runs again, so the effect is through all later
    layers, and not the product of decoder and unembedding.
    """
    write = site.writes[0]

    def without(_read: Tensor) -> dict[str, Tensor]:
        as_is = site.take(where.take(clean.at[write]))
        changed = as_is - where.take(contribution).to(as_is)
        return dict.fromkeys(site.writes, changed)

    spliced = splice.spliced(clean, where, {site: without})
    assert clean.final is not None
    assert spliced.final is not None
    with_it, without_it = (
        splice.unembedding.logits(where.take(final)).log_softmax(-1) for final in (clean.final, spliced.final)
    )
    return with_it - without_it.to(with_it)


def at_positions(tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch"]) -> Where:
    """One token of each prompt."""
    return Where(torch.arange(tokens.shape[1]) == positions.cpu()[:, None])
