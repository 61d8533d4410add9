"""Fair comparisons: learning rates tuned on documents that are not reported, and budgets that match."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from sae_lens_e2e import E2E, E2ETrainingRunner
from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.evaluation import evaluate
from sae_lens_e2e.loading import load_documents, load_model, validation_documents
from sae_lens_e2e.sweep import Sweep, Tune, failures, read_sweep, run_sweep
from sae_lens_e2e.sweep.budgets import matched
from sae_lens_e2e.sweep.equal_l0 import costs, differ_in_l0, slope
from sae_lens_e2e.sweep.tuning import read_tuning, tuned
from sae_lens_e2e.training.prompts import PromptBatches
from tests.test_sweep import BASE as WITH_LR
from tests.test_sweep import EVALUATION, assert_same_weights, single, weights

BASE = {key: value for key, value in WITH_LR.items() if key != "lr"}
RATES = [1e-4, 1e-2]


def sweep_of(folder: Path, grid: Any, base: Mapping[str, Any] = BASE, **sections: Any) -> Sweep:
    path = folder / "fair.yaml"
    path.write_text(yaml.safe_dump({"base": dict(base), "grid": grid, "evaluation": EVALUATION} | sections))
    return read_sweep(path)


def trained(point: Any, folder: Path, documents: Any, **settings: Any) -> Any:
    """The SAE of a point in a run of its own."""
    cfg = single(type(point)(point.name, {**point.settings, **settings}), folder)
    return E2ETrainingRunner(cfg, override_dataset=documents, override_model=load_model("embedded")).run()


def test_the_validation_documents_are_neither_trained_on_nor_reported() -> None:
    training, reported = load_documents("embedded")
    rows, chosen_by = validation_documents("embedded")
    assert len(rows) + len(chosen_by) == len(training)  # pyright: ignore[reportArgumentType]
    assert [*rows, *chosen_by] == list(training)
    assert len(chosen_by) == pytest.approx(len(training) / 10, abs=1)  # pyright: ignore[reportArgumentType]
    kept, scored = (set(map(tuple, documents["input_ids"])) for documents in (reported, chosen_by))
    assert scored
    assert not scored & kept


def test_each_kind_gets_the_learning_rate_that_costs_least_and_is_bit_for_bit_a_run_with_it(tmp_path: Path) -> None:
    grid = {"objective": ["local", "e2e"], "seed": [0, 1]}
    sweep, out = sweep_of(tmp_path, grid, tune={"lr": RATES}), tmp_path / "out"
    frame = run_sweep(sweep, out)
    assert list(frame["sae"]) == [point.name for point in sweep.points]
    training, chosen_by = validation_documents("embedded")
    choices = read_tuning(out)
    assert set(choices) == {"local", "e2e"}
    for name, choice in choices.items():
        first = next(point for point in sweep.points if point.name == f"{name}-seed=0")
        for candidate in choice["candidates"]:
            # What a candidate is, done by hand.
            sae = trained(first, tmp_path / f"{name}{candidate['lr']}", training, lr=candidate["lr"])
            by_hand = evaluate(sae, load_model("embedded"), chosen_by, **EVALUATION)
            assert candidate["ce_loss_increase"] == pytest.approx(by_hand.ce_loss_increase, rel=1e-6)
            assert candidate["l0"] == pytest.approx(by_hand.l0, rel=1e-6)
        best = min(choice["candidates"], key=lambda one: one["ce_loss_increase"])
        assert choice["lr"] == best["lr"]
    documents, _ = load_documents("embedded")
    for point in sweep.points:
        lr = choices[point.name.rpartition("-")[0]]["lr"]
        trained(point, tmp_path / "alone" / point.name, documents, lr=lr)
        assert_same_weights(out / point.name, tmp_path / "alone" / point.name)
    assert not (out / "tuning").exists()


# JumpReLU SAEs on a small model, by sparsity coefficient: (L0, CE loss increase) at two learning rates.
SLOWER = [(87.5, 0.0467), (78.6, 0.0545), (75.1, 0.062), (78.1, 0.0625)]
FASTER = [(42.4, 0.0599), (26.0, 0.1025), (18.8, 0.141), (13.0, 0.1967)]


def scores(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"l0": l0, "ce_loss_increase": cost} for l0, cost in points]


def test_what_l0_is_worth_is_how_the_cost_falls_at_one_learning_rate() -> None:
    # Two curves of cost = c / L0^1.5, of which one is twice the other.
    curves = [scores(*((l0, c / l0**1.5) for l0 in (4, 8, 20))) for c in (1, 2)]
    assert slope(curves) == pytest.approx(1.5)
    assert slope([scores((8, 0.2)), scores((16, 0.1))]) is None
    assert slope([scores((8, 0.1), (16, 0.2))]) == 0


def test_what_costs_less_only_because_more_fires_is_no_better() -> None:
    steepness = slope([scores(*SLOWER), scores(*FASTER)])
    for slower, faster in zip(scores(*SLOWER), scores(*FASTER), strict=True):
        assert slower["ce_loss_increase"] < faster["ce_loss_increase"]
        at_equal_l0 = costs({4e-3: slower, 1e-2: faster}, steepness)
        assert at_equal_l0[1e-2] < at_equal_l0[4e-3]
    # Where all have one L0, or it is not known, a cost is what was measured.
    assert costs({4e-3: scores((16, 0.3))[0], 1e-2: scores((16.3, 0.2))[0]}, steepness) == {4e-3: 0.3, 1e-2: 0.2}
    assert costs({1.0: {"ce_loss_increase": 0.3}}, steepness) == {1.0: 0.3}
    assert differ_in_l0(scores(*SLOWER)) == (75.1, 87.5)


def test_candidates_are_compared_at_equal_l0(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The sparsities of a sweep say what L0 is worth; one alone says nothing, and is told of."""
    tune, out = {"lr": [1e-3, 1e-2]}, tmp_path / "out"
    sweep = sweep_of(tmp_path, {"objective": ["local"], "sae.l1_coefficient": [0.1, 1.0]}, tune=tune)
    run_sweep(sweep, out)
    choices = read_tuning(out)
    by_rate = [[choice["candidates"][i] for choice in choices.values()] for i in range(2)]
    steepness = slope(by_rate)
    for choice in choices.values():
        cost = costs({one["lr"]: one for one in choice["candidates"]}, steepness)
        assert choice["lr"] == min(cost, key=lambda lr: cost[lr])
    assert "differ in L0" not in caplog.text
    alone = sweep_of(tmp_path, {"objective": ["local"], "sae.l1_coefficient": [1.0]}, tune=tune)
    run_sweep(alone, tmp_path / "alone")
    assert "its candidates differ in L0" in caplog.text


def test_a_choice_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    tune = {"lr": RATES, "fraction": 0.5}
    run_sweep(sweep_of(tmp_path, {"objective": "local", "seed": [0]}, tune=tune), out)
    before, steps = (out / "tuning.json").read_bytes(), 0
    original = PromptBatches.__next__

    def counted(self: PromptBatches) -> Any:
        nonlocal steps
        steps += 1
        return original(self)

    monkeypatch.setattr(PromptBatches, "__next__", counted)
    frame = run_sweep(sweep_of(tmp_path, {"objective": "local", "seed": [0, 1]}, tune=tune), out)
    # Of the new seed alone: six steps of its own.
    assert (len(frame), steps) == (2, 6)
    assert (out / "tuning.json").read_bytes() == before
    assert weights(out / "local-seed=0").keys() == weights(out / "local-seed=1").keys()
    # Three steps of candidates of another kind, together, and six of the point.
    run_sweep(sweep_of(tmp_path, [{"objective": "local", "seed": [0, 1]}, {"objective": "e2e"}], tune=tune), out)
    assert steps == 6 + 3 + 6
    with pytest.raises(ValueError, match=r"learning rate of local that was chosen with other settings \(tune.lr\)"):
        run_sweep(sweep_of(tmp_path, {"objective": "local", "seed": 0}, tune=tune | {"lr": [1e-3, 1e-2]}), out)


@pytest.mark.parametrize("after", [3, 9])
def test_an_interrupted_tuning_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the candidates, and among the points after them."""
    sweep = sweep_of(tmp_path, {"objective": "local"}, tune={"lr": RATES})
    run_sweep(sweep, tmp_path / "whole")
    original, batches = PromptBatches.__next__, 0

    def interrupted(self: PromptBatches) -> Any:
        nonlocal batches
        batches += 1
        self.interrupted = batches == after + 1
        return original(self)

    monkeypatch.setattr(PromptBatches, "__next__", interrupted)
    out = tmp_path / "interrupted"
    with pytest.raises(InterruptedException):
        run_sweep(sweep, out)
    assert (out / "tuning.json").exists() == (after > 6)
    run_sweep(sweep, out)
    assert batches == 1 + 6 + 6
    assert read_tuning(out) == read_tuning(tmp_path / "whole")
    for point in sweep.points:
        assert_same_weights(out / point.name, tmp_path / "whole" / point.name)


def test_a_candidate_that_fails_is_not_chosen_and_if_all_do_the_points_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep = sweep_of(tmp_path, {"objective": ["local"]}, tune={"lr": [1e-3, 1e30]})
    assert len(run_sweep(sweep, out)) == 1
    choice = read_tuning(out)["local"]
    assert choice["lr"] == 1e-3
    assert "NonFiniteLossError" in choice["candidates"][1]["failed"]
    bad = sweep_of(tmp_path, {"objective": ["local", "e2e"], "sae.d_in": 32}, tune={"lr": RATES})
    assert len(run_sweep(bad, tmp_path / "bad")) == 0
    reasons = failures(tmp_path / "bad", [point.name for point in bad.points])
    assert len(reasons) == 2
    assert all("no learning rate could be chosen" in one and "d_in=32 does not fit" in one for one in reasons.values())


def test_equal_flops_pays_cheaper_objectives_in_tokens(tmp_path: Path) -> None:
    grid = {"objective": ["local", "warm_e2e", "e2e"]}
    base = WITH_LR | {"training_tokens": 64 * 100}
    sweep = matched(sweep_of(tmp_path, grid, base, equal="flops"), tmp_path)
    tokens = [point.settings["training_tokens"] for point in sweep.points]
    assert tokens[2] == 6400
    assert tokens[0] > tokens[1] > 6400
    assert all(count % 64 == 0 for count in tokens)
    same = matched(sweep_of(tmp_path, grid, base, equal="tokens"), tmp_path)
    assert [point.settings["training_tokens"] for point in same.points] == [6400] * 3
    # The metadata of what is trained then say so, to a step.
    small = sweep_of(tmp_path, {"objective": ["local", "e2e"]}, WITH_LR | {"training_tokens": 64 * 8}, equal="flops")
    run_sweep(small, tmp_path / "out")
    metadata = [
        json.loads((tmp_path / "out" / point.name / "cfg.json").read_text())["metadata"] for point in small.points
    ]
    local, e2e = (one["training_flops"] for one in metadata)
    assert metadata[1]["training_tokens"] == 64 * 8
    assert math.isclose(local, e2e, rel_tol=0.5 / 8)


def test_points_of_other_training_tokens_are_matched_apart(tmp_path: Path) -> None:
    grid = {"objective": ["local", "e2e"], "training_tokens": [64 * 100, 64 * 200]}
    sweep = matched(sweep_of(tmp_path, grid, WITH_LR, equal="flops"), tmp_path)
    tokens = {point.name: point.settings["training_tokens"] for point in sweep.points}
    assert tokens["e2e-training_tokens=6400"] == 6400
    assert tokens["local-training_tokens=12800"] == pytest.approx(2 * tokens["local-training_tokens=6400"], abs=64)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tune": {"lr": [0.1]}}, r"tune: lr=\[0.1\] must be a list of two or more different numbers above 0"),
        ({"tune": {"lr": [0.1, -1]}}, "tune: lr="),
        ({"tune": {}}, "tune: lr="),
        ({"tune": {"lr": RATES, "fraction": 2}}, "tune: fraction=2 must be a number above 0, at most 1"),
        ({"tune": {"lr": RATES, "validation": 0}}, "tune: validation=0 must be a number above 0"),
        ({"tune": {"lr": RATES, "k": [1]}}, "tune 'k' is unknown"),
        ({"tune": {"lr": RATES}, "base": WITH_LR}, "lr=0.003 is given, and tune chooses it"),
        ({"tune": {"lr": RATES}, "grid": {"lr": [0.1, 0.2]}}, "lr=0.1 is given, and tune chooses it"),
        (
            {"tune": {"lr": RATES}, "grid": {"objective": [[{"objective": "local", "lr": 0.1}]]}},
            "every stage has an lr of its own",
        ),
        (
            {"tune": {"lr": RATES, "fraction": 0.2}, "grid": {"objective": "warm_e2e"}},
            "point warm_e2e-lr=0.0001: .*until",
        ),
        ({"equal": "time"}, "equal: 'time' must be one of tokens, flops"),
    ],
)
def test_what_is_no_fair_comparison_is_said_before_anything_runs(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = {"base": BASE, "grid": {"seed": [0]}} | sections
    with pytest.raises(ValueError, match=message) as error:
        sweep_of(tmp_path, **content)
    assert "\n" not in str(error.value)


def test_a_damaged_choice_is_said(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"seed": [0]}, tune={"lr": RATES})
    (tmp_path / "tuning.json").write_text('{"only": {"lr"')
    with pytest.raises(ValueError, match=r"tuning.json is damaged .*; remove it to tune again"):
        run_sweep(sweep, tmp_path)
    assert sweep.tune == Tune(tuple(RATES))
    assert isinstance(validation_documents("embedded", part=0.5)[1], Dataset)
    with pytest.raises(ValueError, match="is damaged"):
        tuned(sweep, tmp_path)


def test_equal_flops_refuses_an_objective_that_does_not_say_its_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(E2E, "logit_products", None)
    with pytest.raises(ValueError, match=r"objective 'e2e' .*does not say its logit_products") as error:
        sweep_of(tmp_path, {"objective": ["local", "warm_e2e"]}, WITH_LR, equal="flops")
    assert "\n" not in str(error.value)
