"""Run a sweep: a folder a point, finished points left alone, and points of one model, hook and data trained together."""

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from sae_lens import SAE, logger

from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.errors import kept_to, named_line
from sae_lens_e2e.evaluation import evaluate_each, evaluate_together, evaluation_frame
from sae_lens_e2e.evaluation.files import write_evaluation, write_together
from sae_lens_e2e.loading import HELD_OUT, load_documents, load_model, validation_documents
from sae_lens_e2e.loading.folder import load_folder
from sae_lens_e2e.output import check_writable, locked, written_whole
from sae_lens_e2e.splice import SplicedModel, device_of
from sae_lens_e2e.studies.seeds import SEED
from sae_lens_e2e.sweep import tuning
from sae_lens_e2e.sweep.budgets import matched
from sae_lens_e2e.sweep.folders import (
    CHECKPOINTS,
    FAILURE_FILENAME,
    check_same,
    checkpoints_in,
    clean,
    is_finished,
    is_trained,
    read_results,
    record_failure,
    saes_of,
)
from sae_lens_e2e.sweep.plan import AnyConfig, Sweep, Tune
from sae_lens_e2e.sweep.wandb_runs import UnheardRun, runs_of_ranks
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.loop import fit
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.multi_runner import E2EMultiTrainingRunner
from sae_lens_e2e.training.prompts import PromptBatches, interrupting
from sae_lens_e2e.training.ready import make_ready
from sae_lens_e2e.training.runner import E2ETrainingRunner
from sae_lens_e2e.training.setup import compilation, step_plan
from sae_lens_e2e.training.statistics import ESTIMATED
from sae_lens_e2e.training.step import OnFailure, reraise, standing
from sae_lens_e2e.training.wandb_run import WandbRun

AnyRunner = E2ETrainingRunner | E2EMultiTrainingRunner
LoadDocuments = Callable[[str, float], tuple[Any, Any]]
"""From a dataset's name and the part that is kept for evaluation to the documents to train on, and to evaluate on."""

RESULTS_FILENAME = "results.csv"
SWEEP_FILENAME = "sweep.yaml"

# What tells apart runs that cannot share a clean pass, or not the same prompts in the same step.
_SHARED = (
    *("model_name", "model_class_name", "model_kwargs", "model_from_pretrained_kwargs"),
    *("dataset_path", "dataset_trust_remote_code", "streaming", "context_size", "prepend_bos"),
    *("disable_concat_sequences", "sequence_separator_token", "use_chat_formatting", "exclude_special_tokens"),
    *("seqpos_slice", "store_batch_size_prompts", "train_batch_size_tokens", "max_grad_norm", "autocast_lm"),
    *("compile_llm", "llm_compilation_mode", "checkpoint_activations"),
    *("device", "llm_device", "act_store_device", "dtype", "n_batches_for_norm_estimate"),
)


def run_sweep(sweep: Sweep, output: str | Path, *, together: int | None = None) -> pd.DataFrame:
    """Train and evaluate every point of a sweep that is not finished, each into its own folder of `output`.

    At most `together` SAEs are in memory at once, by default all that can share a clean pass. A point that fails leaves a
    `failed.txt` that says why, and does not stop the others, nor does a file of it that is damaged; an interruption leaves
    checkpoints from which the same call goes on. Gives, and writes as `results.csv` beside the sweep itself, the evaluation of each
    finished point, with its seed, a row a point. Learning rates that the sweep wants tuned are chosen first, in `tuning.json`. Raises, before any work, ValueError if a folder holds a point with other settings,
    BlockingIOError if another process is at work on the sweep. Several ranks train together; rank 0 alone evaluates, and keeps the folders.
    """
    ranks.begin()
    if any(content != sweep.content for content in ranks.gathered(sweep.content)):
        raise ValueError("the ranks were given different sweeps; start all of them with the same file")
    ranks.first(lambda: check_writable(output))
    with ranks.on_first(lambda: locked(output), False):
        return _run_sweep(sweep, Path(output), together)


def _run_sweep(sweep: Sweep, output: Path, together: int | None) -> pd.DataFrame:
    sweep = ranks.first(lambda: matched(sweep, output))
    if sweep.tune is not None:
        sweep = _tuned(sweep, sweep.tune, output, together)
    frame = _run_points(sweep, output, together, load_documents)
    ranks.first(lambda: _write_results(sweep, frame, output))
    return frame


def _write_results(sweep: Sweep, frame: pd.DataFrame, output: Path) -> None:
    if len(frame):
        with written_whole(output) as folder:
            frame.to_csv(folder / RESULTS_FILENAME, index=False)
            (folder / SWEEP_FILENAME).write_text(yaml.safe_dump(dict(sweep.content), sort_keys=False))


def _tuned(sweep: Sweep, tune: Tune, output: Path, together: int | None) -> Sweep:
    """The sweep with a learning rate for each point, for which candidates are run unless that is done; without those that have none."""
    if names := ranks.first(lambda: tuning.undecided(sweep, output)):
        load = partial(validation_documents, part=tune.validation)
        _run_points(tuning.candidates(sweep, names, output), output / tuning.FOLDER, together, load)
        ranks.first(lambda: tuning.decide(sweep, names, output))
    chosen, failed = ranks.first(lambda: tuning.tuned(sweep, output))
    for name, reason in failed.items():
        record_failure(output, name, ValueError(reason))
    if not failed and ranks.is_first():
        shutil.rmtree(output / tuning.FOLDER, ignore_errors=True)
    return chosen


def _run_points(sweep: Sweep, output: Path, together: int | None, load: LoadDocuments) -> pd.DataFrame:
    """Train and evaluate the points that are not finished, and give the evaluations of those that are."""
    configs = {point.name: point.config(output / point.name) for point in sweep.points}
    todo = ranks.first(lambda: _unfinished(sweep, configs, output))
    for group in groups({name: configs[name] for name in todo}, together):
        _run_group(sweep, output, {name: configs[name] for name in group}, load)
    return ranks.first(lambda: _results(configs, output))


def _unfinished(sweep: Sweep, configs: Mapping[str, AnyConfig], output: Path) -> list[str]:
    """The points that are to be run, what killed runs left half-written of any being removed."""
    checked = {name: check_same(output / name, cfg, _held_out(sweep)) for name, cfg in configs.items()}
    for name, cfg in configs.items():
        clean(output / name, cfg)
    todo = {name: cfg for name, cfg in configs.items() if not is_finished(output, name, cfg)}
    logger.info(f"{len(configs) - len(todo)} of {len(configs)} points are finished")
    for name, damage in checked.items():
        if damage is not None and todo.pop(name, None) is not None:
            record_failure(output, name, ValueError(damage))
    return list(todo)


def _results(configs: Mapping[str, AnyConfig], output: Path) -> pd.DataFrame:
    seeds = {sae: cfg.seed for name, cfg in configs.items() for sae in saes_of(name, cfg)}
    results = read_results(output, list(seeds))
    return evaluation_frame(results).assign(**{SEED: [seeds[sae] for sae in results]})


def groups(configs: Mapping[str, AnyConfig], together: int | None = None) -> list[list[str]]:
    """The names of the runs that can be trained together, at most `together` in each list: on one clean pass, wherever they sit."""
    if together is not None and together < 1:
        raise ValueError(f"together={together} must be at least 1")
    by_key: dict[str, list[str]] = {}
    for name, cfg in configs.items():
        key = json.dumps([*(getattr(cfg, name) for name in _SHARED), _estimates(cfg)], default=str)
        by_key.setdefault(key, []).append(name)
    size = together or max(len(configs), 1)
    return [names[i : i + size] for names in by_key.values() for i in range(0, len(names), size)]


def _estimates(cfg: AnyConfig) -> list[Any]:
    """What is estimated of activations first, and where: it is read from the data, and moves them on."""
    several = isinstance(cfg, E2EMultiRunnerConfig)
    saes = cfg.saes if several else {"sae": cfg.sae}
    hooks = cfg.hook_names_per_sae if several else {"sae": cfg.hook_name}
    found = {name: sae.normalize_activations for name, sae in saes.items() if sae.normalize_activations in ESTIMATED}
    return [[hooks[name], normalize] for name, normalize in found.items()]


def _run_group(sweep: Sweep, output: Path, configs: Mapping[str, AnyConfig], load: LoadDocuments) -> None:
    fail = partial(record_failure, output)
    if ranks.is_first():
        for name in configs:
            (output / name / FAILURE_FILENAME).unlink(missing_ok=True)
    first = next(iter(configs.values()))
    try:
        make_ready(first, _held_out(sweep))
        with ranks.together():
            model, documents, held_out = _model_and_data(sweep, first, load)
            splice = SplicedModel(model, first.model_kwargs)
    except Exception as error:
        for name in configs:
            fail(name, error)
        return
    runners: dict[str, AnyRunner] = {}
    trained = ranks.first(lambda: [name for name, cfg in configs.items() if is_trained(output, name, cfg)])
    for name, cfg in configs.items():
        if name in trained:
            continue
        with kept_to(name, fail):
            runners[name] = runner_of(_without_wandb(cfg), documents, model, splice, _held_out(sweep))
    with runs_of_ranks(sweep.name, {name: configs[name] for name in runners}) as logged:
        if runners:
            trained += _train_group(splice, runners, logged, fail)
        ended = {name: configs[name] for name in trained}
        ranks.first(lambda: _evaluate_group(sweep, output, ended, model, held_out, logged, fail))


def runner_of(cfg: AnyConfig, dataset: Any, model: Any, splice: SplicedModel, held_out: float) -> AnyRunner:
    """The runner of a point, of one SAE or of several."""
    given: dict[str, Any] = {
        "override_dataset": dataset,
        "override_model": model,
        "splice": splice,
        "held_out": held_out,
    }
    if isinstance(cfg, E2EMultiRunnerConfig):
        return E2EMultiTrainingRunner(cfg, **given)
    return E2ETrainingRunner(cfg, **given)


def _model_and_data(sweep: Sweep, cfg: AnyConfig, load: LoadDocuments) -> tuple[Any, Any, Any]:
    assert cfg.llm_device is not None
    model = load_model(cfg.model_name, cfg.llm_device, cfg.model_class_name, cfg.model_from_pretrained_kwargs)
    return model, *load(cfg.dataset_path, _held_out(sweep))


def _held_out(sweep: Sweep) -> float:
    return sweep.evaluation.get("held_out", HELD_OUT)


def _train_group(
    splice: SplicedModel,
    runners: Mapping[str, AnyRunner],
    logged: Mapping[str, WandbRun | UnheardRun],
    fail: Callable[[str, Exception], None],
) -> list[str]:
    """Train the runners' SAEs together, save those that end, and give their names."""
    leader = next(iter(runners.values()))
    batches = PromptBatches(leader.activations_store, leader.cfg.prompts_per_step)
    names: dict[Group, str] = {}
    failed: set[str] = set()
    saved: list[str] = []

    def save(group: Group) -> None:
        runner = runners[names[group]]
        saved.append(names[group])
        if ranks.is_first():
            runner.save_outputs(group)
            if runner.cfg.n_checkpoints == 0:
                shutil.rmtree(Path(str(runner.cfg.output_path)) / CHECKPOINTS, ignore_errors=True)

    def stop(name: str, error: Exception) -> None:
        failed.add(name)
        fail(name, error)

    def stop_group(group: Group, error: Exception) -> None:
        stop(names[group], error)

    def living() -> list[Group]:
        return [group for group, name in names.items() if name not in failed]

    for name, runner in runners.items():
        # One store for all, so that each checkpoint knows how far it was read.
        runner.activations_store = leader.activations_store
        with kept_to(name, stop), ranks.together():
            names[runner.make_group(batches, logged[name].log if name in logged else None)] = name
    try:
        if names:
            resume(leader, list(names), stop_group)
        if living():
            with splice.running(compilation(leader.cfg)), interrupting(batches):
                fit(splice, living(), batches, step_plan(leader), save, stop_group)
    except InterruptedException:
        raise
    except Exception as error:  # in what they share: the model, or the data
        for group in living():
            if names[group] not in saved:
                stop(names[group], error)
    return [name for name in saved if name not in failed]


def resume(leader: AnyRunner, groups: Sequence[Group], on_failure: OnFailure = reraise) -> None:
    """Take up training where all of the points have a checkpoint, the latest if there are several, or leave it at the start.

    A point whose checkpoint is damaged is given to `on_failure`, and does not go on.
    """
    folders = {group: Path(str(group.first.cfg.checkpoint_path)) for group in groups}
    common = ranks.first(
        lambda: set.intersection(*({int(path.name) for path in checkpoints_in(at)} for at in folders.values()))
    )
    if not common:
        return
    store_is_set = False

    def load(group: Group) -> None:
        nonlocal store_is_set
        path = folders[group] / str(max(common))
        try:
            group.load_checkpoint(path)
            if not store_is_set:
                leader.activations_store.load_from_checkpoint(path)
                store_is_set = True
        except Exception as error:  # damaged bytes fail in whatever way they happen to ask for
            raise ValueError(
                f"checkpoint {path} is damaged ({named_line(error)}); remove it to go on without it"
            ) from error

    standing(groups, load, on_failure)
    logger.info(f"going on after {max(common)} tokens")


def _evaluate_group(
    sweep: Sweep,
    output: Path,
    configs: Mapping[str, AnyConfig],
    model: Any,
    held_out: Any,
    logged: Mapping[str, WandbRun | UnheardRun],
    fail: Callable[[str, Exception], None],
) -> None:
    """Evaluate what was saved, as anyone would load it, on the held-out documents."""
    options = {key: value for key, value in sweep.evaluation.items() if key != "held_out"}
    points = {sae: name for name, cfg in configs.items() for sae in saes_of(name, cfg)}
    failed: set[str] = set()

    def stop(sae: str, error: Exception) -> None:
        # An SAE of a joint point that is named after the point is no point itself.
        if points[sae] not in failed:
            failed.add(points[sae])
            fail(points[sae], error)

    saes: dict[str, SAE[Any]] = {}
    for sae in points:
        with kept_to(sae, stop):
            saes[sae] = load_folder(output / sae, str(device_of(model)))
    for sae, result in evaluate_each(saes, model, held_out, stop, **options).items():
        try:
            write_evaluation(result, output / sae)
        except OSError as error:
            stop(sae, error)
            continue
        if (run := logged.get(points[sae])) is not None:
            prefix = sae.removeprefix(points[sae]).removeprefix("/")
            scalars = {k: v for k, v in result.to_dict().items() if isinstance(v, (int, float))}
            run.summarise({f"{prefix}/evaluation/{key}".lstrip("/"): value for key, value in scalars.items()})
    for name, cfg in configs.items():
        if isinstance(cfg, E2EMultiRunnerConfig) and name not in failed:
            with kept_to(name, fail):
                of_point = {sae: saes[f"{name}/{sae}"] for sae in cfg.saes}
                write_together(evaluate_together(of_point, model, held_out, **options), output / name)


def _without_wandb(cfg: AnyConfig) -> AnyConfig:
    """SAELens logs to the one global run; the points of a sweep have a run each."""
    quiet = copy.copy(cfg)
    quiet.logger = replace(cfg.logger, log_to_wandb=False)
    return quiet
