"""What `evaluate` finds out about an SAE, as numbers that can be stored and compared."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

_PER_FEATURE = ("firing_frequency", "alive")


@dataclass(frozen=True, kw_only=True)
class LayerEvaluation:
    """How far the activations at one hook move when the SAE is spliced in.

    Each is over measured tokens; those ending in `_ln` compare activations after a layer norm without weights, and
    `_first` and `_later` are over position 0 of each prompt and over the other positions, None if none was measured.
    """

    mse: float
    """Mean over tokens and dimensions of (changed - clean)². SAELens' `mse` is the sum over dimensions: this times d."""
    explained_variance: float
    """1 - Σ (changed - clean)² / Σ (clean - mean)², the mean over all tokens; SAELens' `explained_variance`."""
    mse_ln: float
    explained_variance_ln: float
    l2_ratio: float
    """Mean over tokens of ‖changed‖ / ‖clean‖; SAELens' `l2_ratio`, and table 5 of Braun et al. (2024)."""
    l2_ratio_first: float | None
    l2_ratio_later: float | None
    cosine: float
    """Mean over tokens of the cosine of changed and clean; SAELens' `cossim`."""
    cosine_first: float | None
    cosine_later: float | None


@dataclass(frozen=True)
class FiringHistogram:
    """How many features fire how often: `counts[i]` of them on a fraction of tokens f with edges[i] <= log10 f < edges[i + 1].

    The last bin includes its upper edge, and the first whatever fires less often. Together with `n_never`, the features that
    never fired, the counts add up to d_sae.
    """

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]
    n_never: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an SAE does to its language model on held-out tokens, and what it is made of.

    A token is measured if the SAE replaces its activation: if it is inside `seqpos_slice` and not an excluded special token,
    both from the SAE's metadata. All others keep the model's own activation and count nowhere but in `n_tokens`. Losses
    are in nats per token. `without_sae` is the model as it is, `with_sae` with the SAE's output at the hook, and
    `with_ablation` with zeros at the hook at every position, as in SAELens.
    """

    objective: str | None
    """The name of the objective it was trained with, if its metadata say so."""
    architecture: str
    sparsity: dict[str, float]
    """The coefficients or k that set its sparsity, by the name of the config field, as far as its config has them."""
    model_name: str | None
    hook_name: str
    hook_head_index: int | None
    hook_name_out: str | None = None
    """The hook that a transcoder writes; None for an SAE, which writes what it reads."""
    context_size: int
    d_in: int
    d_sae: int

    n_tokens: int
    """Tokens the language model read."""
    n_tokens_measured: int
    n_tokens_alive: int
    """Measured tokens on which it was decided which features are alive: 500,000 of them, or all if there are fewer."""

    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_ablation: float
    kl: float
    """KL(without SAE ‖ with SAE)."""
    kl_with_ablation: float
    top1_agreement: float
    """The fraction of tokens after which the likeliest token is the same with and without the SAE."""
    top1_accuracy_without_sae: float
    """The fraction of tokens after which the likeliest token is the one that follows."""
    top1_accuracy_with_sae: float
    statistical_distance: float
    """The total variation ½ Σ |p - q| of the next-token distributions without and with the SAE, mean over tokens."""

    l0: float
    """Mean number of features that fire on a token."""
    l1: float
    """Mean over tokens of Σ |f|."""
    n_alive: int
    """Features that fired at least once on the first `n_tokens_alive` tokens."""
    firing: FiringHistogram

    layers: dict[str, LayerEvaluation]
    """By hook: first the one that is written, where the output is compared with what it stands for, then the later ones in order."""

    firing_frequency: Float[Tensor, "d_sae"] | None = field(default=None, repr=False, compare=False)
    """The fraction of measured tokens on which each feature fired; not stored, so None in an evaluation read back."""
    alive: Bool[Tensor, "d_sae"] | None = field(default=None, repr=False, compare=False)
    """Which features are alive; not stored either."""

    @property
    def ce_loss_increase(self) -> float:
        """Nats of cross-entropy that splicing in the SAE costs."""
        return self.ce_loss_with_sae - self.ce_loss_without_sae

    @property
    def ce_loss_score(self) -> float | None:
        """How much of what ablation costs the SAE recovers: 1 is all, 0 none. None if ablation costs nothing."""
        cost = self.ce_loss_with_ablation - self.ce_loss_without_sae
        return (self.ce_loss_with_ablation - self.ce_loss_with_sae) / cost if cost else None

    @property
    def fraction_alive(self) -> float:
        """`n_alive` of `d_sae`."""
        return self.n_alive / self.d_sae

    @property
    def at_hook(self) -> LayerEvaluation:
        """The output against what it stands for: an SAE's input, or the clean activation where a transcoder writes."""
        return self.layers[self._written]

    @property
    def downstream_mse(self) -> dict[str, float]:
        """The MSE at each later hook, in order."""
        return {hook: layer.mse for hook, layer in self.layers.items() if hook != self._written}

    @property
    def _written(self) -> str:
        return self.hook_name_out or self.hook_name

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures, what is derived from the others included, what is per feature left out."""
        stored = {name: value for name, value in asdict(self).items() if name not in _PER_FEATURE}
        derived = ("ce_loss_increase", "ce_loss_score", "fraction_alive", "downstream_mse")
        firing = {name: list(v) if isinstance(v, tuple) else v for name, v in stored["firing"].items()}
        return stored | {name: getattr(self, name) for name in derived} | {"firing": firing}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Evaluation":
        """The evaluation that `to_dict` was called on, before or after JSON. Raises ValueError if figures are missing."""
        # Those of before there were transcoders do not have it.
        figures = {"hook_name_out": None, **figures}
        names = [f.name for f in fields(cls) if f.name not in _PER_FEATURE]
        if missing := [name for name in names if name not in figures]:
            raise ValueError(f"not a stored evaluation: it has no {', '.join(missing)}; evaluate the SAE again")
        firing, layers = figures["firing"], figures["layers"]
        return cls(
            **{name: figures[name] for name in names if name not in ("firing", "layers")},
            firing=FiringHistogram(tuple(firing["log10_edges"]), tuple(firing["counts"]), firing["n_never"]),
            layers={hook: LayerEvaluation(**layer) for hook, layer in layers.items()},
        )
