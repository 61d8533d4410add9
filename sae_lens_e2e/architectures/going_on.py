"""Go on training an SAE that somebody has trained."""

import copy
import dataclasses
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from torch import Tensor

from sae_lens_e2e.architectures.apollo import ARCHITECTURE as APOLLO

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
# How a new SAE starts, which one that has its weights does not.
_INITIAL = ("decoder_init_norm", "jumprelu_init_threshold")


def training_sae_from(sae: SAE[Any], architecture: str | None = None, **settings: Any) -> TrainingSAE[Any]:
    """The training SAE that computes what an inference SAE computes: weights, biases, thresholds and scales carried over.

    Give it to a runner as `override_sae=`, with its `cfg` as the runner config's `sae`, to finetune with any objective.

    Args:
        sae (SAE): An SAE of SAELens' `standard`, `topk`, `jumprelu` or `gated` architecture, Apollo's among them.
        architecture (str | None): That of the training SAE: by default the one of the same name; 'apollo' for a `standard` SAE with a normalised decoder and no b_dec in its input, to go on as Apollo's library would.
        settings (Any): What the training config has and the inference config has not, such as `l1_coefficient`.

    Raises ValueError, naming it, for an architecture or a setting that cannot be honoured.
    """
    _check_can_be_trained(sae)
    known: str = sae.cfg.architecture()
    architecture = architecture or known
    if architecture != known:
        _check_fits_apollo(sae, architecture)
    training_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    carried = _carried_over(sae, config_class)
    free = {f.name for f in dataclasses.fields(config_class)} - carried.keys() - set(_INITIAL)
    for name, value in settings.items():
        if name in carried:
            raise ValueError(
                f"{name}={value!r}: the SAE has {name}={carried[name]!r} already, and keeps it; leave it out"
            )
        if name in _INITIAL:
            raise ValueError(f"{name}={value!r} is how a new SAE starts, and this one has its weights; leave it out")
        if name not in free:
            raise ValueError(f"{name}={value!r} is no setting of {architecture!r}; it has {', '.join(sorted(free))}")
    training_sae = training_class(config_class(**carried, **settings, decoder_init_norm=None))
    training_sae.load_state_dict(_weights(sae))
    return training_sae


def _check_can_be_trained(sae: SAE[Any]) -> None:
    architecture, normalization = sae.cfg.architecture(), sae.cfg.normalize_activations
    if isinstance(sae, TrainingSAE):
        raise ValueError(f"sae is a {type(sae).__name__}, a training SAE already; give it to the runner as it is")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r} ({type(sae).__name__}) cannot be finetuned; {', '.join(ARCHITECTURES)} can"
        )
    if normalization in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"normalize_activations={normalization!r}: what it scales by is not in the SAE; fold it in first, with "
            "sae.fold_activation_norm_scaling_factor(...) or sae.fold_activation_whitening(...)"
        )


def _weights(sae: SAE[Any]) -> dict[str, Tensor]:
    weights = sae.state_dict()
    if "threshold" in weights:
        # The inference SAE's ReLU makes a negative threshold act as 0; the training SAE has no ReLU.
        weights["threshold"] = weights["threshold"].clamp(min=0)
    return weights


def _carried_over(sae: SAE[Any], config_class: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(config_class)}
    carried = {f.name: copy.deepcopy(getattr(sae.cfg, f.name)) for f in dataclasses.fields(sae.cfg) if f.name in names}
    metadata = carried["metadata"]
    # The SAE on Neuronpedia is the one that training starts from, not the one that comes out of it.
    metadata.finetuned_from = metadata.neuronpedia_id or sae.get_name()
    metadata.neuronpedia_id = None
    return carried


def _check_fits_apollo(sae: SAE[Any], architecture: str) -> None:
    if architecture != APOLLO or sae.cfg.architecture() != "standard":
        raise ValueError(
            f"architecture={architecture!r} does not compute what {sae.cfg.architecture()!r} does; leave it out"
            + (f", or use {APOLLO!r}" if sae.cfg.architecture() == "standard" else "")
        )
    norms = sae.W_dec.float().norm(dim=1)
    if sae.cfg.apply_b_dec_to_input or not torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
        raise ValueError(
            "architecture='apollo' needs an SAE whose decoder has unit rows and whose b_dec is not subtracted from the input; "
            "leave it out"
        )
