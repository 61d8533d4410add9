"""Which SAEs are set beside each other: those of similar CE loss increase, or of similar L0, as in tables 2 and 3 of the paper."""

from collections.abc import Mapping

from sae_lens_e2e.bench.members import LOCAL, objective_order
from sae_lens_e2e.evaluation import Evaluation

# Within the paper's own sets of similar CE loss increase the largest is 1.33 times the smallest (layer 2, table 2).
SIMILAR = 1.5


def factor(a: float, b: float) -> float:
    """How many times the larger of two values is the smaller; infinite unless both are positive, or equal."""
    if a == b:
        return 1.0
    return max(a, b) / min(a, b) if min(a, b) > 0 else float("inf")


def baseline_of(evaluations: Mapping[str, Evaluation]) -> str:
    """The objective that others are compared with: local, or the first there is."""
    objectives = objective_order(str(found.objective) for found in evaluations.values())
    return LOCAL if LOCAL in objectives else objectives[0]


def nearest(evaluations: Mapping[str, Evaluation], measure: str) -> dict[str, str]:
    """For each SAE of another objective, by name, the baseline SAE that is nearest to it in a measure of `Evaluation`."""
    baseline = baseline_of(evaluations)
    of_baseline = [name for name, found in evaluations.items() if found.objective == baseline]
    return {
        name: min(of_baseline, key=lambda other: _distance(evaluations, name, other, measure))
        for name, found in evaluations.items()
        if found.objective != baseline
    }


def similar_set(evaluations: Mapping[str, Evaluation], measure: str = "ce_loss_increase") -> list[str]:
    """One SAE of each objective, as near as can be in a measure; all SAEs, if they have one objective.

    To each baseline SAE belongs the nearest of each other objective; taken is the baseline SAE whose farthest is least far.
    """
    baseline = baseline_of(evaluations)
    others = [
        name for name in objective_order(str(found.objective) for found in evaluations.values()) if name != baseline
    ]
    if not others:
        return list(evaluations)
    sets = []
    for name, found in evaluations.items():
        if found.objective != baseline:
            continue
        chosen = [
            min(
                (other for other, one in evaluations.items() if one.objective == objective),
                key=lambda other: _distance(evaluations, name, other, measure),
            )
            for objective in others
        ]
        sets.append((max(_distance(evaluations, name, other, measure) for other in chosen), [name, *chosen]))
    return min(sets, key=lambda one: one[0])[1]


def spread(evaluations: Mapping[str, Evaluation], names: list[str], measure: str = "ce_loss_increase") -> float:
    """How many times the largest value among some SAEs is the smallest."""
    values = [getattr(evaluations[name], measure) for name in names]
    return factor(max(values), min(values))


def _distance(evaluations: Mapping[str, Evaluation], name: str, other: str, measure: str) -> tuple[float, float]:
    a, b = (getattr(evaluations[one], measure) for one in (name, other))
    # SAEs that cost nothing, or less, have no ratio; among them the difference decides.
    return factor(a, b), abs(a - b)
