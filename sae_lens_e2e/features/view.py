"""All that is shown of one feature: where it fires most, what it does to the next token, and what lies near it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_e2e.bench.bench import Bench
from sae_lens_e2e.bench.members import Member
from sae_lens_e2e.evaluation.running import inference
from sae_lens_e2e.features.passages import Passage, passage
from sae_lens_e2e.features.places import TopPlaces
from sae_lens_e2e.features.text import token_text
from sae_lens_e2e.studies.logit_effects import at_positions, feature_activations, logit_effects
from sae_lens_e2e.studies.neighbours import Neighbour

N_EFFECTS = 8


@dataclass(frozen=True)
class Effect:
    """A next token, and how much likelier the feature makes it: the change of its log-probability, in nats."""

    token: str
    change: float


@dataclass(frozen=True)
class FeatureView:
    """One feature of an SAE, looked at closely."""

    sae: str
    feature: int
    frequency: float
    """The fraction of tokens at which it fires."""
    n_fired: int
    """At how many of the tokens read."""
    passages: tuple[Passage, ...]
    """Of the highest activation first, one a prompt; none if it never fires."""
    raised: tuple[Effect, ...]
    """The next tokens that it makes likelier by most, on average over the passages' peaks: log-probabilities as they are, less those
    without what the feature adds there."""
    lowered: tuple[Effect, ...]
    """Those that it makes less likely."""
    nearest: tuple[Neighbour, ...]
    """In its own dictionary."""
    nearest_other: tuple[Neighbour, ...] | None
    """In the dictionary it is compared with; None if there is none."""


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over the data has found out about every feature of an SAE."""

    member: Member
    firing: Int[Tensor, "d_sae"]
    """At how many tokens each fires."""
    n_tokens: int
    places: TopPlaces

    @property
    def alive(self) -> Tensor:
        """Which features fire at all (d_sae,)."""
        return self.firing > 0


@torch.no_grad()
def view(
    survey: Survey,
    bench: Bench,
    feature: int,
    nearest: Mapping[int, Sequence[Neighbour]],
    nearest_other: Mapping[int, Sequence[Neighbour]] | None,
) -> FeatureView:
    """Look at one feature: the prompts in which it is most active are run once more."""
    prompts, positions = survey.places.of(feature)
    tokenizer: Any = getattr(bench.model, "tokenizer", None)
    passages: list[Passage] = []
    effects: list[Tensor] = []
    with bench.splice.running(), inference(survey.member.sae):
        for batch in torch.arange(len(prompts)).split(bench.batch_size_prompts):
            tokens, peaks = bench.tokens[prompts[batch]], positions[batch]
            clean = bench.splice.clean(tokens, [bench.setting.site])
            activation, contribution = feature_activations(survey.member.sae, bench.setting.site, clean, feature)
            where = at_positions(tokens, peaks)
            effects.append(logit_effects(bench.splice, bench.setting.site, clean, contribution, where).cpu())
            counted = (activation.cpu() * bench.setting.positions.of(tokens).mask).tolist()
            rows = zip(tokens.tolist(), counted, prompts[batch].tolist(), peaks.tolist(), strict=True)
            passages += [passage(tokenizer, *row) for row in rows]
    raised, lowered = _extremes(tokenizer, torch.cat(effects).mean(0)) if effects else ((), ())
    n_fired = int(survey.firing[feature])
    return FeatureView(
        sae=survey.member.name,
        feature=feature,
        frequency=n_fired / survey.n_tokens,
        n_fired=n_fired,
        passages=tuple(passages),
        raised=raised,
        lowered=lowered,
        nearest=tuple(nearest[feature]),
        nearest_other=None if nearest_other is None else tuple(nearest_other[feature]),
    )


def _extremes(tokenizer: Any, change: Tensor) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    """The tokens that become likelier by most, and less likely."""

    def effects(order: Tensor) -> tuple[Effect, ...]:
        return tuple(Effect(token_text(tokenizer, int(i)), float(change[i])) for i in order)

    n = min(N_EFFECTS, len(change))
    up, down = change.topk(n).indices, change.topk(n, largest=False).indices
    return effects(up[change[up] > 0]), effects(down[change[down] < 0])
