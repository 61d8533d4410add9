"""Sweeps: what a file means, one clean pass for many SAEs, and going on where it stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from sae_lens import SAE
from safetensors.torch import load_file

from sae_lens_e2e import E2EDownstream, E2EMultiRunnerConfig, E2EMultiTrainingRunner, E2ERunnerConfig, E2ETrainingRunner
from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.evaluation.files import read_together
from sae_lens_e2e.loading import load_documents, load_model
from sae_lens_e2e.output import locked
from sae_lens_e2e.splice import SplicedModel
from sae_lens_e2e.sweep import Point, failures, read_sweep, run_sweep
from sae_lens_e2e.sweep.run import groups
from sae_lens_e2e.training import history
from sae_lens_e2e.training.prompts import PromptBatches

BASE: dict[str, Any] = {
    "model_name": "embedded",
    "dataset_path": "embedded",
    "hook_name": "blocks.3.hook_resid_pre",
    "context_size": 16,
    "store_batch_size_prompts": 2,
    "train_batch_size_tokens": 64,
    "training_tokens": 64 * 6,
    "lr": 0.003,
    "verbose": False,
    "logger": {"log_to_wandb": False, "wandb_log_frequency": 2},
    "sae": {"architecture": "standard", "d_in": 64, "d_sae": 96, "l1_coefficient": 0.1},
}
EVALUATION = {"max_tokens": 256, "batch_size_prompts": 4}


def sweep_file(folder: Path, grid: Any, base: Mapping[str, Any] = BASE, **sections: Any) -> Path:
    path = folder / "stories.yaml"
    path.write_text(yaml.safe_dump({"base": dict(base), "grid": grid, "evaluation": EVALUATION} | sections))
    return path


def single(point: Point, folder: Path) -> E2ERunnerConfig[Any]:
    """The config of a point of one SAE."""
    cfg = point.config(folder)
    assert isinstance(cfg, E2ERunnerConfig)
    return cfg


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """All but how long it took."""
    rows = history.read_history(folder)
    for row in rows:
        assert row.pop("details/seconds") > 0
    return rows


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_grid_is_every_combination_within_each_mapping(tmp_path: Path) -> None:
    grid = [
        {"objective": ["e2e", {"name": "e2e_ds", "downstream_coefficient": 4.0}], "sae.l1_coefficient": [0.1, 0.2]},
        {"objective": "local", "sae.l1_coefficient": 1.0, "seed": [0, 1]},
    ]
    sweep = read_sweep(sweep_file(tmp_path, grid))
    assert sweep.name == "stories"
    assert [point.name for point in sweep.points] == [
        "e2e-l1_coefficient=0.1",
        "e2e-l1_coefficient=0.2",
        "e2e_ds-downstream_coefficient=4.0-l1_coefficient=0.1",
        "e2e_ds-downstream_coefficient=4.0-l1_coefficient=0.2",
        "local-l1_coefficient=1.0-seed=0",
        "local-l1_coefficient=1.0-seed=1",
    ]
    cfg = single(sweep.points[3], tmp_path / "point")
    assert cfg.objective == E2EDownstream(downstream_coefficient=4.0)
    assert cfg.sae.l1_coefficient == 0.2
    assert cfg.output_path == str(tmp_path / "point")
    assert sweep.points[5].config(tmp_path).seed == 1


PAPERS = {"local", "e2e", "e2e_ds"}
WARM = {"local", "e2e", "e2e_ds", "kl_mse", "warm_e2e", "warm_e2e_ds", "warm_kl_mse"}
EXAMPLES = {
    "pareto": PAPERS,
    "stories260k": PAPERS,
    **dict.fromkeys(("warm", "warm_batchtopk", "warm_jumprelu", "warm_standard"), WARM),
    "stories15m": {"local", "warm_e2e_ds"},
}


@pytest.mark.parametrize(
    "example", sorted((Path(__file__).parent.parent / "examples").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_examples_have_each_objective_at_as_many_points(example: Path, tmp_path: Path) -> None:
    sweep = read_sweep(example)
    at_least = 1 if example.stem == "stories15m" else 3
    names = [point.config(tmp_path).objective.to_dict()["name"] for point in sweep.points]  # pyright: ignore[reportAttributeAccessIssue]
    assert {name: names.count(name) >= at_least for name in names} == dict.fromkeys(EXAMPLES[example.stem], True)


def test_an_architecture_can_be_an_axis(tmp_path: Path) -> None:
    base = BASE | {"sae": {"d_in": 64, "d_sae": 128}}
    sweep = read_sweep(sweep_file(tmp_path, {"sae.architecture": ["standard", "topk", "apollo"]}, base))
    assert [single(point, tmp_path).sae.architecture() for point in sweep.points] == ["standard", "topk", "apollo"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grid": {"seed": [0]}}, "needs a 'base' and a 'grid'"),
        ({"base": BASE, "grid": {"seeds": [0]}}, "setting 'seeds' is unknown"),
        ({"base": BASE, "grid": {"sae.l1": [0]}}, "sae 'l1' is unknown"),
        ({"base": BASE, "grid": {"seed": []}}, "grid: seed has no values"),
        ({"base": BASE, "grid": {"seed": [0]}, "evaluate": {}}, "section 'evaluate' is unknown"),
        ({"base": BASE, "grid": {"seed": [0]}, "evaluation": {"tokens": 1}}, "evaluation 'tokens' is unknown"),
        ({"base": BASE, "grid": {"seed": [0]}, "evaluation": {"held_out": 1.5}}, "held_out=1.5 is no part"),
        ({"base": BASE, "grid": [{"seed": 0}, {"seed": 0}]}, "point seed=0 is there twice"),
        ({"base": BASE, "grid": {"objective": ["e3e"]}}, "point e3e: .*'e3e'"),
        ({"base": BASE, "grid": {"train_batch_size_tokens": [100]}}, "train_batch_size_tokens=100 is not a whole"),
        ({"base": BASE | {"sae": {"d_in": 64}}, "grid": {"seed": 0}}, "'sae' needs an 'architecture'"),
        ({"base": BASE | {"sae": 3}, "grid": {"seed": 0}}, "'sae' needs an 'architecture'"),
    ],
)
def test_what_a_sweep_file_has_wrong_is_said_before_anything_runs(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message) as error:
        read_sweep(path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("base: [")
    with pytest.raises(ValueError, match="neither YAML nor JSON"):
        read_sweep(tmp_path / "bad.yaml")


def test_points_share_a_pass_wherever_they_sit_unless_model_data_or_batches_differ(tmp_path: Path) -> None:
    grid = {"hook_name": ["blocks.2.hook_resid_pre", "blocks.3.hook_resid_pre"], "seed": [0, 1], "lr": [0.1, 0.2]}
    sweep = read_sweep(sweep_file(tmp_path, grid))
    configs = {point.name: point.config(tmp_path) for point in sweep.points}
    assert [len(group) for group in groups(configs)] == [8]
    assert [len(group) for group in groups(configs, together=3)] == [3, 3, 2]
    apart = [{"context_size": 8, "seed": 0}, {"seed": [0, 1]}, {"max_grad_norm": 2.0}]
    sweep = read_sweep(sweep_file(tmp_path, apart))
    assert [len(group) for group in groups({p.name: p.config(tmp_path) for p in sweep.points})] == [1, 2, 1]
    with pytest.raises(ValueError, match="together=0"):
        groups(configs, together=0)


def test_each_point_is_bit_for_bit_what_a_run_by_itself_gives(tmp_path: Path) -> None:
    grid = [
        {"objective": ["local", "e2e", "e2e_ds"], "seed": [0, 1]},
        {"objective": "e2e", "training_tokens": 64 * 4, "lr": 0.001},
    ]
    sweep = read_sweep(sweep_file(tmp_path, grid))
    frame = run_sweep(sweep, tmp_path / "together")
    assert list(frame["sae"]) == [point.name for point in sweep.points]
    documents, _ = load_documents("embedded")
    for point in sweep.points:
        cfg = single(point, tmp_path / "alone" / point.name)
        E2ETrainingRunner(cfg, override_dataset=documents, override_model=load_model("embedded")).run()
        assert_same_weights(tmp_path / "together" / point.name, tmp_path / "alone" / point.name)
        log = read_history(tmp_path / "together" / point.name)
        assert log == read_history(tmp_path / "alone" / point.name)
        assert len(log) == cfg.training_tokens // 64 // 2


def test_architectures_and_normalisation_train_together_too(tmp_path: Path) -> None:
    base = BASE | {
        "n_batches_for_norm_estimate": 2,
        "sae": {"d_in": 64, "d_sae": 96, "normalize_activations": "expected_average_only_in"},
    }
    grid = [{"sae.architecture": ["topk", "batchtopk"], "sae.k": 8}, {"sae.architecture": "gated"}]
    sweep = read_sweep(sweep_file(tmp_path, grid, base))
    # SAELens estimates the scale from activations in random order.
    torch.manual_seed(0)
    run_sweep(sweep, tmp_path / "together")
    documents, _ = load_documents("embedded")
    for point in sweep.points:
        cfg = single(point, tmp_path / "alone" / point.name)
        torch.manual_seed(0)
        E2ETrainingRunner(cfg, override_dataset=documents, override_model=load_model("embedded")).run()
        assert_same_weights(tmp_path / "together" / point.name, tmp_path / "alone" / point.name)


def test_the_clean_pass_runs_once_for_all_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"clean": 0, "spliced": 0}
    for name in calls:
        original = getattr(SplicedModel, name)

        def counted(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(SplicedModel, name, counted)
    passes = {}
    for n in (1, 4):
        calls.update(clean=0, spliced=0)
        sweep = read_sweep(sweep_file(tmp_path, {"objective": "e2e", "seed": list(range(n))}))
        run_sweep(sweep, tmp_path / str(n))
        passes[n] = dict(calls)
    n_batches = 256 // (4 * 16)
    # 6 steps of 2 forward passes, and the evaluation; before either, each point is tried on a few tokens.
    assert passes[1]["clean"] == 12 + n_batches + 4
    assert passes[4]["clean"] == 12 + n_batches + 4 * 4
    assert passes[4]["spliced"] - passes[1]["spliced"] == 3 * (12 + n_batches + 2)


def test_a_finished_point_is_never_run_again_and_a_new_one_is_added(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweep(read_sweep(sweep_file(tmp_path, {"seed": [0]})), out)
    before = {file: file.stat().st_mtime_ns for file in (out / "seed=0").iterdir()}
    frame = run_sweep(read_sweep(sweep_file(tmp_path, {"seed": [0, 1]})), out)
    assert before == {file: file.stat().st_mtime_ns for file in (out / "seed=0").iterdir()}
    assert list(frame["sae"]) == ["seed=0", "seed=1"]
    assert SAE.load_from_disk(out / "seed=1").cfg.metadata.objective["name"] == "e2e_ds"


def test_a_folder_with_other_settings_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweep(read_sweep(sweep_file(tmp_path, {"seed": [0]})), out)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(lr: 0.003, now 0.1\)"):
        run_sweep(read_sweep(sweep_file(tmp_path, {"seed": [1, 0]}, BASE | {"lr": 0.1})), out)
    assert not (out / "seed=1").exists()


def test_a_point_that_fails_is_reported_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    grid = [{"objective": "local", "seed": 0}, {"lr": 1e30}, {"sae.d_in": 32}]
    out = tmp_path / "out"
    sweep = read_sweep(sweep_file(tmp_path, grid))
    frame = run_sweep(sweep, out)
    assert list(frame["sae"]) == ["local-seed=0"]
    failed = failures(out, [point.name for point in sweep.points])
    assert set(failed) == {"lr=1e_30" if "lr=1e_30" in failed else "lr=1e+30", "d_in=32"}
    assert "d_in=32 does not fit" in failed["d_in=32"]
    assert any("NonFiniteLossError" in reason for reason in failed.values())
    assert not list(out.glob("*/sae_weights.safetensors"))[1:]


def test_a_model_that_is_not_there_fails_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sweep = read_sweep(sweep_file(tmp_path, {"dataset_path": ["embedded", str(tmp_path / "none.jsonl")]}))
    frame = run_sweep(sweep, tmp_path / "out")
    assert len(frame) == 1
    assert len(failures(tmp_path / "out", [point.name for point in sweep.points])) == 1


def test_an_interrupted_sweep_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read_sweep(sweep_file(tmp_path, {"objective": ["local", "e2e_ds"]}))
    run_sweep(sweep, tmp_path / "whole")
    original = PromptBatches.__next__
    batches = 0

    def interrupted_after_three(self: PromptBatches) -> torch.Tensor:
        nonlocal batches
        batches += 1
        self.interrupted = batches == 4
        return original(self)

    monkeypatch.setattr(PromptBatches, "__next__", interrupted_after_three)
    out = tmp_path / "interrupted"
    with pytest.raises(InterruptedException):
        run_sweep(sweep, out)
    assert {path.name for path in out.glob("*/checkpoints/*")} == {str(3 * 64)}
    run_sweep(sweep, out)
    assert batches == 4 + 3
    for point in sweep.points:
        assert_same_weights(out / point.name, tmp_path / "whole" / point.name)
        assert read_history(out / point.name) == read_history(tmp_path / "whole" / point.name)
        assert not (out / point.name / "checkpoints").exists()


def test_points_of_other_documents_are_of_another_sweep(tmp_path: Path) -> None:
    run_sweep(read_sweep(sweep_file(tmp_path, {"seed": [0]})), tmp_path / "out")
    other = read_sweep(sweep_file(tmp_path, {"seed": [0, 1]}, evaluation={"held_out": 0.4}))
    with pytest.raises(ValueError, match=r"seed=0 holds a run with other settings \(held_out: 0.1, now 0.4\)"):
        run_sweep(other, tmp_path / "out")


def test_a_sweep_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, {"seed": [0]}))
    with locked(tmp_path / "out"), pytest.raises(BlockingIOError, match="is at work in"):
        run_sweep(sweep, tmp_path / "out")


def test_an_evaluation_that_failed_is_made_up_without_training_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    failing = read_sweep(sweep_file(tmp_path, {"seed": [0]}, evaluation={"batch_size_prompts": 10**6}))
    assert len(run_sweep(failing, out)) == 0
    assert "batch_size_prompts" in failures(out, ["seed=0"])["seed=0"]
    trained = weights(out / "seed=0")
    monkeypatch.setattr(PromptBatches, "__next__", lambda _: pytest.fail("trained again"))
    frame = run_sweep(read_sweep(sweep_file(tmp_path, {"seed": [0]})), out)
    assert len(frame) == 1
    assert failures(out, ["seed=0"]) == {}
    for name, tensor in weights(out / "seed=0").items():
        assert torch.equal(tensor, trained[name])


def test_each_point_is_a_wandb_run_in_the_sweeps_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Its client reads the environment once in the life of a process, unless it is told to forget it.
    wandb.teardown()
    started: list[Any] = []
    original = wandb.init

    def init(**settings: Any) -> Any:
        started.append(settings)
        return original(**settings)

    monkeypatch.setattr(wandb, "init", init)
    base = BASE | {"logger": {"log_to_wandb": True, "wandb_project": "stories", "wandb_log_frequency": 2}}
    sweep = read_sweep(sweep_file(tmp_path, {"seed": [0, 1]}, base, name="my_sweep"))
    run_sweep(sweep, tmp_path / "out")
    wandb.teardown()
    # They are begun at the same time.
    assert sorted((s["project"], s["group"], s["name"]) for s in started) == [
        ("stories", "my_sweep", "seed=0"),
        ("stories", "my_sweep", "seed=1"),
    ]
    recorded = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(recorded) == 2
    assert all(file.stat().st_size > 1000 for file in recorded)


def test_results_are_written_beside_the_points(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweep(read_sweep(sweep_file(tmp_path, {"seed": [0]})), out)
    header, row = (out / "results.csv").read_text().splitlines()
    assert header.startswith("sae,objective")
    assert read_sweep(out / "sweep.yaml").points == read_sweep(tmp_path / "stories.yaml").points
    assert row.startswith("seed=0,e2e_ds")
    evaluation = json.loads((out / "seed=0" / "evaluation.json").read_text())
    assert evaluation["n_tokens"] == 256
    assert {file.name for file in (out / "seed=0").iterdir()} == {
        *("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json"),
        *("history.csv", "evaluation.json"),
    }


JOINT: dict[str, Any] = {
    **{key: value for key, value in BASE.items() if key not in ("sae", "hook_name", "verbose")},
    "saes": {
        "early": {"architecture": "topk", "d_in": 64, "d_sae": 96, "k": 4},
        "late": {"architecture": "standard", "d_in": 64, "d_sae": 96, "l1_coefficient": 0.1},
    },
    "hook_names": {"early": "blocks.1.hook_resid_pre", "late": "blocks.3.hook_resid_pre"},
}


def test_points_of_several_saes_are_trained_on_the_same_pass_and_each_sae_is_evaluated(tmp_path: Path) -> None:
    sweep = read_sweep(
        sweep_file(tmp_path, {"objective": ["e2e", "local"], "saes.late.l1_coefficient": [0.1, 0.2]}, JOINT)
    )
    assert len(groups({point.name: point.config(tmp_path) for point in sweep.points})) == 1
    frame = run_sweep(sweep, tmp_path / "together")
    assert list(frame["sae"]) == [f"{point.name}/{name}" for point in sweep.points for name in ("early", "late")]
    documents, _ = load_documents("embedded")
    for point in sweep.points[:2]:
        cfg = point.config(tmp_path / "alone" / point.name)
        assert isinstance(cfg, E2EMultiRunnerConfig)
        E2EMultiTrainingRunner(cfg, override_dataset=documents, override_model=load_model("embedded")).run()
        for name in cfg.saes:
            ours, theirs = (tmp_path / folder / point.name / name for folder in ("together", "alone"))
            assert_same_weights(ours, theirs)
            assert read_history(ours) == read_history(theirs)
    found = read_together(tmp_path / "together" / sweep.points[0].name)
    assert found is not None
    assert [one.saes for one in found.together] == [("early",), ("early", "late")]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "together").glob("*/*/*")}
    run_sweep(sweep, tmp_path / "together")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "together").glob("*/*/*")}


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        ({"early": {"d_in": 64}}, "'early' needs an 'architecture'"),
        ({"early": {"architecture": "topk", "d_in": 64, "d_sae": 96, "l1": 1}}, "early 'l1' is unknown"),
        ([1], r"saes=\[1\] is not a mapping"),
    ],
)
def test_what_the_saes_of_a_joint_point_have_wrong(saes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_sweep(sweep_file(tmp_path, {"seed": 0}, JOINT | {"saes": saes}))


def test_a_sweep_logs_to_wandb_all_that_sae_lens_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, dict[int, set[str]]] = {}

    class Run:
        """What a run of the real client takes; the real one is tried above."""

        def __init__(self, **settings: Any) -> None:
            self.log_of = logged.setdefault(settings["name"], {})
            self.summary: dict[str, Any] = {}

        def log(self, figures: dict[str, Any], step: int) -> None:
            self.log_of.setdefault(step, set()).update(figures)

        def finish(self) -> None:
            pass

    monkeypatch.setattr(wandb, "init", Run)
    logger = {"log_to_wandb": True, "wandb_log_frequency": 2, "eval_every_n_wandb_logs": 2}
    base = BASE | {"logger": logger, "feature_sampling_window": 3, "n_eval_batches": 1, "eval_batch_size_prompts": 2}
    run_sweep(read_sweep(sweep_file(tmp_path, {"seed": [0, 1]}, base)), tmp_path / "out")
    assert set(logged) == {"seed=0", "seed=1"}
    for log in logged.values():
        # Six steps: every second is logged, every fourth evaluated, and the sparsity of each window of three.
        assert {step for step, names in log.items() if "losses/kl" in names} == {1, 3, 5}
        assert {step for step, names in log.items() if "metrics/mean_log10_feature_sparsity" in names} == {3, 6}
        assert {step for step, names in log.items() if "model_performance_preservation" in names} == {3}
