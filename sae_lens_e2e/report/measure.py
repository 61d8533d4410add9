"""What a report measures."""

from collections.abc import Sequence

from sae_lens_e2e.bench.bench import Bench
from sae_lens_e2e.bench.members import Member, Skipped
from sae_lens_e2e.errors import kept_to, one_line
from sae_lens_e2e.evaluation import TogetherEvaluation
from sae_lens_e2e.evaluation.files import read_together
from sae_lens_e2e.report.close_up import measure_all_directions, measure_all_faithfulness, measure_geometry
from sae_lens_e2e.report.evaluations import evaluate_all
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.selection import similar_set
from sae_lens_e2e.report.store import Store
from sae_lens_e2e.saebench.results import CoreResults, read_core_results

MEASURES = ("evaluation", "geometry", "directions", "faithfulness")
"""Each may be left out."""


def check_measures(measures: Sequence[str]) -> None:
    """Raises ValueError for a measure that there is not, or none at all."""
    if unknown := [measure for measure in measures if measure not in MEASURES]:
        raise ValueError(f"measure {unknown[0]!r} is unknown; it is one of {', '.join(MEASURES)}")
    if not measures:
        raise ValueError(f"measures is empty; name at least one of {', '.join(MEASURES)}")


def measure_all(
    members: Sequence[Member],
    skipped: Sequence[Skipped],
    bench: Bench,
    store: Store,
    measures: Sequence[str] = MEASURES,
    verbose: bool = True,
) -> Results:
    """Measure SAEs on the bench, all of them or those that are looked at closely.

    Closely looked at are one SAE of each objective, of similar CE loss increase, as in the paper; all, if that is not measured.
    Raises ValueError if no SAE has a live feature.
    """
    results = Results(list(members), list(skipped), compared=[member.name for member in members])
    damaged = {member.name: member.history_damage for member in members if member.history_damage is not None}
    results.notes += [f"The course of training of {name} is left out: {why}" for name, why in damaged.items()]
    alive = {}
    results.together = _together(results)
    if "evaluation" in measures:
        alive = evaluate_all(results, bench, store, verbose)
        results.compared = similar_set(results.evaluations)
        results.saebench = _saebench(results, bench)
    if "geometry" in measures:
        measure_geometry(results, bench, store, alive, verbose)
    if "directions" in measures:
        measure_all_directions(results, bench, store)
    if "faithfulness" in measures:
        measure_all_faithfulness(results, bench, store, verbose)
    return results


def _together(results: Results) -> dict[str, TogetherEvaluation]:
    """What `sae-lens-e2e evaluate` or a sweep has found of the runs of several SAEs that the members are of."""
    found: dict[str, TogetherEvaluation] = {}
    runs = dict.fromkeys(member.folder.parent for member in results.members if member.folder is not None)
    for run in runs:
        with kept_to(
            run.name, lambda name, error: results.notes.append(f"What {name} costs at once is left out: {error}")
        ):
            if (evaluation := read_together(run)) is not None:
                found[run.name] = evaluation
    return found


def _saebench(results: Results, bench: Bench) -> dict[str, CoreResults]:
    """What SAEBench has found of the SAEs that were evaluated, where that is of the bench's tokens."""
    found: dict[str, CoreResults] = {}
    for member in results.members:
        if member.folder is None:
            continue
        try:
            core = read_core_results(member.folder)
        except (OSError, ValueError) as error:
            results.notes.append(f"What SAEBench found of {member.name} is left out: {one_line(error)}")
            continue
        if core is None:
            continue
        if (core.dataset, core.context_size, core.n_tokens) == (
            bench.dataset_name,
            bench.setting.context_size,
            bench.n_tokens,
        ):
            found[member.name] = core
        else:
            results.notes.append(
                f"What SAEBench found of {member.name} is left out: it is of {core.n_tokens:,} tokens of {core.dataset} in prompts of "
                f"{core.context_size}; run `sae-lens-e2e saebench` with the settings of this report"
            )
    return found
