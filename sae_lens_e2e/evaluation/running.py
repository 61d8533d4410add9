"""Running an SAE for what it does, whatever its architecture and whether or not it is in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_e2e.splice import frozen

_SCALED_BEFOREHAND = ("expected_average_only_in", "covariance_whitening")


def check_evaluable(name: str, sae: SAE[Any]) -> None:
    """Raise ValueError, naming the SAE, if it is not a map from one hook's activations to their reconstruction."""
    normalize = sae.cfg.normalize_activations
    if isinstance(sae, Transcoder):
        raise ValueError(
            f"{name}: a {sae.cfg.architecture()} reads one hook and writes another, so there is no reconstruction to evaluate; "
            "give an SAE of one hook"
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
