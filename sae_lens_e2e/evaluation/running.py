"""Running an SAE for what it does, whatever its architecture and whether or not it is in training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_e2e.splice import Site, Where, frozen

_SCALED_BEFOREHAND = ("expected_average_only_in", "covariance_whitening")


def check_evaluable(name: str, sae: SAE[Any]) -> None:
    """Raise ValueError, naming the SAE, if it is not a map from one hook's activations to their reconstruction."""
    normalize = sae.cfg.normalize_activations
    if isinstance(sae, Transcoder):
        raise ValueError(
            f"{name}: a {sae.cfg.architecture()} reads one hook and writes another, so there is no reconstruction to evaluate; "
            "give an SAE of one hook"
        )
    for field, weights in sae.named_parameters():
        if not weights.is_floating_point():
            raise ValueError(
                f"{name}: its {field} holds {str(weights.dtype).removeprefix('torch.')}, not real floating numbers; convert it"
            )
    if normalize in _SCALED_BEFOREHAND:
        raise ValueError(
            f"{name}: normalize_activations={normalize!r} says that the activations it takes are scaled first, and by how much "
            "is not in the SAE; fold that into its weights (SAELens does at the end of training), or set it to 'none'"
        )


@contextmanager
def inference(sae: SAE[Any]) -> Iterator[None]:
    """The SAE in evaluation mode, taking heads side by side; put back as it was on exit."""
    reshapes = sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        with frozen(sae):
            yield
    finally:
        if reshapes:
            sae.turn_on_forward_pass_hook_z_reshaping()


def reconstruct(
    sae: SAE[Any], x: Float[Tensor, "batch pos d_in"]
) -> tuple[Float[Tensor, "batch pos d_sae"], Float[Tensor, "batch pos d_in"]]:
    """An SAE's features, and its output on the device of `x`, in the SAE's dtype."""
    x_in = x.to(sae.device)
    features = sae.encode(x_in)
    # Its `decode` leaves out what its attention predicts from earlier tokens, and warns of it.
    x_hat = sae(x_in) if isinstance(sae, TemporalSAE) else sae.decode(features)
    return features, x_hat.to(x.device)


class SplicedSAE:
    """An SAE as a spliced pass takes it: it reads whole prompts, some looking back, and its output goes where tokens count.

    The pass is to be given `Where.everywhere`.
    """

    features: Float[Tensor, "batch pos d_sae"]
    """Of the last pass, at all tokens."""
    x_hat: Float[Tensor, "batch pos d_in"]

    def __init__(self, sae: SAE[Any], site: Site, where: Where):
        self.sae, self.site, self.where = sae, site, where

    def __call__(self, x: Float[Tensor, "tokens d_in"]) -> Mapping[str, Float[Tensor, "tokens d_in"]]:
        """What is put at the site for what was read there."""
        prompts = x.unflatten(0, self.where.mask.shape)
        self.features, self.x_hat = reconstruct(self.sae, prompts)
        put_in = self.where.put(prompts, self.where.take(self.x_hat).to(x.dtype))
        return {self.site.read: put_in.flatten(0, 1)}


def in_prompts(site: Site, activation: Float[Tensor, "batch pos *d_act"]) -> Float[Tensor, "batch pos d_in"]:
    """What a module at a site takes of an activation, at every token."""
    return site.take(activation.flatten(0, 1)).unflatten(0, activation.shape[:2])
