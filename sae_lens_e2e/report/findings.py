"""What the numbers say, in sentences, and whether the paper found the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sae_lens_e2e.bench.members import LOCAL
from sae_lens_e2e.evaluation import Evaluation
from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.report import published
from sae_lens_e2e.report.fair import seeded_frame
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.selection import SIMILAR, factor, nearest
from sae_lens_e2e.studies.geometry import Geometry, Interval, geometry_difference
from sae_lens_e2e.studies.pareto import Comparison, headline, sentence

Verdict = Literal["agrees", "agrees in part", "does not agree", "cannot be said"]

# Two SAEs this near in what is to be equal are taken as equal in it.
_EQUAL = 1.05


@dataclass(frozen=True)
class Finding:
    """One thing the paper claims, what these SAEs show of it, and whether that agrees."""

    claim: str
    here: str
    """What was measured, and why it cannot be said if it cannot."""
    paper: str
    """The paper's figures, and where they are from."""
    verdict: Verdict
    headline: str = ""
    """For the paper's headline alone: the sentence that says it."""


def findings(results: Results) -> list[Finding]:
    """Every claim of the paper's on objectives that are among the SAEs; none where there are no evaluations."""
    objectives = {str(found.objective) for found in results.evaluations.values()}
    found = [finding for pair in (("e2e_ds", "e2e"), (LOCAL, "e2e")) for finding in _later_layers(results, *pair)]
    if LOCAL not in objectives:
        return found
    ends = [name for name in published.SIMILAR_CE if name != LOCAL and name in objectives]
    comparisons = headline(seeded_frame(results))
    return [
        *(_ratio(results, one) for one in comparisons if one.other in ends),
        *found,
        *(finding for name in ends for finding in _nearest_features(results, name)),
        *(_length(results, name) for name in ends),
    ]


def _ratio(results: Results, comparison: Comparison) -> Finding:
    """L0, alive features or CE loss increase as a fraction of local's, at equal values of another."""
    other, measure, equal = comparison.other, comparison.measure, comparison.equal
    rows, table = (published.SIMILAR_L0, 3) if equal == "l0" else (published.SIMILAR_CE, 2)
    theirs = published.ratios(rows, other, measure)
    claim = f"At equal {_noun(equal)}, {other} has a smaller {_noun(measure)} than local"
    paper = f"{_listed(theirs)} times local’s {_at_layers()} (table {table})"
    if comparison.at_median is not None and comparison.at_median.ratio is not None:
        ratio, here = comparison.at_median.ratio, _with_range(comparison)
    else:
        ratio, here = _of_nearest_pair(results, comparison)
    verdict: Verdict = "cannot be said" if ratio is None else "does not agree" if ratio >= 1 else "agrees"
    if ratio is not None and max(theirs) < ratio < 1:
        here, verdict = f"{here} The gap is smaller than at any of the paper’s layers.", "agrees in part"
    return Finding(claim, here, paper, verdict, sentence(comparison) if measure == "l0" else "")


def _with_range(comparison: Comparison) -> str:
    """The comparison in words, with the smallest and largest ratio along the fronts if there are several."""
    ratios = [point.ratio for point in comparison.points if point.ratio is not None]
    if len(ratios) < 2:
        return sentence(comparison)
    return (
        f"{sentence(comparison)} Over {len(ratios)} points of the fronts: {min(ratios):.2f} to {max(ratios):.2f} times."
    )


def _of_nearest_pair(results: Results, comparison: Comparison) -> tuple[float | None, str]:
    """The ratio of the two SAEs nearest in what is to be equal, if they can stand in for the fronts, and the words.

    They can if they are equal but for a few per cent, or one is better in both.
    """
    pairs = nearest(results.evaluations, comparison.equal).items()
    of_other = [pair for pair in pairs if results.evaluations[pair[0]].objective == comparison.other]
    equal, measure = comparison.equal, comparison.measure
    pair = min(of_other, key=lambda names: factor(*_values(results, names, equal)))
    (other, local), (found, reference) = _values(results, pair, equal), _values(results, pair, measure)
    words = (
        f"{sentence(comparison)} Of the two SAEs nearest in {_noun(equal)}, {comparison.other} {other:.3g} and local {local:.3g}, the "
        f"{_noun(measure)} is {found:.4g} and {reference:.4g}"
    )
    if reference <= 0:
        return None, f"{words}."
    one_is_better = (other <= local and found < reference) or (other >= local and found >= reference)
    if factor(other, local) > _EQUAL and not one_is_better:
        return None, f"{words}, which does not decide it."
    return found / reference, f"{words}: {found / reference:.2f} times."


def _values(results: Results, names: tuple[str, str], measure: str) -> tuple[float, float]:
    first, second = (float(getattr(results.evaluations[name], measure)) for name in names)
    return first, second


def _later_layers(results: Results, lower: str, higher: str) -> Iterator[Finding]:
    """Figure 2: which of two objectives keeps the later layers nearer to what they were."""
    first, second = _closely(results, lower), _closely(results, higher)
    if first is None or second is None:
        return
    claim = f"At every later layer the reconstruction error of {lower} lies below that of {higher}"
    theirs = [f"{name} {a:g} to {b:g}" for name in (lower, higher) for a, b in [published.LATER_LAYER_MSE[name]]]
    paper = f"{', '.join(theirs)} from the first later layer to the last, at layer 6 of {published.MODEL} (figure 2)"
    errors, others = first.downstream_mse, second.downstream_mse
    below = [hook for hook in errors if errors[hook] < others[hook]]
    last = list(errors)[-1]
    here = (
        f"The MSE of {lower} is below that of {higher} at {len(below)} of {len(errors)} later layers; at the last, {last}, they "
        f"are {errors[last]:.3g} and {others[last]:.3g}."
    )
    verdict: Verdict = "agrees" if len(below) == len(errors) else "agrees in part" if below else "does not agree"
    yield _at_similar_cost(Finding(claim, here, paper, verdict), first, second)


def _nearest_features(results: Results, objective: str) -> Iterator[Finding]:
    """Figure 3a: how much nearer to each other local's features lie."""
    local, other = (_same_dictionary(results, name) for name in (LOCAL, objective))
    if local is None or other is None:
        return
    theirs = Interval(*published.NEAREST_COSINE_DIFFERENCE[objective])
    claim = f"The features of {objective} lie further apart than those of local: their nearest cosines are smaller"
    paper = f"local less {objective}: {_interval(theirs)}, at layer 6 of {published.MODEL} (figure 3a)"
    difference = geometry_difference(local, other)
    here = (
        f"The mean nearest cosine is {_interval(local.interval)} for local and {_interval(other.interval)} for {objective}; local "
        f"less {objective}: {_interval(difference)}."
    )
    verdict: Verdict = "agrees" if difference.low > 0 else "does not agree"
    if difference.low <= 0 <= difference.high:
        here, verdict = f"{here} The interval contains 0.", "cannot be said"
    first, second = _closely(results, LOCAL), _closely(results, objective)
    assert first is not None
    assert second is not None
    yield _at_similar_cost(Finding(claim, here, paper, verdict), first, second)


def _length(results: Results, objective: str) -> Finding:
    """Table 5: end to end, nothing asks that an SAE's output be as long as its input."""
    other, local = _closely(results, objective), _closely(results, LOCAL)
    assert other is not None
    assert local is not None
    claim = f"After position 0 the output of {objective} is shorter, against its input, than that of local"
    theirs = [f"{name} {_listed(published.L2_RATIO_LATER[name])}" for name in (objective, LOCAL)]
    paper = f"{', '.join(theirs)} {_at_layers()} (table 5)"
    later = other.at_hook.l2_ratio_later, local.at_hook.l2_ratio_later
    if later[0] is None or later[1] is None:
        return Finding(claim, "No later position was measured.", paper, "cannot be said")
    here = f"The L2 ratio after position 0 is {later[0]:.2f} for {objective} and {later[1]:.2f} for local."
    first = other.at_hook.l2_ratio_first, local.at_hook.l2_ratio_first
    if first[0] is not None and first[1] is not None:
        here += f" At position 0 it is {first[0]:.2f} and {first[1]:.2f}."
    verdict: Verdict = "agrees" if later[0] < later[1] else "does not agree"
    return _at_similar_cost(Finding(claim, here, paper, verdict), other, local)


def _at_similar_cost(finding: Finding, first: Evaluation, second: Evaluation) -> Finding:
    """The finding, or that it cannot be said if the two SAEs differ much in what they cost, where the paper's did not."""
    costs = first.ce_loss_increase, second.ce_loss_increase
    if factor(*costs) <= SIMILAR:
        return finding
    why = (
        f"{finding.here} But the CE loss increases of the two, {costs[0]:.3g} and {costs[1]:.3g} nats, are more than {SIMILAR} "
        "times apart; train with sparsity coefficients that bring them together."
    )
    return Finding(finding.claim, why, finding.paper, "cannot be said")


def _closely(results: Results, objective: str) -> Evaluation | None:
    """The evaluation of the SAE of an objective that is looked at closely."""
    found = (results.evaluations[one.name] for one in results.close if one.objective == objective)
    return next(found, None) if results.evaluations else None


def _same_dictionary(results: Results, objective: str) -> Geometry | None:
    names = [one.name for one in results.close if one.objective == objective]
    found = (one for name in names for one in results.geometry.get(name, ()) if one.kind == "same dictionary")
    return next(found, None)


def _noun(measure: str) -> str:
    return MEASURES[measure].in_a_sentence


def _interval(interval: Interval) -> str:
    # Adding 0 makes of -0.000 what it is.
    mean, low, high = (round(value, 3) + 0.0 for value in (interval.mean, interval.low, interval.high))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _listed(values: Sequence[float]) -> str:
    *first, last = (f"{value:.2f}" for value in values)
    return f"{', '.join(first)} and {last}"


def _at_layers() -> str:
    *first, last = map(str, published.LAYERS)
    return f"at layers {', '.join(first)} and {last} of {published.MODEL}"
