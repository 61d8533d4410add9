"""One pass over the data: what is run for each batch of tokens, and the sums that are kept of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_e2e.evaluation.features import FeatureSums, firing_histogram
from sae_lens_e2e.evaluation.layers import Layer, LayerSums, LayerVariance
from sae_lens_e2e.evaluation.next_token import compare_next_tokens
from sae_lens_e2e.evaluation.reading import Read
from sae_lens_e2e.evaluation.result import Evaluation
from sae_lens_e2e.evaluation.running import SplicedSAE
from sae_lens_e2e.evaluation.sums import TokenSums
from sae_lens_e2e.evaluation.tokens import Setting
from sae_lens_e2e.splice import Clean, Site, SplicedModel, Where

SPARSITY_FIELDS = ("l1_coefficient", "l0_coefficient", "sparsity_coefficient", "k")


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
    """The sums of several SAEs, each spliced in alone; they share the clean pass of every batch, and its ablation at each site.

    `later` are the hooks to compare after each site.
    """

    def __init__(
        self,
        model: SplicedModel,
        saes: Mapping[str, SAE[Any]],
        settings: Mapping[str, Setting],
        later: Mapping[Site, Sequence[str]],
        alive_tokens: int,
    ):
        self.model, self.saes, self.settings, self.later = model, saes, settings, later
        self.variances = {place: LayerVariance() for site in later for place in self._places(site)}
        self.clean = TokenSums()
        self.ablated = {site: TokenSums() for site in later}
        self.spliced = {name: TokenSums() for name in saes}
        self.features = {name: FeatureSums(sae.cfg.d_sae, alive_tokens, sae.device) for name, sae in saes.items()}
        self.layers = {
            name: {place: LayerSums(self.variances[place]) for place in self._places(settings[name].site)}
            for name in saes
        }

    def add(self, tokens: Int[Tensor, "batch pos"], where: Where) -> None:
        """Run one batch: the model as it is, and from each site on with each SAE of it and with zeros."""
        clean = self.model.clean(tokens.to(self.model.device), self.later, {place.read for place in self.variances})
        assert clean.final is not None
        layers = {place: Layer(place.take(where.take(clean.at[place.read]))) for place in self.variances}
        for place, layer in layers.items():
            self.variances[place].add(layer)
        changed = [self._splice_in(name, clean, layers, where) for name in self.saes]
        changed += [self._ablate(site, clean, where) for site in self.later]
        of_clean, of_changed = compare_next_tokens(
            self.model.unembedding, where.take(clean.final), changed, where.labels(tokens)
        )
        self.clean.add(of_clean)
        for sums, measures in zip((*self.spliced.values(), *self.ablated.values()), of_changed, strict=True):
            sums.add(measures)

    def evaluation(self, name: str, read: Read) -> Evaluation:
        """The figures of one SAE, over what was read."""
        sae, setting, spliced, features = self.saes[name], self.settings[name], self.spliced[name], self.features[name]
        ablated = self.ablated[setting.site]
        return Evaluation(
            objective=(sae.cfg.metadata.objective or {}).get("name"),
            architecture=sae.cfg.architecture(),
            sparsity=sparsity_settings(sae),
            model_name=sae.cfg.metadata.model_name,
            hook_name=setting.hook_name,
            hook_name_out=setting.hook_name_out,
            hook_head_index=setting.hook_head_index,
            context_size=setting.context_size,
            d_in=sae.cfg.d_in,
            d_sae=sae.cfg.d_sae,
            n_tokens=read.n_tokens,
            n_tokens_measured=read.n_tokens_measured,
            n_tokens_alive=features.n_tokens_alive,
            ce_loss_without_sae=self.clean.mean("ce"),
            ce_loss_with_sae=spliced.mean("ce"),
            ce_loss_with_ablation=ablated.mean("ce"),
            kl=spliced.mean("kl"),
            kl_with_ablation=ablated.mean("kl"),
            top1_agreement=spliced.mean("top1_agreement"),
            top1_accuracy_without_sae=self.clean.mean("top1_accuracy"),
            top1_accuracy_with_sae=spliced.mean("top1_accuracy"),
            statistical_distance=spliced.mean("statistical_distance"),
            l0=features.tokens.mean("l0"),
            l1=features.tokens.mean("l1"),
            n_alive=int(features.alive.sum()),
            firing=firing_histogram(features.frequency),
            layers={place.read: layer.evaluation() for place, layer in self.layers[name].items()},
            firing_frequency=features.frequency,
            alive=features.alive.cpu(),
        )

    def _places(self, site: Site) -> list[Site]:
        """Where an SAE at a site is compared with the clean model: where it writes, and at whole hooks later."""
        return [_written(site), *map(Site.of_sae, self.later[site])]

    def _splice_in(
        self, name: str, clean: Clean, layers: Mapping[Site, Layer], where: Where
    ) -> Float[Tensor, "tokens d_final"]:
        """Splice in one SAE and add up what it does everywhere; what the unembedding takes then."""
        site = self.settings[name].site
        spliced_sae = SplicedSAE(self.saes[name], site, where)
        everywhere = Where.everywhere(clean.tokens)
        spliced = self.model.spliced(clean, where, {site: spliced_sae}, self.later[site], reading=everywhere)
        assert spliced.final is not None
        self.features[name].add(spliced_sae.features, where)
        # On the host, where they are known.
        position = where.place()[:, 1]
        first, later = (position == 0).nonzero()[:, 0], position.nonzero()[:, 0]
        changed = {_written(site): spliced_sae.out}
        changed |= {Site.of_sae(hook): where.take(spliced.at[hook]).flatten(1) for hook in self.later[site]}
        for place, activation in changed.items():
            self.layers[name][place].add(layers[place], activation, first, later)
        return where.take(spliced.final)

    def _ablate(self, site: Site, clean: Clean, where: Where) -> Float[Tensor, "tokens d_final"]:
        """The same with zeros where a site writes, at every token."""
        written = _written(site)
        zeros = {written: lambda x: {written.read: torch.zeros_like(x)}}
        spliced = self.model.spliced(clean, Where.everywhere(clean.tokens), zeros)
        assert spliced.final is not None
        return where.take(spliced.final)


def _written(site: Site) -> Site:
    """What a module at a site stands for: what it reads, or, for a transcoder, what another hook has."""
    return site if site.is_sae else Site.of_sae(site.writes[0])
