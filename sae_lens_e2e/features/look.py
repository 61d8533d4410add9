"""`look_at_features`: what an SAE's features are, read off the data, the language model and the dictionary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE, TrainingSAE
from tqdm.auto import tqdm
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.bench.bench import Bench, features_by_batch, set_up
from sae_lens_e2e.bench.members import Member, check_one, short_names
from sae_lens_e2e.evaluation.features import FeatureSums
from sae_lens_e2e.evaluation.reading import check_vocabulary
from sae_lens_e2e.evaluation.running import check_evaluable
from sae_lens_e2e.features.choice import check_features, spread
from sae_lens_e2e.features.places import TopPlaces
from sae_lens_e2e.features.view import FeatureView, Survey, view
from sae_lens_e2e.loading.saes import load_sae
from sae_lens_e2e.publishing.neuronpedia import stock_sae
from sae_lens_e2e.studies.neighbours import Unmatched, nearest_features, unmatched

THRESHOLD = 0.7
N_FEATURES, N_PASSAGES, MAX_TOKENS, BATCH_SIZE_PROMPTS = 12, 8, 500_000, 16
N_NEAREST = 5

Source = str | Path | SAE[Any]


@dataclass(frozen=True)
class Group:
    """Features that are shown together, and why these."""

    name: str
    """'chosen', 'spread', 'only_first', 'only_second' or 'both'."""
    sae: str
    """Whose they are."""
    features: tuple[FeatureView, ...]


@dataclass(frozen=True, eq=False)
class Look:
    """What `look_at_features` has found: of one SAE, or of two, the first of which is compared with the second."""

    surveys: tuple[Survey, ...]
    bench: Bench
    groups: tuple[Group, ...]
    unmatched: tuple[Unmatched, ...]
    """For each of two SAEs its features that the other lacks; nothing for one."""

    @property
    def names(self) -> tuple[str, ...]:
        """The SAEs' names."""
        return tuple(survey.member.name for survey in self.surveys)


@torch.no_grad()
def look_at_features(
    sae: Source,
    *,
    features: Sequence[int] | None = None,
    compare: Source | None = None,
    threshold: float = THRESHOLD,
    n_features: int = N_FEATURES,
    n_passages: int = N_PASSAGES,
    model: str | HookedRootModule | None = None,
    dataset: str | Dataset | None = None,
    max_tokens: int = MAX_TOKENS,
    batch_size_prompts: int = BATCH_SIZE_PROMPTS,
    device: str = "cpu",
    trust_remote_code: bool = False,
    verbose: bool = True,
) -> Look:
    """Top activating passages, firing frequency, effects on the next token and nearest features of some of an SAE's features.

    sae, compare: whatever `load_sae` takes, or SAEs; two have to sit at the same hook and read the same data.
    features: of `sae`, by number. Left at None, `n_features` live ones at equal steps from the one that fires most to the one that
        fires least; with `compare`, as many that the first has and the second lacks, that the second has, and that both have.
    threshold: an SAE lacks a feature if its live features' largest cosine similarity to it, decoder row to decoder row, is less.
    n_passages: of each feature, one a prompt.
    model, dataset: names as `load_model` and `load_documents` take them, whose held-out documents are read, or the things
        themselves; left at None, those that the SAEs' metadata name.
    max_tokens: at most so many are read, once. A feature is live if it fires on one of them.
    batch_size_prompts: prompts a forward pass.
    device: where the model and the SAEs are run.
    trust_remote_code: load the model with whatever the SAE's metadata say, even if that runs code of the model's repository.
    verbose: show progress.

    Raises ValueError or OSError for an SAE, a model or data that are not there or do not fit, a feature that the SAE does not have, and
    an SAE of which none fires.
    """
    for field, value in (("n_features", n_features), ("n_passages", n_passages)):
        if value < 1:
            raise ValueError(f"{field}={value} must be at least 1")
    members = _members([sae] if compare is None else [sae, compare], device)
    check_one(members, "hook_name", "compare SAEs of one hook")
    if model is None:
        check_one(members, "model_name", "if these are one model, say which with model= (--model)")
    chosen = None if features is None else check_features(members[0].name, features, members[0].sae.cfg.d_sae)
    bench, fitting, misfits = set_up(members, model, dataset, max_tokens, batch_size_prompts, device, trust_remote_code)
    if misfits:
        raise ValueError(f"{misfits[0].name} does not fit the model: {misfits[0].reason}")
    check_vocabulary(bench.tokens, bench.splice)
    surveys = _survey(fitting, bench, n_passages, verbose)
    missing = _unmatched(surveys, threshold) if compare is not None else ()
    wanted = _chosen(surveys, missing, chosen, n_features)
    bar = tqdm(desc="Features", total=sum(len(numbers) for _, _, numbers in wanted), leave=False, disable=not verbose)
    with bar:
        groups = tuple(
            Group(name, surveys[which].member.name, _views(surveys, which, numbers, bench, bar))
            for name, which, numbers in wanted
        )
    return Look(surveys, bench, groups, missing)


def _members(sources: Sequence[Source], device: str) -> list[Member]:
    """The SAEs, for inference, under names that differ."""
    named = short_names([str(one) for one in sources if not isinstance(one, SAE)])
    by_source = {source: name for name, source in named.items()}
    members: list[Member] = []
    for source in sources:
        place = "" if isinstance(source, SAE) else str(source)
        found = load_sae(source, device) if not isinstance(source, SAE) else source
        name = by_source.get(place) or Member("SAE", "", found, {}).objective
        if name in [one.name for one in members]:
            name = f"{name}, the second"
        check_evaluable(name, found)
        if isinstance(found, TrainingSAE):
            # Some are active on the largest of a whole batch, whichever prompts are in it.
            found = stock_sae(found).to(device)
        members.append(Member(name, place, found, {}))
    return members


def _survey(members: Sequence[Member], bench: Bench, n_passages: int, verbose: bool) -> tuple[Survey, ...]:
    """One pass over the data. Raises ValueError for an SAE of which no feature fires."""
    sums = {one.name: FeatureSums(one.sae.cfg.d_sae, bench.n_tokens, one.sae.device) for one in members}
    places = {one.name: TopPlaces(one.sae.cfg.d_sae, n_passages, one.sae.device) for one in members}
    for where, features in features_by_batch(members, bench, "Passages", verbose):
        for name, of_one in features.items():
            dense = of_one.to_dense() if of_one.is_sparse else of_one
            sums[name].add(dense, where)
            places[name].add(dense, where)
    for name, found in sums.items():
        if not bool(found.firing.any()):
            raise ValueError(
                f"{name}: none of its {len(found.firing):,} features fires on {found.n_tokens:,} tokens of {bench.dataset_name}; see that "
                "the model and data are those it was trained on, or take an earlier checkpoint"
            )
    return tuple(Survey(one, sums[one.name].firing.cpu(), sums[one.name].n_tokens, places[one.name]) for one in members)


def _unmatched(surveys: Sequence[Survey], threshold: float) -> tuple[Unmatched, ...]:
    """For each of two SAEs the features that the other lacks."""

    def one_way(first: Survey, second: Survey) -> Unmatched:
        W_dec, other = first.member.sae.W_dec, second.member.sae.W_dec
        return unmatched(W_dec, other, threshold, alive=first.alive, other_alive=second.alive)

    first, second = surveys
    return one_way(first, second), one_way(second, first)


def _chosen(
    surveys: Sequence[Survey], missing: Sequence[Unmatched], chosen: Sequence[int] | None, n: int
) -> list[tuple[str, int, Sequence[int]]]:
    """The groups that are shown: their names, which SAE's they are, and their features."""
    firing = [survey.firing for survey in surveys]
    if chosen is not None:
        return [("chosen", 0, chosen)]
    if not missing:
        return [("spread", 0, spread(surveys[0].alive.nonzero()[:, 0].tolist(), firing[0], n))]
    first, second = missing
    return [
        ("only_first", 0, spread(first.features, firing[0], n)),
        ("only_second", 1, spread(second.features, firing[1], n)),
        ("both", 0, spread(first.matched, firing[0], n)),
    ]


def _views(
    surveys: Sequence[Survey], which: int, features: Sequence[int], bench: Bench, bar: tqdm
) -> tuple[FeatureView, ...]:
    survey, others = surveys[which], [*surveys[:which], *surveys[which + 1 :]]
    W_dec = survey.member.sae.W_dec
    own = nearest_features(features, W_dec, other_alive=survey.alive, n=N_NEAREST)
    other = None
    if others:
        compared = others[0]
        other = nearest_features(features, W_dec, compared.member.sae.W_dec, other_alive=compared.alive, n=N_NEAREST)
    found: list[FeatureView] = []
    for feature in features:
        found.append(view(survey, bench, feature, own, other))
        bar.update()
    return tuple(found)
