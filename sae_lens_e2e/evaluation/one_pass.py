"""One pass over the data: what is run for each batch of tokens, and the sums that are kept of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_e2e.evaluation.features import FeatureSums, firing_histogram
from sae_lens_e2e.evaluation.layers import Layer, LayerSums, LayerVariance
from sae_lens_e2e.evaluation.next_token import NO_TOKEN, compare_next_tokens, d_vocab
from sae_lens_e2e.evaluation.result import Evaluation
from sae_lens_e2e.evaluation.running import reconstruct
from sae_lens_e2e.evaluation.sums import TokenSums
from sae_lens_e2e.evaluation.tokens import Setting
from sae_lens_e2e.splice import CleanPass, Splice

SPARSITY_FIELDS = ("l1_coefficient", "l0_coefficient", "sparsity_coefficient", "k")


@dataclass(frozen=True)
class Measured:
    """The tokens of a batch that count, and how to take them out of what the model computes."""

    mask: Bool[Tensor, "batch pos"]
    first: Bool[Tensor, "tokens"]
    """Whether at position 0 of its prompt."""
    next_tokens: Int[Tensor, "tokens"]
    """NO_TOKEN at the last position."""

    @classmethod
    def of(cls, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> "Measured":
        next_tokens = torch.full_like(tokens, NO_TOKEN)
        next_tokens[:, :-1] = tokens[:, 1:]
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return cls(mask, position[mask] == 0, next_tokens[mask])

    def take(self, activation: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "tokens d"]:
        """The activations of the tokens that count, heads side by side."""
        return activation[self.mask.to(activation.device)].flatten(1)


def sparsity_settings(sae: SAE[Any]) -> dict[str, float]:
    """What set an SAE's sparsity, by the name of the config field: from its config, or what its metadata say of its training."""
    metadata = sae.cfg.metadata
    details = metadata.training_architecture_details or {}
    settings = {name: details.get(name, getattr(sae.cfg, name, None)) for name in SPARSITY_FIELDS}
    known = {name: float(value) for name, value in settings.items() if isinstance(value, (int, float))}
    # Apollo's, whose metadata have the run's own words.
    apollo = metadata.sparsity or {}
    return known or ({"sparsity_coefficient": apollo["coeff"]} if "coeff" in apollo else {})


class OnePass:
    """The sums of several SAEs at one hook, which share the clean and the ablated pass of every batch."""

    def __init__(self, splice: Splice, saes: Mapping[str, SAE[Any]], alive_tokens: int):
        self.splice, self.saes = splice, saes
        self.n_tokens = self.n_tokens_measured = 0
        self.variances = {hook: LayerVariance() for hook in (splice.hook_name, *splice.downstream_hooks)}
        self.clean, self.ablated = TokenSums(), TokenSums()
        self.spliced = {name: TokenSums() for name in saes}
        self.features = {name: FeatureSums(sae.cfg.d_sae, alive_tokens, sae.device) for name, sae in saes.items()}
        self.layers = {name: {hook: LayerSums(v) for hook, v in self.variances.items()} for name in saes}

    def add(self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> None:
        """Run one batch: the model as it is, and from the hook on with each SAE and with zeros."""
        self._check_vocabulary(tokens)
        self.n_tokens += tokens.numel()
        self.n_tokens_measured += int(mask.sum())
        if not bool(mask.any()):
            return
        measured = Measured.of(tokens, mask)
        clean = self.splice.clean(tokens)
        layers = self._clean_layers(clean, measured)
        changed = [self._splice_in(name, clean, layers, measured) for name in self.saes]
        zeros = torch.zeros_like(self.splice.read(clean.activation))
        ablated = self.splice.spliced(clean, self.splice.write(clean.activation, zeros))
        self._compare(clean, [*changed, measured.take(ablated.final)], measured)

    def evaluation(self, name: str, setting: Setting) -> Evaluation:
        """The figures of one SAE. Raises ValueError if no token was measured."""
        sae, spliced, features = self.saes[name], self.spliced[name], self.features[name]
        return Evaluation(
            objective=(sae.cfg.metadata.objective or {}).get("name"),
            architecture=sae.cfg.architecture(),
            sparsity=sparsity_settings(sae),
            model_name=sae.cfg.metadata.model_name,
            hook_name=setting.hook_name,
            hook_head_index=setting.hook_head_index,
            context_size=setting.context_size,
            d_in=sae.cfg.d_in,
            d_sae=sae.cfg.d_sae,
            n_tokens=self.n_tokens,
            n_tokens_measured=self.n_tokens_measured,
            n_tokens_alive=features.n_tokens_alive,
            ce_loss_without_sae=_mean(self.clean, "ce"),
            ce_loss_with_sae=_mean(spliced, "ce"),
            ce_loss_with_ablation=_mean(self.ablated, "ce"),
            kl=_mean(spliced, "kl"),
            kl_with_ablation=_mean(self.ablated, "kl"),
            top1_agreement=_mean(spliced, "top1_agreement"),
            top1_accuracy_without_sae=_mean(self.clean, "top1_accuracy"),
            top1_accuracy_with_sae=_mean(spliced, "top1_accuracy"),
            statistical_distance=_mean(spliced, "statistical_distance"),
            l0=_mean(features.tokens, "l0"),
            l1=_mean(features.tokens, "l1"),
            n_alive=int(features.alive.sum()),
            firing=firing_histogram(features.frequency),
            layers={hook: layer.evaluation() for hook, layer in self.layers[name].items()},
            firing_frequency=features.frequency,
            alive=features.alive.cpu(),
        )

    def _clean_layers(self, clean: CleanPass, measured: Measured) -> dict[str, Layer]:
        activations = {self.splice.hook_name: self.splice.read(clean.activation), **clean.downstream}
        layers = {hook: Layer(measured.take(activation)) for hook, activation in activations.items()}
        for hook, layer in layers.items():
            self.variances[hook].add(layer)
        return layers

    def _splice_in(
        self, name: str, clean: CleanPass, layers: Mapping[str, Layer], measured: Measured
    ) -> Float[Tensor, "tokens d_final"]:
        """Splice in one SAE and add up what it does at every hook; what the head takes then."""
        x = self.splice.read(clean.activation)
        features, x_hat = reconstruct(self.saes[name], x)
        self.features[name].add(features, measured.mask)
        replaced = torch.where(measured.mask.to(x.device)[..., None], x_hat.to(x.dtype), x)
        spliced = self.splice.spliced(clean, self.splice.write(clean.activation, replaced))
        for hook, activation in {self.splice.hook_name: x_hat, **spliced.downstream}.items():
            self.layers[name][hook].add(layers[hook], measured.take(activation), measured.first.to(activation.device))
        return measured.take(spliced.final)

    def _compare(self, clean: CleanPass, changed: Sequence[Tensor], measured: Measured) -> None:
        assert clean.final is not None
        final = measured.take(clean.final)
        of_clean, of_changed = compare_next_tokens(
            self.splice.head, final, changed, measured.next_tokens.to(final.device)
        )
        self.clean.add(of_clean)
        for sums, measures in zip((*self.spliced.values(), self.ablated), of_changed, strict=True):
            sums.add(measures)

    def _check_vocabulary(self, tokens: Int[Tensor, "batch pos"]) -> None:
        largest, known = int(tokens.max()), d_vocab(self.splice.head)
        if largest >= known:
            raise ValueError(
                f"the dataset has token {largest} and the model knows {known}; tokenise it with the model's own tokenizer"
            )


def _mean(sums: TokenSums, name: str) -> float:
    mean = sums.mean(name)
    if mean is None:
        raise ValueError(
            "exclude_special_tokens leaves no token of the dataset to measure; exclude fewer, or give more data"
        )
    return mean
