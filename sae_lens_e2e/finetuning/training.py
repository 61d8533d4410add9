"""How an SAE of each architecture goes on: which settings it takes, and what keeps its L0."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_e2e.architectures.going_on import free_settings, trained_as, training_sae_from
from sae_lens_e2e.finetuning.holding import hold_l0
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.multi_runner import E2EMultiTrainingRunner
from sae_lens_e2e.training.runner import E2ETrainingRunner

Thresholds = Literal["move", "stay"]

_BY_CONSTRUCTION = {"topk", "abstopk"}
# Which refuse an auxiliary loss on activations that are normalised in the forward pass, as soon as one feature is dead.
_NORMALISED = ("layer_norm", "constant_norm_rescale")
# Of the median threshold, the width within which a pre-activation tells a threshold where to go.
_BANDWIDTH = 0.5


class _AtTheEnd:
    """Runs something between training and saving."""

    at_the_end: Callable[[], None]

    def save_outputs(self, group: Group) -> None:
        """Finish the SAEs, then save them."""
        self.at_the_end()
        super().save_outputs(group)  # pyright: ignore[reportAttributeAccessIssue]


class FinetuningRunner(_AtTheEnd, E2ETrainingRunner):
    """A run of one SAE with something to be done before it is saved."""


class JointFinetuningRunner(_AtTheEnd, E2EMultiTrainingRunner):
    """A run of several SAEs with something to be done before they are saved."""


AnyRunner = FinetuningRunner | JointFinetuningRunner


def training_sae(
    sae: SAE[Any],
    architecture: str | None,
    thresholds: Thresholds,
    settings: Mapping[str, Any],
    l0: float,
) -> TrainingSAE[Any]:
    """The training SAE that a finetune starts with: what is asked for, what the metadata record, or else what `l0`, its L0, gives.

    Raises ValueError for what cannot be honoured.
    """
    architecture = architecture or trained_as(sae)
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return training_sae_from(sae, architecture)
    if thresholds not in ("move", "stay"):
        raise ValueError(f"thresholds={thresholds!r} must be 'move' or 'stay'")
    if thresholds == "stay" and architecture != "jumprelu":
        raise ValueError(f"thresholds='stay' is for 'jumprelu', and this SAE goes on as {architecture!r}; leave it out")
    recorded = sae.cfg.metadata.training_architecture_details
    known = settings.keys() | (recorded if isinstance(recorded, dict) else {}).keys()
    chosen: dict[str, Any] = {}
    if "k" in free_settings(sae, architecture) and "k" not in known:
        chosen["k"] = l0
    if architecture == "jumprelu":
        median = float(sae.state_dict()["threshold"].float().median())
        if "jumprelu_bandwidth" not in known and median > 0:
            chosen["jumprelu_bandwidth"] = _BANDWIDTH * median
        if thresholds == "stay":
            # The penalty then has only the encoder to act on.
            chosen["jumprelu_ste_to_input"] = True
    made = training_sae_from(sae, architecture, **{**chosen, **settings})
    if architecture == "jumprelu" and thresholds == "stay":
        made.threshold.requires_grad_(False)  # pyright: ignore[reportCallIssue]
    return made


def coefficient_name(sae: TrainingSAE[Any]) -> str | None:
    """The config field of an SAE's sparsity coefficient, if it has a sparsity penalty."""
    names = [f"{name}_coefficient" for name in sae.get_coefficients()]
    return next((name for name in names if hasattr(sae.cfg, name)), None)


def has_thresholds(sae: TrainingSAE[Any]) -> bool:
    """Whether it is saved with thresholds that may be moved at the end until its L0 is what it is to be."""
    threshold = getattr(sae, "threshold", None)
    return hasattr(sae, "topk_threshold") or (threshold is not None and threshold.requires_grad)


def refuses_dead_features(sae: TrainingSAE[Any]) -> bool:
    """Whether its auxiliary loss stops the run when a feature is dead."""
    return hasattr(sae.cfg, "aux_loss_coefficient") and sae.cfg.normalize_activations in _NORMALISED


def held_by(sae: TrainingSAE[Any], l0: float, hold: bool) -> str:
    """Have an SAE stay at an L0 as far as it can, if it is to; says how."""
    architecture = sae.cfg.architecture()
    if architecture in _BY_CONSTRUCTION:
        return f"held by construction, k = {sae.cfg.k}"  # pyright: ignore[reportAttributeAccessIssue]
    if not hold:
        return "not held, as asked"
    by = []
    if coefficient_name(sae) is not None:
        hold_l0(sae, l0)
        by.append("a sparsity penalty that grows with it")
    elif hasattr(sae, "topk_threshold"):
        by.append(f"the {sae.cfg.k:.4g} largest of each batch a token")  # pyright: ignore[reportAttributeAccessIssue]
    if has_thresholds(sae):
        by.append("thresholds scaled at the end")
    return f"held at {l0:.4g} by {' and '.join(by)}" if by else f"not held: {architecture!r} has nothing to hold it by"
