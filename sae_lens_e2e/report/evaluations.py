"""The evaluation of every SAE: from the store, from beside the SAE, or else in one pass that all share."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from sae_lens_e2e.bench.bench import Bench
from sae_lens_e2e.bench.members import Member, Skipped
from sae_lens_e2e.errors import one_line
from sae_lens_e2e.evaluation import Evaluation, evaluate_each
from sae_lens_e2e.evaluation.files import read_evaluation
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.store import Store

ALIVE_TOKENS = 500_000
# How far two passes over the same tokens may differ: in float32, on different hardware.
_SAME = 1e-4


def evaluate_all(results: Results, bench: Bench, store: Store, verbose: bool) -> dict[str, Bool[Tensor, "d_sae"]]:
    """Evaluate every SAE, and drop those that do nothing; the live features of each that was evaluated just now.

    Raises ValueError if none is left.
    """
    keys = {member.name: _key(member, bench) for member in results.members}
    known = {name: one for name, key in keys.items() if (one := store.get(key, Evaluation.from_dict)) is not None}
    unknown = [member for member in results.members if member.name not in known]
    beside = {member.name: one for member in unknown if (one := stored_evaluation(member, bench)) is not None}
    new = _evaluate(results, [member for member in unknown if member.name not in beside], bench, verbose)
    if not (found := (*new.values(), *known.values(), *beside.values())):
        raise _none_left(results)
    # That something was stored for other tokens, or another model, shows in the loss of the model without an SAE.
    clean = found[0].ce_loss_without_sae
    beside = {name: one for name, one in beside.items() if math.isclose(one.ce_loss_without_sae, clean, rel_tol=_SAME)}
    new |= _evaluate(results, _without(results.members, {*known, *beside, *new}), bench, verbose)
    for name, one in new.items():
        store.put(keys[name], one.to_dict())
    results.reused = [member.name for member in results.members if member.name in beside]
    _take(results, known | beside | new, bench.model_name)
    return {name: one.alive for name, one in new.items() if one.alive is not None}


def stored_evaluation(member: Member, bench: Bench) -> Evaluation | None:
    """The evaluation beside an SAE, if it is of the same model, data and settings as the bench's."""
    metadata = member.sae.cfg.metadata
    if metadata.dataset_path != bench.dataset_name or metadata.model_name != bench.model_name or member.folder is None:
        return None
    try:
        stored = read_evaluation(member.folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if stored is None:
        return None
    same = stored.n_tokens == bench.n_tokens and stored.context_size == bench.setting.context_size
    return stored if same and stored.n_tokens_alive == min(ALIVE_TOKENS, stored.n_tokens_measured) else None


def _key(member: Member, bench: Bench) -> dict[str, Any]:
    return {
        "measure": "evaluation",
        "sae": member.fingerprint,
        "bench": bench.identity,
        "setting": asdict(bench.setting),
        "batch_size_prompts": bench.batch_size_prompts,
        "alive_tokens": ALIVE_TOKENS,
    }


def _evaluate(results: Results, members: Sequence[Member], bench: Bench, verbose: bool) -> dict[str, Evaluation]:
    """Evaluate those that can be, and skip the others."""

    def skip(name: str, error: Exception) -> None:
        results.members.remove(results.member(name))
        results.compared = [one for one in results.compared if one != name]
        results.skipped.append(Skipped(name, f"it cannot be evaluated: {one_line(error)}"))

    if not members:
        return {}
    return evaluate_each(
        {member.name: member.sae for member in members},
        bench.model,
        bench.dataset,
        skip,
        batch_size_prompts=bench.batch_size_prompts,
        alive_tokens=ALIVE_TOKENS,
        verbose=verbose,
    )


def _without(members: Sequence[Member], names: Container[str]) -> list[Member]:
    return [member for member in members if member.name not in names]


def _take(results: Results, evaluations: Mapping[str, Evaluation], model_name: str) -> None:
    """Take over the evaluations of SAEs that do something, and skip the others."""
    for member in list(results.members):
        found = evaluations[member.name]
        if reason := _useless(found):
            results.members.remove(member)
            results.skipped.append(Skipped(member.name, reason))
            continue
        # As the report has them, which may know more than the SAE's metadata.
        described = {"objective": member.objective, "sparsity": member.sparsity, "model_name": model_name}
        results.evaluations[member.name] = replace(found, **described)
    if not results.members:
        raise _none_left(results)


def _none_left(results: Results) -> ValueError:
    last = results.skipped[-1]
    return ValueError(f"no SAE is left to report on; {last.name}: {last.reason}")


def _useless(found: Evaluation) -> str | None:
    if found.n_alive == 0:
        return f"its dictionary has no live feature: none fired on {found.n_tokens_alive:,} tokens"
    if not math.isfinite(found.ce_loss_with_sae):
        return "the model's CE loss with it is not finite"
    return None
