"""Running an SAE for what it does, whatever its architecture and whether or not it is in training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.temporal_sae import TemporalSAE
from torch import Tensor

from sae_lens_e2e.architectures.transcoder import is_transcoder
from sae_lens_e2e.splice import Site, Where, frozen

_SCALED_BEFOREHAND = ("expected_average_only_in", "covariance_whitening")


def check_evaluable(name: str, sae: SAE[Any]) -> None:
    """Raise ValueError, naming the SAE, if it does not make of one hook's activations what stands for them, or for another's, of finite
    real numbers."""
    normalize = sae.cfg.normalize_activations
    for field, weights in sae.named_parameters():
        if not weights.is_floating_point():
            raise ValueError(
                f"{name}: its {field} holds {str(weights.dtype).removeprefix('torch.')}, not real floating numbers; convert it"
            )
    for field, values in sae.state_dict().items():
        # A threshold that nothing passes is one.
        if bool(values.isnan().any()) or (not field.endswith("threshold") and bool(values.isinf().any())):
            raise ValueError(f"{name}: its {field} holds numbers that are not finite; take an earlier checkpoint")
    if normalize in _SCALED_BEFOREHAND:
        raise ValueError(
            f"{name}: normalize_activations={normalize!r} says that the activations it takes are scaled first, and by how much "
            "is not in the SAE; fold that into its weights (SAELens does at the end of training), or set it to 'none'"
        )


def check_reconstructs(name: str, sae: SAE[Any]) -> None:
    """`check_evaluable`, and raise ValueError for a transcoder too, which has no reconstruction of what it reads."""
    check_evaluable(name, sae)
    if is_transcoder(sae.cfg):
        raise ValueError(
            f"{name}: a {sae.cfg.architecture()} reads one hook and writes another, so there is no reconstruction to look at; "
            "give an SAE of one hook"
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
) -> tuple[Float[Tensor, "batch pos d_sae"], Float[Tensor, "batch pos d_out"]]:
    """An SAE's features, and its output on the device of `x`, in the SAE's dtype."""
    x_in = x.to(sae.device)
    if is_transcoder(sae.cfg):
        # Its `decode` leaves out what goes past the features; SAELens adds it in the activations' dtype.
        transcode: Any = sae.forward_with_activations
        out, features = transcode(x_in.to(sae.dtype))
        return features, out.to(x.device)
    features = sae.encode(x_in)
    # Its `decode` leaves out what its attention predicts from earlier tokens, and warns of it.
    x_hat = sae(x_in) if isinstance(sae, TemporalSAE) else sae.decode(features)
    return features, x_hat.to(x.device)


class SplicedSAE:
    """An SAE as a spliced pass takes it: it reads whole prompts, some looking back, and its output goes where tokens count.

    The pass is to be given `reading=Where.everywhere(tokens)`.
    """

    features: Float[Tensor, "batch pos d_sae"]
    """Of the last pass, at all tokens."""
    out: Float[Tensor, "tokens d_out"]
    """Its output at the tokens that count."""

    def __init__(self, sae: SAE[Any], site: Site, where: Where):
        self.sae, self.site, self.where = sae, site, where

    def __call__(self, x: Float[Tensor, "all_tokens d_in"]) -> Mapping[str, Float[Tensor, "tokens d_out"]]:
        """What is put where the SAE writes for what was read."""
        self.features, out = reconstruct(self.sae, x.unflatten(0, self.where.mask.shape))
        self.out = self.where.take(out)
        return dict.fromkeys(self.site.writes, self.out)


def in_prompts(site: Site, activation: Float[Tensor, "batch pos *d_act"]) -> Float[Tensor, "batch pos d_in"]:
    """What a module at a site takes of an activation, at every token."""
    return site.take(activation.flatten(0, 1)).unflatten(0, activation.shape[:2])
