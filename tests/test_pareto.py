"""Fronts against their definition, and comparisons at equal cost against curves whose ratio is known."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sae_lens_e2e.studies.pareto import (
    HEADLINE,
    compare_at_equal,
    comparison_frame,
    headline,
    pareto,
    sentence,
)


def frame_of(points: dict[str, list[tuple[float, float]]], **columns: Any) -> pd.DataFrame:
    """SAEs at (L0, CE increase) by objective."""
    rows = [
        {"sae": f"{objective}-{i}", "objective": objective, "l0": l0, "ce_loss_increase": ce}
        for objective, of_objective in points.items()
        for i, (l0, ce) in enumerate(of_objective)
    ]
    defaults = {"n_alive": 100, "d_sae": 128, "kl": 0.1, "hook_name": "blocks.1.hook_resid_pre", "model_name": "tiny"}
    return pd.DataFrame(rows).assign(**(defaults | columns))


def power_law(costs: tuple[float, float] = (2.0, 1.0)) -> pd.DataFrame:
    """CE increase c / L0, c being one for each objective; no L0 is in both."""
    return frame_of(
        {
            "local": [(l0, costs[0] / l0) for l0 in (5.0, 10.0, 20.0, 40.0)],
            "e2e": [(l0, costs[1] / l0) for l0 in (4.0, 9.0, 16.0, 30.0)],
        }
    )


def test_the_front_is_what_no_other_of_the_group_beats() -> None:
    rng = np.random.default_rng(0)
    spread = {name: rng.integers(0, (10, 3), (40, 2)) for name in ("a", "b")}
    points = {name: [(float(x), float(9 - x + y)) for x, y in drawn] for name, drawn in spread.items()}
    frame = frame_of(points).sample(frac=1, random_state=0)
    found = pareto(frame)
    expected = []
    for _, row in frame.iterrows():
        rivals = frame[(frame.objective == row.objective) & (frame.sae != row.sae)]
        no_worse = (rivals.l0 <= row.l0) & (rivals.ce_loss_increase <= row.ce_loss_increase)
        better = (rivals.l0 < row.l0) | (rivals.ce_loss_increase < row.ce_loss_increase)
        if not (no_worse & better).any():
            expected.append(row.sae)
    assert sorted(found.sae) == sorted(expected)
    assert 2 < len(expected) < 40
    assert found.duplicated(["objective", "l0", "ce_loss_increase"]).any(), "two equal SAEs do not beat each other"
    for _, rows in found.groupby("objective"):
        assert rows.l0.is_monotonic_increasing
        assert rows.ce_loss_increase.is_monotonic_decreasing
    assert list(found) == list(frame)


def test_other_axes_and_groups() -> None:
    frame = frame_of({"local": [(10, 0.3), (20, 0.1)]}, n_alive=[50, 40], kl=[0.2, 0.4], kind=["x", "y"])
    assert list(pareto(frame, x="n_alive").sae) == ["local-1"]
    assert list(pareto(frame, y="kl").sae) == ["local-0"]
    assert len(pareto(frame, y="kl", group="kind")) == 2
    unnamed = frame.assign(objective=None)
    assert set(pareto(unnamed).objective) == {"unknown"}


@pytest.mark.parametrize(("measure", "equal"), [("l0", "ce_loss_increase"), ("ce_loss_increase", "l0")])
def test_power_laws_are_interpolated_exactly(measure: str, equal: str) -> None:
    found = compare_at_equal(power_law(), "e2e", measure=measure, equal=equal)
    assert found.points
    for point in found.points:
        assert point.ratio == pytest.approx(0.5, rel=1e-12)
        assert point.baseline == pytest.approx(2 / point.value, rel=1e-12)
        assert point.other == pytest.approx(1 / point.value, rel=1e-12)
    assert found.at_median is not None
    assert found.at_median.ratio == pytest.approx(0.5, rel=1e-12)


def test_it_is_compared_at_the_baselines_own_points_inside_the_overlap() -> None:
    found = compare_at_equal(power_law(), "e2e")
    # local covers 0.05 to 0.4, e2e 1/30 to 0.25.
    assert (found.low, found.high) == (0.05, 0.25)
    assert [point.value for point in found.points] == [0.05, 0.1, 0.2]
    assert found.at_median == found.points[1]
    assert sentence(found) == "At a CE loss increase of 0.1 nats, e2e has 0.50 times the L0 of local."
    back = compare_at_equal(power_law(), "local", "e2e", equal="l0", measure="ce_loss_increase")
    assert [point.value for point in back.points] == [9.0, 16.0, 30.0]
    assert sentence(back) == "At an L0 of 16, local has 2.00 times the CE loss increase of e2e."


def test_where_the_baseline_has_no_point_inside_the_others_count() -> None:
    frame = frame_of({"local": [(8, 0.4), (32, 0.1)], "e2e": [(10, 0.25), (20, 0.15)]})
    found = compare_at_equal(frame, "e2e")
    assert [point.value for point in found.points] == [0.15, 0.25]
    # On local's straight line in logarithms L0 is 3.2 / CE.
    assert [point.ratio for point in found.points] == pytest.approx([20 * 0.15 / 3.2, 10 * 0.25 / 3.2])
    assert found.at_median is not None
    assert found.at_median.value == pytest.approx(0.2)
    assert len(comparison_frame([found])) == 3


def test_outside_the_range_is_said_and_never_extrapolated() -> None:
    found = compare_at_equal(power_law(), "e2e", at=[0.01, 0.1, 0.3])
    assert [point.ratio for point in found.points] == [None, pytest.approx(0.5), None]
    assert found.points[0].reason == "outside the range of both, CE loss increase 0.05 to 0.25 nats"
    assert found.points[2].other is None
    assert found.points[2].baseline == pytest.approx(2 / 0.3)
    assert found.at_median == found.points[1]
    nowhere = compare_at_equal(power_law(), "e2e", at=[9.0])
    assert nowhere.at_median is None
    assert sentence(nowhere) == (
        "e2e and local cannot be compared in L0 at equal CE loss increase: outside the range of both, CE loss increase 0.05 to "
        "0.25 nats."
    )


def test_curves_that_do_not_overlap_and_single_points() -> None:
    apart = frame_of({"local": [(5, 0.9), (9, 0.5)], "e2e": [(5, 0.3), (9, 0.1)], "e2e_ds": [(7, 0.6), (8, 0.7)]})
    found = compare_at_equal(apart, "e2e", at=[0.4])
    assert found.at_median is None
    assert found.points[0].ratio is None
    assert found.reason == (
        "outside the range: e2e covers CE loss increase 0.1 to 0.3 nats and local covers CE loss increase 0.5 to 0.9 nats"
    )
    alone = compare_at_equal(apart, "e2e_ds")
    assert (alone.points, alone.at_median) == ((), None)
    assert alone.reason == "the front of e2e_ds is a single point, which cannot be interpolated"
    rows = comparison_frame([alone])
    assert rows.reason.item() == alone.reason
    assert rows.ratio.isna().item()


def test_without_logarithms_where_a_value_is_not_positive() -> None:
    frame = frame_of({"local": [(10, 0.4), (20, 0.2), (30, -0.1)], "e2e": [(10, 0.3), (30, -0.2)]})
    found = compare_at_equal(frame, "e2e", measure="ce_loss_increase", equal="l0")
    at_20 = found.points[1]
    # Linear in CE, logarithmic in L0.
    share = np.log(20 / 10) / np.log(30 / 10)
    assert at_20.other == pytest.approx(0.3 - 0.5 * share)
    at_30 = found.points[2]
    assert (at_30.ratio, at_30.baseline) == (None, pytest.approx(-0.1))
    assert at_30.reason == "CE loss increase of local is -0.1 there, of which no ratio can be taken"


def test_alive_features_are_read_along_the_front_of_l0_and_cost() -> None:
    # All of local's features are alive, so that among n_alive and CE its front is one point.
    frame = power_law().assign(n_alive=[128, 128, 128, 128, 32, 48, 64, 96])
    assert len(pareto(frame.loc[frame.objective == "local"], x="n_alive")) == 1
    found = compare_at_equal(frame, "e2e", measure="n_alive")
    by_value = {point.value: point for point in found.points}
    assert by_value[0.1].baseline == pytest.approx(128)
    # At CE 0.1 e2e has L0 10, between 9 and 16.
    share = np.log(10 / 9) / np.log(16 / 9)
    assert by_value[0.1].other == pytest.approx(48 ** (1 - share) * 64**share)


def test_the_papers_own_numbers() -> None:
    # Braun et al. (2024), tables 2 and 3, layer 6: local needs more than twice the features for the same cost.
    frame = frame_of({"local": [(69.4, 0.144), (42.8, 0.228)], "e2e": [(27.5, 0.145), (39.7, 0.099)]})
    found = compare_at_equal(frame, "e2e").at_median
    assert found is not None
    assert found.value == 0.144
    assert found.ratio == pytest.approx(27.7 / 69.4, abs=2e-3)
    assert compare_at_equal(frame, "e2e", measure="ce_loss_increase", equal="l0").reason is not None


def test_headline_goes_through_the_groups() -> None:
    frame = pd.concat([power_law(), frame_of({"e2e_ds": [(3, 0.5), (30, 0.05)]})], ignore_index=True)
    found = headline(frame)
    assert [(one.other, one.measure, one.equal) for one in found] == [
        (other, *pair) for other in ("e2e", "e2e_ds") for pair in HEADLINE
    ]
    for one in found:
        assert one == compare_at_equal(frame, one.other, measure=one.measure, equal=one.equal)
    rows = comparison_frame(found)
    assert rows.loc[rows.is_median].groupby(["other", "measure"]).size().tolist() == [1] * 6
    assert json.loads(json.dumps(found[0].to_dict()))["points"][0]["ratio"] == found[0].points[0].ratio
    assert headline(power_law().head(4)) == ()


def test_one_axis_may_be_another_cost() -> None:
    frame = power_law().assign(kl=lambda rows: 3 * rows.ce_loss_increase)
    found = compare_at_equal(frame, "e2e", equal="kl", front=("l0", "kl"))
    assert [point.ratio for point in found.points] == pytest.approx([0.5] * 3)
    assert sentence(found).startswith("At a KL divergence of 0.3 nats, e2e has 0.50 times the L0")
    with pytest.raises(ValueError, match=r"equal='kl' is no axis of front=.*give a front with it"):
        compare_at_equal(frame, "e2e", equal="kl")


@pytest.mark.parametrize("column", ["hook_name", "model_name"])
def test_saes_of_different_hooks_or_models_are_refused(column: str) -> None:
    frame = power_law()
    frame.loc[5, column] = "another"
    for compare in (pareto, headline, lambda frame: compare_at_equal(frame, "e2e")):
        with pytest.raises(
            ValueError, match=rf"different {column} cannot be compared: 'local-0' has .* 'e2e-1' has 'an"
        ):
            compare(frame)
    frame[column] = None
    frame.loc[0, column] = "known"
    assert len(pareto(frame)) == 8


def test_errors_say_what_to_do() -> None:
    frame = power_law()
    with pytest.raises(ValueError, match=r"no column l0, model_name; give what evaluation_frame gives"):
        pareto(frame.drop(columns=["l0", "model_name"]))
    with pytest.raises(ValueError, match="no rows; evaluate at least one SAE"):
        pareto(frame.head(0))
    with pytest.raises(ValueError, match="ce_loss_increase of sae 'local-2' is not a finite number"):
        pareto(frame.assign(ce_loss_increase=[0.3, 0.2, np.nan, *[0.1] * 5]))
    with pytest.raises(ValueError, match="sae 'same' is there twice"):
        pareto(frame.assign(sae="same"))
    with pytest.raises(ValueError, match="no objective 'e2e_ds' to compare; there are local, e2e"):
        compare_at_equal(frame, "e2e_ds")
    with pytest.raises(ValueError, match="other='local' is the baseline itself"):
        compare_at_equal(frame, "local")
    with pytest.raises(ValueError, match="no objective 'base' to compare with; there are local, e2e"):
        headline(frame, baseline="base")


def seeded(costs: dict[str, list[float]]) -> pd.DataFrame:
    """Two SAEs a group and seed, of L0 10 and 20; the second costs half of the first."""
    rows = [
        {"sae": f"{group}{seed}{l0}", "objective": group, "seed": seed, "l0": l0, "ce_loss_increase": cost * 10 / l0}
        for group, of_group in costs.items()
        for seed, cost in enumerate(of_group)
        for l0 in (10.0, 20.0)
    ]
    return pd.DataFrame(rows).assign(hook_name="h", model_name="m")


@pytest.mark.parametrize(("costs", "beyond"), [([0.4, 0.5, 0.6], True), ([0.7, 0.9, 1.0], False), ([0.5], None)])
def test_a_difference_is_held_against_the_range_over_seeds(costs: list[float], beyond: bool | None) -> None:
    frame = seeded({"local": [0.9, 1.0, 1.1], "e2e": costs})
    found = compare_at_equal(frame, "e2e", measure="ce_loss_increase", equal="l0", at=[10.0, 20.0])
    for point, part in zip(found.points, (1.0, 0.5), strict=True):
        assert point.baseline == pytest.approx(1.0 * part)
        assert point.other == pytest.approx(sum(costs) / len(costs) * part)
        assert point.ratio == pytest.approx(sum(costs) / len(costs))
        assert point.beyond_seeds is beyond
        assert point.baseline_range == pytest.approx((0.9 * part, 1.1 * part))
        assert point.other_range == (
            pytest.approx((min(costs) * part, max(costs) * part)) if beyond is not None else None
        )
    words = {True: "a difference larger than the seeds", False: "no larger than the seeds", None: "of local."}
    assert words[beyond] in sentence(found)
    rows = comparison_frame([found])
    assert list(rows["baseline_high"][:2]) == pytest.approx([1.1, 0.55])


def test_seeds_that_have_not_all_sparsities_share_a_front() -> None:
    frame = seeded({"local": [0.9, 1.0], "e2e": [0.5, 0.4]}).drop(index=[3, 7])
    found = compare_at_equal(frame, "e2e", measure="ce_loss_increase", equal="l0", at=[10.0])
    assert found.points[0].other == pytest.approx(0.4)
    assert found.points[0].beyond_seeds is None
