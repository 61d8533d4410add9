"""What an SAE has to have folded in before it can be trained on the language model as SAELens runs it."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_lens_e2e.apollo.weights import change_by_processing, without_mean

_CENTRING = "center_writing_weights"
# What processing does to the weights of a model without changing the residual stream, once that is centred.
_WITH_CENTRING = (_CENTRING, "fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")


@torch.no_grad()
def fold_centring(sae: SAE[Any], wanted: bool | None = None) -> str | None:
    """Have an SAE of a processed model do on the unprocessed one what it did, in place; says what was done, if anything was.

    As `load_apollo_sae` does it: the encoder reads past the mean over d_model that processing takes out of the residual stream of
    a model with LayerNorm, and the metadata name the unprocessed model. By default (None) that is done where it is exact; `wanted`
    False leaves the SAE to the processed model, and True raises ValueError where it cannot be done.
    """
    metadata: Any = sae.cfg.metadata
    kwargs = dict(metadata.model_from_pretrained_kwargs or {})
    if not any(kwargs.get(name) for name in _WITH_CENTRING):
        if wanted:
            raise ValueError("fold_centring=True: the SAE's metadata name no processed model; leave it out")
        return None
    change = change_by_processing(str(metadata.model_name), str(metadata.hook_name))
    exact = change == "none" or (change == "centred" and sae.cfg.normalize_activations in ("none", "layer_norm"))
    exact &= hasattr(sae, "b_enc") or hasattr(sae, "b_gate") or change == "none"
    if not exact and wanted:
        raise ValueError(
            f"fold_centring=True: what processing changes at {metadata.hook_name} of {metadata.model_name} cannot be folded into a "
            f"{sae.cfg.architecture()!r} SAE with normalize_activations={sae.cfg.normalize_activations!r}; leave it out, and it is "
            "trained on the processed model"
        )
    if not exact or wanted is False:
        return None
    metadata.model_from_pretrained_kwargs = {name: v for name, v in kwargs.items() if name not in _WITH_CENTRING}
    if change == "none" or not kwargs.get(_CENTRING):
        return None
    metadata.centring_folded = True
    # A layer norm takes the mean out by itself.
    if sae.cfg.normalize_activations == "none":
        _read_past_mean(sae)
    return "the centring of the processed model's residual stream was folded into the encoder"


@torch.no_grad()
def fold_scale(sae: SAE[Any], activations: Iterable[Float[Tensor, "tokens d_in"]]) -> str:
    """Fold the scale of `expected_average_only_in` into an SAE, in place, estimated on activations as SAELens does it.

    That is sqrt(d_in) / E‖x‖. Says what was folded.
    """
    norms = [x.float().norm(dim=-1).mean() for x in activations]
    scale = sae.cfg.d_in**0.5 / float(torch.stack(norms).mean())
    sae.fold_activation_norm_scaling_factor(scale)
    return f"its activations' scale, which the SAE does not have, was estimated as {scale:.4g} and folded in"


def _read_past_mean(sae: Any) -> None:
    """Take the mean over d_in out of what the encoder reads; b_dec, where it is subtracted first, counts as before."""
    mean = sae.W_enc.mean(0)
    shift = mean * (sae.b_dec.sum() if sae.cfg.apply_b_dec_to_input else 0)
    if sae.cfg.architecture() == "gated":
        sae.b_gate.sub_(shift)
        sae.b_mag.sub_(shift * sae.r_mag.exp())
    else:
        sae.b_enc.sub_(shift)
    sae.W_enc.data = without_mean(sae.W_enc.data)
