"""Go on training an SAE that somebody has trained."""

import copy
import dataclasses
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from torch import Tensor

from sae_lens_e2e.architectures.apollo import ARCHITECTURE as APOLLO

GOES_ON_AS: dict[str, tuple[str, ...]] = {
    "standard": ("standard", APOLLO),
    "topk": ("topk",),
    "abstopk": ("abstopk",),
    "jumprelu": ("jumprelu", "batchtopk", "matryoshka_batchtopk"),
    "gated": ("gated",),
    "matching_pursuit": ("matching_pursuit",),
    "transcoder": ("transcoder",),
    "skip_transcoder": ("skip_transcoder",),
    "jumprelu_transcoder": ("jumprelu_transcoder", "batchtopk_transcoder"),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", "batchtopk_skip_transcoder"),
}
"""By the architecture of an inference SAE, the training architectures that are saved as it. A new one is a line here."""

# Those with one threshold for all features, which is found in training and saved as each feature's own.
_ONE_THRESHOLD = ("batchtopk", "matryoshka_batchtopk", "batchtopk_transcoder", "batchtopk_skip_transcoder")
# How a new SAE starts, which one that has its weights does not.
_INITIAL = ("decoder_init_norm", "jumprelu_init_threshold")


def training_sae_from(sae: SAE[Any], architecture: str | None = None, **settings: Any) -> TrainingSAE[Any]:
    """The training SAE that is saved as what an inference SAE is: weights, biases, thresholds and scales carried over.

    Give it to a runner as `override_sae=`, with its `cfg` as the runner config's `sae`, to finetune with any objective.

    Args:
        sae (SAE): An SAE of an architecture in `GOES_ON_AS`, Apollo's among them.
        architecture (str | None): That of the training SAE; by default `trained_as(sae)`. 'apollo' is for a `standard` SAE with a normalised decoder and no b_dec in its input, to go on as Apollo's library would; 'batchtopk' and 'matryoshka_batchtopk' for a `jumprelu` SAE with one threshold for all features, which then pick the k largest of a batch.
        settings (Any): What the training config has and the inference config has not, such as `l1_coefficient` or `k`; by default what its metadata record of its training, but for warm-ups, else SAELens' own defaults.

    Raises ValueError, naming it, for an architecture or a setting that cannot be honoured.
    """
    _check_can_be_trained(sae)
    architecture = architecture or trained_as(sae)
    _check_saved_as(sae, architecture)
    training_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    carried = _carried_over(sae, config_class)
    free = free_settings(sae, architecture)
    for name, value in settings.items():
        if name in carried:
            raise ValueError(
                f"{name}={value!r}: the SAE has {name}={carried[name]!r} already, and keeps it; leave it out"
            )
        if name in _INITIAL:
            raise ValueError(f"{name}={value!r} is how a new SAE starts, and this one has its weights; leave it out")
        if name not in free:
            raise ValueError(f"{name}={value!r} is no setting of {architecture!r}; it has {', '.join(sorted(free))}")
    settings = {**_recorded(sae, architecture), **settings}
    if architecture in _ONE_THRESHOLD:
        _check_one_threshold(sae, architecture, settings)
        # Where the decoder's rows are of unit length this changes nothing yet, and keeps their lengths from mattering later.
        settings = {"rescale_acts_by_decoder_norm": has_unit_rows(sae), **settings}
    training_sae = training_class(config_class(**carried, **settings, decoder_init_norm=None))
    training_sae.load_state_dict(_weights(sae, architecture))
    return training_sae


def trained_as(sae: SAE[Any]) -> str:
    """The training architecture that an inference SAE goes on as, unless another is asked for.

    That is the one in its metadata, if what it is saved as is what the SAE is; else 'batchtopk' for a `jumprelu` SAE whose thresholds
    are all the same, or else the one of the same name. Raises ValueError for an architecture that cannot be trained.
    """
    check_can_go_on(sae.cfg.architecture(), type(sae).__name__)
    known = GOES_ON_AS[sae.cfg.architecture()]
    if (recorded := sae.cfg.metadata.training_architecture) in known:
        return recorded
    of_one_threshold = [architecture for architecture in known if architecture in _ONE_THRESHOLD]
    return of_one_threshold[0] if of_one_threshold and _one_threshold(sae) is not None else known[0]


def free_settings(sae: SAE[Any], architecture: str) -> set[str]:
    """The names of what is to be chosen when an SAE goes on as a training architecture: what its own config does not say."""
    names = {f.name for f in dataclasses.fields(SAE_TRAINING_CLASS_REGISTRY[architecture][1])}
    return names - {f.name for f in dataclasses.fields(sae.cfg)} - set(_INITIAL)


def has_unit_rows(sae: SAE[Any]) -> bool:
    """Whether every row of the decoder is of length 1."""
    norms = sae.W_dec.float().norm(dim=1)
    return torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


def check_can_go_on(architecture: Any, name: str = "") -> None:
    """Raise ValueError for the architecture of an inference SAE that cannot be trained."""
    if architecture not in GOES_ON_AS:
        of = f" ({name})" if name else ""
        raise ValueError(f"architecture {architecture!r}{of} cannot be finetuned; {', '.join(GOES_ON_AS)} can")


def _check_can_be_trained(sae: SAE[Any]) -> None:
    architecture, normalization = sae.cfg.architecture(), sae.cfg.normalize_activations
    if isinstance(sae, TrainingSAE):
        raise ValueError(f"sae is a {type(sae).__name__}, a training SAE already; give it to the runner as it is")
    check_can_go_on(architecture, type(sae).__name__)
    if normalization in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"normalize_activations={normalization!r}: what it scales by is not in the SAE; fold it in first, with "
            "sae.fold_activation_norm_scaling_factor(...) or sae.fold_activation_whitening(...)"
        )


def _weights(sae: SAE[Any], architecture: str) -> dict[str, Tensor]:
    weights = sae.state_dict()
    if architecture in _ONE_THRESHOLD:
        threshold = weights.pop("threshold")
        weights["topk_threshold"] = threshold.double().mean().clamp(min=0)
    elif "threshold" in weights:
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


def _recorded(sae: SAE[Any], architecture: str) -> dict[str, Any]:
    """The settings of its training in an SAE's metadata, if it was trained as `architecture`."""
    metadata = sae.cfg.metadata
    details = metadata.training_architecture_details
    if metadata.training_architecture != architecture or not isinstance(details, dict):
        return {}
    free = free_settings(sae, architecture)
    return {name: value for name, value in details.items() if name in free and not name.endswith("_warm_up_steps")}


def _check_saved_as(sae: SAE[Any], architecture: str) -> None:
    others = [other for other in GOES_ON_AS[sae.cfg.architecture()] if other != sae.cfg.architecture()]
    if architecture not in (sae.cfg.architecture(), *others):
        raise ValueError(
            f"architecture={architecture!r} does not compute what {sae.cfg.architecture()!r} does; leave it out"
            + (f", or use {' or '.join(map(repr, others))}" if others else "")
        )
    if architecture == APOLLO and (sae.cfg.apply_b_dec_to_input or not has_unit_rows(sae)):
        raise ValueError(
            "architecture='apollo' needs an SAE whose decoder has unit rows and whose b_dec is not subtracted from the input; "
            "leave it out"
        )


def _one_threshold(sae: Any) -> float | None:
    """The threshold of a `jumprelu` SAE, if all features have the same and it is above 0."""
    low, high = map(float, sae.threshold.detach().aminmax())
    return high if high > 0 and high - low <= 1e-3 * high else None


def _check_one_threshold(sae: SAE[Any], architecture: str, settings: dict[str, Any]) -> None:
    if _one_threshold(sae) is None:
        raise ValueError(
            f"architecture={architecture!r} has one threshold for all features, and this SAE's differ; use 'jumprelu'"
        )
    needed = ("k", "matryoshka_widths") if architecture.startswith("matryoshka") else ("k",)
    if missing := [name for name in needed if name not in settings]:
        raise ValueError(
            f"{architecture!r} needs {' and '.join(missing)}, which the SAE's metadata do not say; give it"
        )
