"""What is measured of the few SAEs that are looked at closely: geometry, principal directions, faithfulness."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_e2e.bench.bench import Bench, features_by_batch
from sae_lens_e2e.bench.fingerprint import digest
from sae_lens_e2e.bench.members import Member
from sae_lens_e2e.errors import one_line
from sae_lens_e2e.evaluation.features import FeatureSums
from sae_lens_e2e.report.evaluations import ALIVE_TOKENS
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.store import Store
from sae_lens_e2e.studies.agreement import TEMPLATES, agreement_pairs
from sae_lens_e2e.studies.contrast import tokenizer_of
from sae_lens_e2e.studies.directions import Directions, measure_directions
from sae_lens_e2e.studies.faithfulness import Faithfulness, faithfulness
from sae_lens_e2e.studies.geometry import Geometry, Kind, compare, geometry

# Principal components of some thousand dimensions need no more.
DIRECTION_TOKENS = 65_536
_KL_PROMPTS = 16

Result = TypeVar("Result")
Alive = dict[str, Bool[Tensor, "d_sae"]]
Comparison = tuple[Member, Member | None, Kind]


def measure_geometry(results: Results, bench: Bench, store: Store, alive: Alive, verbose: bool) -> None:
    """Compare features with their own dictionary's, another seed's and another kind's; `alive` is what is known already."""
    keys = [(one, _geometry_key(one, bench)) for one in _comparisons(results)]
    stored = {str(key): found for _, key in keys if (found := store.get(key, Geometry.from_dict)) is not None}
    todo = [one for one, key in keys if str(key) not in stored]
    needed = {one.name: one for member, other, _ in todo for one in (member, other) if one is not None}
    alive = alive | live_features([one for name, one in needed.items() if name not in alive], bench, verbose)
    for comparison, key in tqdm(keys, "Geometry", leave=False, disable=not verbose):
        member, other, kind = comparison
        found = stored.get(str(key)) or _noting(
            results, f"Geometry of {member.name}, {kind}", _compared, comparison, alive
        )
        if found is None:
            continue
        if str(key) not in stored:
            store.put(key, found.to_dict())
        # The other SAE's name may not be what it was.
        named = found if other is None else replace(found, compared_with=other.name)
        results.geometry.setdefault(member.name, []).append(named)


@torch.no_grad()
def live_features(members: Sequence[Member], bench: Bench, verbose: bool = True) -> Alive:
    """Which features of SAEs fire at least once within 500,000 tokens; the model is run no further than the hook."""
    if not members:
        return {}
    sums = {one.name: FeatureSums(one.sae.cfg.d_sae, ALIVE_TOKENS, one.sae.device) for one in members}
    for where, features in features_by_batch(members, bench, "Live features", verbose):
        for name, of_one in features.items():
            sums[name].add(of_one, where)
    return {name: one.alive for name, one in sums.items()}


def measure_all_directions(results: Results, bench: Bench, store: Store) -> None:
    """How well each SAE reconstructs the principal directions, and once, for it is the model's alone, what each matters."""
    n_prompts = max(1, DIRECTION_TOKENS // bench.setting.context_size)
    first: Directions | None = None
    for member in results.close:
        n_kl_prompts = _KL_PROMPTS if first is None else 0
        key = {
            **{"measure": "directions", "sae": member.fingerprint, "bench": bench.identity},
            **{"n_prompts": n_prompts, "n_kl_prompts": n_kl_prompts},
        }

        def measured(member: Member = member, n_kl_prompts: int = n_kl_prompts) -> Directions:
            prompts, batch_size = bench.tokens[:n_prompts], bench.batch_size_prompts
            return measure_directions(
                member.sae, bench.model, prompts, batch_size_prompts=batch_size, n_kl_prompts=n_kl_prompts
            )

        found = _noting(
            results, f"Principal directions of {member.name}", _kept, store, key, Directions.from_dict, measured
        )
        if found is not None:
            kl_from = first = first or found
            results.directions[member.name] = replace(found, kl=kl_from.kl, n_kl_tokens=kl_from.n_kl_tokens)


def measure_all_faithfulness(results: Results, bench: Bench, store: Store, verbose: bool) -> None:
    """How much of subject-verb agreement each SAE keeps, in those constructions that the tokenizer has words for."""
    what = "Subject-verb agreement"
    if _noting(results, what, tokenizer_of, bench.model) is None:
        return
    n_notes = len(results.notes)
    found = [_noting(results, f"{what}, {name}", agreement_pairs, bench.model, [name]) for name in TEMPLATES]
    pairs = [pair for of_template in found if of_template is not None for pair in of_template]
    if not pairs:
        results.notes[n_notes:] = [
            f"{what} could not be measured: the model's tokenizer has no words for it in one token."
        ]
        return
    for member in results.close:
        key = {
            **{"measure": "faithfulness", "sae": member.fingerprint, "bench": bench.identity},
            "pairs": digest(str(pairs)),
        }

        def measured(member: Member = member) -> Faithfulness:
            return faithfulness(member.sae, bench.model, pairs, verbose=verbose)

        found = _noting(results, f"Faithfulness of {member.name}", _kept, store, key, Faithfulness.from_dict, measured)
        if found is not None:
            results.faithfulness[member.name] = found


def _comparisons(results: Results) -> Iterator[Comparison]:
    """Each SAE that is looked at closely, and what its features are compared with."""
    for member in results.close:
        yield member, None, "same dictionary"
        if member.objective != results.anchor.objective:
            yield member, results.anchor, "another kind"
    for member, twin in results.seed_pairs:
        yield member, twin, "another seed"


def _geometry_key(comparison: Comparison, bench: Bench) -> dict[str, Any]:
    member, other, kind = comparison
    return {
        **{"measure": "geometry", "kind": kind, "sae": member.fingerprint, "bench": bench.identity},
        "other": None if other is None else other.fingerprint,
    }


def _compared(comparison: Comparison, alive: Alive) -> Geometry:
    member, other, kind = comparison
    own = alive[member.name]
    if other is None:
        return geometry(member.sae, alive=own)
    others = alive[other.name]
    return compare(member.sae, other.sae, compared_with=other.name, kind=kind, alive=own, other_alive=others)


def _kept(
    store: Store, key: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Result], measured: Callable[[], Any]
) -> Result:
    """What the store has under a key, or else what is measured now and put there."""
    stored = store.get(key, read)
    if stored is not None:
        return stored
    new = measured()
    store.put(key, new.to_dict())
    return new


def _noting(results: Results, what: str, measured: Callable[..., Result], *arguments: Any) -> Result | None:
    """What is measured, or None and a note of why it could not be."""
    try:
        return measured(*arguments)
    except Exception as error:  # what cannot be measured does not concern the rest
        results.notes.append(f"{what} could not be measured: {one_line(error)}")
        return None
