"""Stages: each the run that one would have made by hand, one history, resumed to the last bit, in sweeps, joint runs and the CLI."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
import yaml
from sae_lens import SAE, LoggingConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from sae_lens_e2e import (
    E2E,
    Batch,
    E2EDownstream,
    E2EMultiTrainingRunner,
    E2ERunnerConfig,
    E2ETrainingRunner,
    KLAndMSE,
    Local,
    Objective,
    Schedule,
    Stage,
    Stages,
    Term,
)
from sae_lens_e2e.cli import main
from sae_lens_e2e.cli.train import parse_train
from sae_lens_e2e.loading import load_documents, load_model
from sae_lens_e2e.publishing.model_card import model_card
from sae_lens_e2e.splice import Site, SplicedModel
from sae_lens_e2e.sweep import read_sweep, run_sweep
from sae_lens_e2e.training.objective_state import FILENAME
from sae_lens_e2e.training.stages import WARM_UNTIL, objective_of
from tests.models import dataset_of, random_model, random_tokens
from tests.test_sweep import BASE, assert_same_weights, read_history, single, sweep_file
from tests.training import (
    EVERY_STEP,
    group_gradients,
    make_multi_runner,
    make_runner,
    make_trainer,
    multi_config,
    runner_config,
)

STEP, N_STEPS, N_PROMPTS = 48, 12, 4
ROWS = random_tokens(N_STEPS * N_PROMPTS, 12, 61)
EARLY, LATE = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
TOPK = TopKTrainingSAEConfig(d_in=16, d_sae=128, k=2)
STANDARD = StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02, l1_warm_up_steps=0)

Weights = dict[str, Tensor]


def settings(**overrides: Any) -> dict[str, Any]:
    return {
        "lr": 1e-2,
        "training_tokens": N_STEPS * STEP,
        "dead_feature_window": 1,
        "logger": EVERY_STEP,
        **overrides,
    }


def weights_of(sae: Any) -> Weights:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def assert_equal(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# By hand: a run for each stage

Run = tuple[int, int, dict[str, Any]]
"""A run made by hand: the step it begins with, the one after its last, and its settings."""

BY_HAND: dict[str, tuple[Sequence[Stage], list[Run]]] = {
    "local, then end to end": (
        [Stage("local", until=7 / 12), Stage("e2e_ds", lr=3e-3)],
        [(0, 7, {"objective": "local"}), (7, 12, {"objective": "e2e_ds", "lr": 3e-3})],
    ),
    "warm": (
        "warm_kl_mse",  # pyright: ignore[reportAssignmentType]
        [(0, 5, {"objective": "local"}), (5, 12, {"objective": "kl_mse"})],
    ),
    "schedules of their own": (
        [
            Stage("local", until=0.5, lr_warm_up_steps=3, lr_decay_steps=2),
            Stage("e2e", lr=5e-3, lr_scheduler_name="cosineannealing", lr_warm_up_steps=2),
        ],
        [
            (0, 6, {"objective": "local", "lr_warm_up_steps": 3, "lr_decay_steps": 2}),
            (6, 12, {"objective": "e2e", "lr": 5e-3, "lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 2}),
        ],
    ),
    "three, one remembering": (
        [Stage("e2e", until=0.25), Stage(KLAndMSE(alpha_decay=0.9), until=0.5), Stage(KLAndMSE(alpha_decay=0.9))],
        [
            (0, 3, {"objective": "e2e"}),
            (3, 6, {"objective": KLAndMSE(alpha_decay=0.9)}),
            (6, 12, {"objective": KLAndMSE(alpha_decay=0.9)}),
        ],
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_each_stage_is_a_run_of_its_own_from_the_one_before(case: str) -> None:
    stages, runs = BY_HAND[case]
    runner = make_runner(runner_config(sae=TOPK, objective=stages, **settings()), dataset=dataset_of(ROWS))
    staged = runner.make_group()
    with runner.splice.running():
        staged.fit()

    sae, dead, history = None, None, []
    for begin, end, overrides in runs:
        cfg = runner_config(sae=TOPK, **(settings(training_tokens=(end - begin) * STEP) | overrides))
        rows = ROWS[begin * N_PROMPTS : end * N_PROMPTS]
        by_hand = make_runner(cfg, dataset=dataset_of(rows), sae=sae)
        group = by_hand.make_group()
        if dead is not None:
            # A second run does not know which features are dead; a stage does.
            group.first.n_forward_passes_since_fired = dead
        with by_hand.splice.running():
            group.fit()
        sae, dead = by_hand.sae, group.first.n_forward_passes_since_fired
        history += [(row["losses/overall_loss"], row["details/current_learning_rate"]) for row in group.history]
    assert_equal(weights_of(runner.sae), weights_of(sae))
    ours = [(row["losses/overall_loss"], row["details/current_learning_rate"]) for row in staged.history]
    assert ours == history
    numbers = [number for number, (begin, end, _) in enumerate(runs) for _ in range(begin, end)]
    assert [row["details/stage"] for row in staged.history] == numbers


def test_stages_of_a_joint_run_are_joint_runs() -> None:
    def config(**overrides: Any) -> Any:
        saes = {"a": (Site.of_sae(EARLY), copy.deepcopy(STANDARD)), "b": (Site.of_sae(LATE), copy.deepcopy(STANDARD))}
        return multi_config(saes, **settings(**overrides))

    def run(rows: Tensor, saes: Any = None, **overrides: Any) -> dict[str, Any]:
        runner = E2EMultiTrainingRunner(
            config(**overrides), override_dataset=dataset_of(rows), override_model=random_model(), override_saes=saes
        )
        return dict(runner.run())

    staged = run(ROWS, objective=[Stage("local", until=0.5, lr=2e-2), Stage("e2e")])
    first = run(ROWS[: 6 * N_PROMPTS], objective="local", training_tokens=6 * STEP, lr=2e-2)
    second = run(ROWS[6 * N_PROMPTS :], first, objective="e2e", training_tokens=6 * STEP)
    for name in ("a", "b"):
        assert_equal(weights_of(staged[name]), weights_of(second[name]))
        assert staged[name].cfg.metadata.objective["name"] == "warm_e2e"


def test_one_stage_is_the_run_it_always_was(tmp_path: Path) -> None:
    runs = {"plain": "e2e_ds", "staged": [Stage("e2e_ds")]}
    for name, objective in runs.items():
        paths = {"output_path": str(tmp_path / name), "checkpoint_path": str(tmp_path / name / "c"), "n_checkpoints": 1}
        make_runner(runner_config(objective=objective, **settings(**paths)), dataset=dataset_of(ROWS)).run()
    tables = {name: pd.read_csv(tmp_path / name / "history.csv").drop(columns="details/seconds") for name in runs}
    pd.testing.assert_frame_equal(tables["plain"], tables["staged"])
    assert not list(tmp_path.rglob(FILENAME))
    assert_equal(*(load_file(tmp_path / name / "sae_weights.safetensors") for name in runs))


def test_the_warm_up_of_sparsity_is_not_made_again() -> None:
    sae = StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.5, l1_warm_up_steps=8)
    group = make_runner(
        runner_config(sae=sae, objective="warm_e2e", **settings()), dataset=dataset_of(ROWS)
    ).make_group()
    with group.model.running():
        group.fit()
    found = [row["details/l1_coefficient"] for row in group.history]
    assert found == pytest.approx([0.5 * min((step + 1) / 8, 1) for step in range(N_STEPS)])


# What runs


def test_a_local_stage_runs_nothing_past_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    spliced: list[int] = []
    original = SplicedModel.spliced

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        spliced.append(1)
        return original(self, *args, **kwargs)

    model = random_model()
    cfg = runner_config(objective="warm_e2e_ds", hook_name=EARLY, **settings())
    group = make_runner(cfg, model, dataset_of(ROWS)).make_group()
    monkeypatch.setattr(SplicedModel, "spliced", counted)
    blocks: list[int] = []
    model.blocks[2].register_forward_hook(lambda *_: blocks.append(1))
    counts = []
    with group.model.running():
        for step in range(6):
            spliced.clear()
            blocks.clear()
            group.step(ROWS[step * N_PROMPTS : (step + 1) * N_PROMPTS])
            counts.append((len(spliced), len(blocks)))
    # Two forward passes a step; the last block runs clean and spliced.
    assert counts == [(0, 0)] * 5 + [(2, 4)]
    assert group.objective.hooks == ("blocks.2.hook_resid_pre",)


# Resuming

RESUMED = {"before": 7 / 12, "at": 5 / 12, "after": 3 / 12}


@pytest.mark.parametrize("several", [False, True], ids=["one", "joint"])
@pytest.mark.parametrize("border", RESUMED)
def test_a_run_goes_on_bit_for_bit_wherever_the_border_is(border: str, several: bool, tmp_path: Path) -> None:
    stages = [
        Stage("local", until=RESUMED[border], lr_warm_up_steps=2),
        Stage(KLAndMSE(alpha_decay=0.9), lr=3e-3, lr_scheduler_name="cosineannealing", lr_warm_up_steps=1),
    ]

    def run(name: str, **overrides: Any) -> None:
        given = settings(
            objective=stages,
            output_path=str(tmp_path / name),
            checkpoint_path=str(tmp_path / f"{name}-checkpoints"),
            n_checkpoints=2,
            **overrides,
        )
        if several:
            sites = {"a": (Site.of_sae(EARLY), copy.deepcopy(TOPK)), "b": (Site.of_sae(LATE), copy.deepcopy(TOPK))}
            make_multi_runner(multi_config(sites, **given)).run()
        else:
            make_runner(runner_config(sae=TOPK, **given), dataset=dataset_of(ROWS)).run()

    run("whole")
    (checkpoint,) = (tmp_path / "whole-checkpoints").rglob("240")
    run("resumed", resume_from_checkpoint=str(checkpoint))
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert files
    for file in files:
        assert_equal(load_file(tmp_path / "whole" / file), load_file(tmp_path / "resumed" / file))
    for file in (tmp_path / "whole").rglob("history.csv"):
        tables = [pd.read_csv(tmp_path / name / file.relative_to(tmp_path / "whole")) for name in ("whole", "resumed")]
        seconds = [column for column in tables[0] if str(column).endswith("details/seconds")]
        whole, resumed = (table.drop(columns=seconds) for table in tables)
        pd.testing.assert_frame_equal(whole, resumed, check_exact=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """After 5 of 12 steps, of which 3 were local."""
    folder = tmp_path_factory.mktemp("staged")
    cfg = runner_config(
        objective=[Stage("local", until=0.25, lr_warm_up_steps=2), Stage("e2e", lr_warm_up_steps=3)],
        **settings(checkpoint_path=str(folder), n_checkpoints=2),
    )
    make_runner(cfg, dataset=dataset_of(ROWS)).run()
    return str(next(iter(folder.rglob("240"))))


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "one objective": ({"objective": "e2e"}, r"objective\.name='e2e', .* with 'warm_e2e'"),
    "another second": (
        {"objective": [Stage("local", until=0.25), Stage(E2E(mse_coefficient=1.0))]},
        r"objective\.stages\[1\]\.objective\.mse_coefficient=1\.0, .* 0\.0",
    ),
    "more stages": (
        {"objective": [Stage("local", until=0.25), Stage("e2e", until=0.5), Stage("e2e")]},
        r"objective\.name='local-then-e2e-then-e2e'",
    ),
    "a border that has moved past it": (
        {"objective": [Stage("local", until=0.5), Stage("e2e")]},
        r"is of stage 1 \(e2e\), and by training_tokens and until its 5 steps would end in stage 0 \(local\)",
    ),
    "more tokens, so that it would be local again": (
        {"objective": [Stage("local", until=0.25), Stage("e2e")], "training_tokens": 2 * N_STEPS * STEP},
        r"would end in stage 0 \(local\); set these so that they end in stage 1",
    ),
}


@pytest.mark.parametrize("other", OTHER)
def test_a_run_does_not_go_on_with_other_stages(other: str, checkpoint: str) -> None:
    overrides, message = OTHER[other]
    with pytest.raises(ValueError, match=message) as error:
        make_runner(runner_config(resume_from_checkpoint=checkpoint, **settings(**overrides))).run()
    assert "\n" not in str(error.value)


def test_a_run_that_goes_on_may_have_another_rate_and_end_later(checkpoint: str, tmp_path: Path) -> None:
    # Before there were two parts to each schedule, and now one.
    stages = [Stage("local", until=0.125), Stage("e2e", lr=1e-5)]
    given = settings(objective=stages, training_tokens=2 * N_STEPS * STEP, output_path=str(tmp_path))
    make_runner(runner_config(resume_from_checkpoint=checkpoint, **given), dataset=dataset_of(ROWS)).run()
    table = pd.read_csv(tmp_path / "history.csv")
    assert len(table) == 2 * N_STEPS
    assert table["details/current_learning_rate"].tolist()[5:] == [1e-5] * (2 * N_STEPS - 5)
    assert table["details/stage"].tolist() == [0] * 3 + [1] * (2 * N_STEPS - 3)


# What is written, and read back


def test_settings_survive_json() -> None:
    stages = Stages((Stage(Local(0.5), until=0.3, lr=1e-2), Stage(E2E(kl_coefficient=[(0.3, 1), (1, 2)]), lr_end=0.0)))
    recorded = json.loads(json.dumps(stages.to_dict()))
    assert recorded["name"] == stages.name == "warm_e2e"
    assert objective_of(recorded) == objective_of(recorded["stages"]) == objective_of(list(stages.stages)) == stages
    cfg = runner_config(objective=stages, **settings(logger=LoggingConfig(log_to_wandb=False)))
    again: Any = E2ERunnerConfig.from_dict(json.loads(json.dumps(cfg.to_dict(), default=str)))
    assert again.objective == stages
    assert again.to_dict()["objective"] == cfg.to_dict()["objective"]
    assert cfg.logger.run_name is not None
    assert cfg.logger.run_name.startswith("warm_e2e-")


def test_an_sae_says_what_it_was_trained_on(tmp_path: Path) -> None:
    cfg = runner_config(objective="warm_e2e_ds", **settings(output_path=str(tmp_path)))
    make_runner(cfg, dataset=dataset_of(ROWS)).run()
    objective = SAE.load_from_disk(tmp_path).cfg.metadata.objective
    assert objective["name"] == "warm_e2e_ds"
    first, second = objective["stages"]
    assert (first["objective"]["name"], first["until"], second["lr"]) == ("local", WARM_UNTIL, None)
    assert second["objective"]["downstream_hooks"] == ["blocks.2.hook_resid_pre"]
    card = model_card("me/saes", {"sae": json.loads((tmp_path / "cfg.json").read_text())})
    assert "warm_e2e_ds" in card
    assert "stages[0].until" in card


def test_warm_is_a_local_start_before_any_objective() -> None:
    made = objective_of("warm_e2e_ds")
    assert made == Stages((Stage("local", until=WARM_UNTIL), Stage("e2e_ds")))
    given = {"name": "warm_e2e", "until": 0.2, "lr": 1e-3, "lr_warm_up_steps": 5, "kl_coefficient": 2.0}
    assert objective_of(given) == Stages(
        (Stage("local", until=0.2), Stage(E2E(kl_coefficient=2.0), lr=1e-3, lr_warm_up_steps=5))
    )
    names = {
        "warm_ce": ["local", "ce"],
        "local-then-e2e-then-ce": ["local", "e2e", "ce"],
        "e2e-then-local": ["e2e", "local"],
    }
    for name, objectives in names.items():
        ends = [(i + 1) / len(objectives) for i in range(len(objectives))]
        assert Stages(tuple(Stage(one, until=end) for one, end in zip(objectives, ends, strict=True))).name == name


def test_the_command_line_takes_stages_and_a_file_does(tmp_path: Path) -> None:
    flags = ["--d_in", "16", "--d_sae", "32", "--hook_name", "blocks.1.hook_resid_pre", "--log_to_wandb", "false"]
    stages = [{"objective": "local", "until": 0.7}, {"objective": {"name": "e2e", "kl_coefficient": 2}, "lr": 1e-2}]
    wanted = Stages((Stage("local", until=0.7), Stage(E2E(kl_coefficient=2), lr=1e-2)))
    cfg, *_ = parse_train([*flags, "--objective", json.dumps(stages)])
    assert cfg.objective == wanted
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"hook_name": EARLY, "sae": {"d_in": 16, "d_sae": 32}, "objective": stages}))
    cfg, *_ = parse_train(["--config", str(file)])
    assert cfg.objective == wanted
    again = tmp_path / "runner_cfg.json"
    again.write_text(json.dumps(cfg.to_dict()))
    assert parse_train(["--config", str(again)])[0].objective == wanted
    assert parse_train([*flags, "--objective", "warm_kl_mse"])[0].objective == objective_of("warm_kl_mse")


def test_the_command_line_says_what_is_wrong_and_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--d_in", "16", "--d_sae", "32", "--hook_name", "blocks.1.hook_resid_pre"]
    assert main([*flags, "--objective", '[{"objective": "local", "until": 0.7}]']) == 2
    assert "objective.stages[0].until=0.7: the last stage must end at 1" in capsys.readouterr().err
    assert main(["objectives"]) == 0
    assert "warm_NAME" in capsys.readouterr().out


# Sweeps


def test_points_in_different_stages_are_the_runs_they_are_alone(tmp_path: Path) -> None:
    stages = [{"objective": "local", "until": 0.5}, {"objective": "e2e", "lr": 0.001}]
    grid = {"objective": [stages, {"name": "warm_e2e_ds", "until": 0.7}, "local"]}
    sweep = read_sweep(sweep_file(tmp_path, grid, BASE | {"logger": {"log_to_wandb": False, "wandb_log_frequency": 1}}))
    assert [point.name for point in sweep.points] == [
        "local-until=0.5-then-e2e-lr=0.001",
        "warm_e2e_ds-until=0.7",
        "local",
    ]
    frame = run_sweep(sweep, tmp_path / "together")
    assert frame["objective"].tolist() == ["warm_e2e", "warm_e2e_ds", "local"]
    documents, _ = load_documents("embedded")
    model = load_model("embedded")
    for point in sweep.points:
        cfg = single(point, tmp_path / "alone" / point.name)
        E2ETrainingRunner(cfg, override_dataset=documents, override_model=model).run()
        assert_same_weights(tmp_path / "together" / point.name, tmp_path / "alone" / point.name)
        ours, theirs = (read_history(tmp_path / folder / point.name) for folder in ("together", "alone"))
        pd.testing.assert_frame_equal(pd.DataFrame(ours), pd.DataFrame(theirs), check_exact=True)


# Coefficients that change


def test_a_schedule_is_linear_between_its_points() -> None:
    schedule = Schedule([(0.25, 1), (0.5, 3.0), (0.75, 0)])
    values = {0: 1, 0.25: 1, 0.375: 2, 0.5: 3, 0.625: 1.5, 0.75: 0, 1: 0}
    assert {fraction: schedule.at(fraction) for fraction in values} == values
    assert all(isinstance(schedule.at(fraction), float) for fraction in values)
    assert Schedule([(0.5, 2)]).at(0.1) == Schedule([(0.5, 2)]).at(0.9) == 2
    assert Schedule(((0.5, 2),)) == Schedule([[0.5, 2]])  # pyright: ignore[reportArgumentType]
    assert len({Schedule([(0, 1), (1, 2)]), Schedule([(0, 1), (1, 2)])}) == 1


def test_an_objective_has_its_coefficients_of_the_moment() -> None:
    objective = E2EDownstream(kl_coefficient=[(0, 0.0), (1, 1.0)], downstream_coefficient=2.0)
    assert objective.at(0.25) == E2EDownstream(kl_coefficient=0.25, downstream_coefficient=2.0)
    plain = Local()
    assert plain.at(0.3) is plain
    assert E2E(kl_coefficient=Schedule([(0, 1), (1, 2)])) == E2E(kl_coefficient=[(0, 1), (1, 2)])
    assert objective.to_dict()["kl_coefficient"] == [[0, 0.0], [1, 1.0]]
    assert objective_of(json.loads(json.dumps(objective.to_dict()))) == objective


def test_a_run_goes_by_the_fraction_that_is_done() -> None:
    points = [(0.25, 1.0), (0.75, 0.0)]
    runner = make_runner(runner_config(objective=E2E(mse_coefficient=points), **settings()), dataset=dataset_of(ROWS))
    group = runner.make_group()
    with group.model.running():
        group.fit()
    by_hand = [min(max(1 - (step / N_STEPS - 0.25) / 0.5, 0), 1) for step in range(N_STEPS)]
    assert [row["details/mse_loss_coefficient"] for row in group.history] == pytest.approx(by_hand)


def test_the_gradient_is_that_of_the_coefficients_of_the_moment() -> None:
    scheduled = make_trainer(make_runner(runner_config(objective=E2E(mse_coefficient=[(0, 0), (1, 12)]), **settings())))
    with scheduled.group.model.running():
        for step in range(3):
            tokens = ROWS[step * N_PROMPTS : (step + 1) * N_PROMPTS]
            fixed = make_trainer(make_runner(runner_config(objective=E2E(mse_coefficient=float(step)), **settings())))
            fixed.sae.load_state_dict(scheduled.sae.state_dict())
            with fixed.group.model.running():
                expected = group_gradients(fixed.group, tokens)["sae"]
            found = group_gradients(scheduled.group, tokens)["sae"]
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)
            scheduled.step(tokens)


# What cannot be meant


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ([], r"objective=\[\] has no stages"),
        ([Stage("local", until=0.5)], r"stages\[0\]\.until=0\.5: the last stage must end at 1"),
        (
            [Stage("local", until=0.5), Stage("e2e", until=0.9)],
            r"stages\[1\]\.until=0\.9: the last stage must end at 1",
        ),
        (
            [Stage("local", until=0.5), Stage("ce", until=0.4), Stage("e2e")],
            r"stages\[1\]\.until=0\.4 must be above 0\.5",
        ),
        ([Stage("local"), Stage("e2e")], r"stages\[1\]\.until=1\.0 must be above 1, where it begins"),
        ([Stage("local", until=0.0), Stage("e2e")], r"stages\[0\]\.until=0\.0 must be above 0"),
        ([Stage("local", until=1.5)], r"stages\[0\]\.until=1\.5 must be .* at most 1"),
        ([Stage("local", until=float("nan")), Stage("e2e")], r"stages\[0\]\.until=nan must be above 0"),
        ([Stage("local", until="0.5"), Stage("e2e")], r"stages\[0\]\.until='0\.5' must be a number"),  # pyright: ignore[reportArgumentType]
        (
            [Stage("local", until=0.5), Stage("e2e", until=0.51), Stage("ce")],
            r"stages\[1\].*of the 12 steps .* has none",
        ),
        ([Stage("local", until=0.01), Stage("e2e")], r"stages\[0\]\.until=0\.01: of the 12 steps .*; train on more"),
        ([Stage("local", until=0.5, lr=0.0), Stage("e2e")], r"stages\[0\]\.lr=0\.0 must be above 0"),
        ([Stage("local", until=0.5), Stage("e2e", lr=-1e-3)], r"stages\[1\]\.lr=-0\.001 must be a finite number"),
        (
            [Stage("local", until=0.5), Stage("e2e", lr="1e-3")],  # pyright: ignore[reportArgumentType]
            r"stages\[1\]\.lr='1e-3' must be a number .*; write 0\.001",
        ),
        ([Stage("local", until=0.5, lr_warm_up_steps=7), Stage("e2e")], r"lr_warm_up_steps=7 .* more than the 6 steps"),
        ([Stage("local", until=0.5, lr_warm_up_steps=-1), Stage("e2e")], r"lr_warm_up_steps=-1 must be at least 0"),
        (
            [Stage("e2e", lr_scheduler_name="cosineannealing", lr_end=0.0, lr_decay_steps=2)],
            r"stages\[0\]\.lr_scheduler_name='cosineannealing': Cannot have decay_steps with lr_end=0\.0",
        ),
        (
            [Stage("local", until=0.5), Stage("e2e", lr_scheduler_name="cosine")],
            r"stages\[1\]\.lr_scheduler_name='cosine' must be one of constant",
        ),
        ([{"objective": "e3e"}], r"'e3e' is not installed; .* did you mean 'e2e'"),
        ([{"objective": "local", "untill": 0.4}], r"a stage has no setting 'untill'; it has objective, until, lr"),
        (["local", "e2e"], r"'local' is no stage; write a Stage, or its settings"),
        ({"name": "warm_e3e"}, r"'warm_e3e' is not installed"),
        ({"name": "warm_e2e", "kl": 1}, r"objective 'e2e' has no setting 'kl'"),
        ({"name": "warm_e2e", "until": 1.5}, r"stages\[0\]\.until=1\.5 must be above 0"),
        ({"name": "e2e", "stages": [{"objective": "local"}]}, r"name='e2e', but these stages are 'local'"),
        ({"stages": [{"objective": "local"}], "lr": 1}, r"'lr' is no setting of stages"),
        ({"stages": 3}, r"stages=3 must be a list"),
    ],
    ids=str,
)
def test_stages_that_cannot_be_meant_are_refused_at_construction(objective: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        runner_config(objective=objective, **settings())
    assert "\n" not in str(error.value)


def test_every_stage_is_checked_against_the_model() -> None:
    stages = [Stage("local", until=0.5), Stage(E2EDownstream(downstream_hooks=("blocks.7.hook_resid_pre",)))]
    with pytest.raises(ValueError, match=r"downstream_hooks.*blocks\.7\.hook_resid_pre"):
        make_runner(runner_config(objective=stages, **settings()))
    with pytest.raises(ValueError, match=r"no block comes after"):
        make_runner(runner_config(objective="warm_e2e_ds", hook_name="blocks.2.hook_resid_post", **settings()))
    with pytest.raises(ValueError, match=r"downstream_hooks: blocks\.0\.hook_resid_pre is not downstream"):
        runner_config(
            objective=[Stage("local", until=0.5), Stage(E2EDownstream(downstream_hooks=("blocks.0.hook_resid_pre",)))],
            **settings(),
        )


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], r"e2e: kl_coefficient=.* must be points \(fraction, value\), at least one"),
        ([1, 2], r"1 is no point; write \(fraction, value\)"),
        ([(0, 1, 2)], r"\(0, 1, 2\) is no point"),
        ([(0, "1")], r"\(0, '1'\) is no point"),
        ([(0, float("inf"))], r"is no point"),
        ([(0, True)], r"is no point"),
        ([(-0.1, 1)], r"the fraction -0\.1 must be between 0 and 1"),
        ([(0, 1), (1.1, 1)], r"the fraction 1\.1 must be between 0 and 1"),
        ([(0, -1)], r"the value -1 must not be negative"),
        ([(0.5, 1), (0.5, 2)], r"the fractions \[0\.5, 0\.5\] must rise"),
        ([(0, 0), (1, 1)], r"kl_coefficient, mse_coefficient are all 0 at the fraction 0 of training, .*; raise one"),
        ([(0, 1), (0.5, 0), (0.6, 0), (1, 1)], r"are all 0 at the fraction 0\.5 of training"),
    ],
    ids=str,
)
def test_schedules_that_cannot_be_meant_are_refused(points: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        E2E(kl_coefficient=points)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        objective_of({"name": "e2e", "kl_coefficient": points})


@dataclass(frozen=True)
class Doubled(Objective):
    """A plugin's, which reckons with its coefficient."""

    name: ClassVar[str] = "doubled"
    compares_logits: ClassVar[bool] = False
    mse_coefficient: float = 1.0

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        return {"mse_loss": Term(2 * self.mse_coefficient, lambda: batch.mse_loss)}


def test_a_plugins_coefficient_may_change_too() -> None:
    points: Any = [(0, 1), (1, 13)]
    group = make_runner(runner_config(objective=Doubled(points), **settings()), dataset=dataset_of(ROWS)).make_group()
    with group.model.running():
        group.fit()
    assert [row["details/mse_loss_coefficient"] for row in group.history] == pytest.approx(
        [2 * (1 + i) for i in range(12)]
    )
