"""Run a sweep: a folder a point, finished points left alone, and points of one model, hook and data trained together."""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
import yaml
from sae_lens import SAE, logger
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_e2e.evaluation import Evaluation, evaluate_many, evaluation_frame
from sae_lens_e2e.evaluation.files import read_evaluation, write_evaluation
from sae_lens_e2e.loading import load_documents, load_model, tokenised
from sae_lens_e2e.output import check_writable, written_whole
from sae_lens_e2e.splice import frozen, make_splice
from sae_lens_e2e.sweep.grid import Sweep
from sae_lens_e2e.sweep.together import Trainer, fit_together
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.runner import E2ETrainingRunner, interrupting
from sae_lens_e2e.training.step import PromptBatches

FAILURE_FILENAME = "failed.txt"
RESULTS_FILENAME = "results.csv"
SWEEP_FILENAME = "sweep.yaml"
CHECKPOINTS = "checkpoints"

# What tells apart runs that cannot share a clean pass, or not the same prompts in the same step.
_SHARED = (
    *("model_name", "model_class_name", "model_kwargs", "model_from_pretrained_kwargs", "hook_name", "hook_head_index"),
    *("dataset_path", "dataset_trust_remote_code", "streaming", "is_dataset_tokenized", "context_size", "prepend_bos"),
    *("disable_concat_sequences", "sequence_separator_token", "use_chat_formatting", "exclude_special_tokens"),
    *("seqpos_slice", "store_batch_size_prompts", "train_batch_size_tokens", "max_grad_norm", "autocast_lm"),
    *("device", "llm_device", "act_store_device", "dtype", "n_batches_for_norm_estimate"),
)
# What may differ between two runs of the same point.
_VOLATILE = ("checkpoint_path", "output_path", "logger", "sae_lens_version", "sae_lens_training_version", "verbose")


def run_sweep(sweep: Sweep, output: str | Path, *, together: int | None = None) -> pd.DataFrame:
    """Train and evaluate every point of a sweep that is not finished, each into its own folder of `output`.

    At most `together` SAEs are in memory at once, by default all that can share a clean pass. A point that fails leaves a
    `failed.txt` and does not stop the others; an interruption leaves checkpoints from which the same call goes on. Gives, and
    writes as `results.csv` beside the sweep itself, the evaluation of each finished point, a row a point. Raises ValueError, before any work, if
    a folder holds a point with other settings.
    """
    output = Path(output)
    check_writable(output)
    configs = {point.name: point.config(output / point.name) for point in sweep.points}
    for name, cfg in configs.items():
        _check_same(output / name, cfg)
    todo = {name: cfg for name, cfg in configs.items() if not _is_finished(output / name)}
    logger.info(f"{len(configs) - len(todo)} of {len(configs)} points are finished")
    for group in groups(todo, together):
        _run_group(sweep, output, {name: configs[name] for name in group})
    results = read_results(output, list(configs))
    frame = evaluation_frame(results)
    if results:
        with written_whole(output) as partial:
            frame.to_csv(partial / RESULTS_FILENAME, index=False)
            (partial / SWEEP_FILENAME).write_text(yaml.safe_dump(dict(sweep.content), sort_keys=False))
    return frame


def groups(configs: Mapping[str, E2ERunnerConfig[Any]], together: int | None = None) -> list[list[str]]:
    """The names of the runs that can be trained together, at most `together` in each list."""
    if together is not None and together < 1:
        raise ValueError(f"together={together} must be at least 1")
    by_key: dict[str, list[str]] = {}
    for name, cfg in configs.items():
        normalization = cfg.sae.normalize_activations
        key = json.dumps([*(getattr(cfg, name) for name in _SHARED), normalization], default=str)
        by_key.setdefault(key, []).append(name)
    size = together or max(len(configs), 1)
    return [names[i : i + size] for names in by_key.values() for i in range(0, len(names), size)]


def read_results(output: str | Path, names: Sequence[str]) -> dict[str, Evaluation]:
    """The evaluations of those points that are finished."""
    found = {name: read_evaluation(Path(output) / name) for name in names}
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def failures(output: str | Path, names: Sequence[str]) -> dict[str, str]:
    """What stopped those points that failed."""
    files = {name: Path(output) / name / FAILURE_FILENAME for name in names}
    return {name: file.read_text().strip() for name, file in files.items() if file.is_file()}


def _run_group(sweep: Sweep, output: Path, configs: Mapping[str, E2ERunnerConfig[Any]]) -> None:
    def fail(name: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.error(f"point {name} failed: {message}")
        (output / name).mkdir(parents=True, exist_ok=True)
        (output / name / FAILURE_FILENAME).write_text(message + "\n")

    for name in configs:
        (output / name / FAILURE_FILENAME).unlink(missing_ok=True)
    try:
        model, prompts, held_out = _model_and_data(sweep, next(iter(configs.values())))
    except (OSError, ValueError) as error:
        for name in configs:
            fail(name, error)
        return
    runners: dict[str, E2ETrainingRunner] = {}
    trained = [name for name in configs if _is_trained(output / name)]
    for name, cfg in configs.items():
        if name in trained:
            continue
        try:
            runners[name] = E2ETrainingRunner(_without_wandb(cfg), override_dataset=prompts, override_model=model)
        except (OSError, ValueError, TypeError) as error:
            fail(name, error)
    with _wandb_runs(sweep.name, {name: configs[name] for name in runners}) as wandb_runs:
        if runners:
            trained += _train_group(runners, wandb_runs, fail)
        _evaluate_group(sweep, output, trained, model, held_out, wandb_runs, fail)


def _model_and_data(sweep: Sweep, cfg: E2ERunnerConfig[Any]) -> tuple[Any, Any, Any]:
    assert cfg.llm_device is not None
    model = load_model(cfg.model_name, cfg.llm_device, cfg.model_class_name, cfg.model_from_pretrained_kwargs)
    kept = {"held_out": sweep.evaluation["held_out"]} if "held_out" in sweep.evaluation else {}
    documents, held_out = load_documents(cfg.dataset_path, **kept)
    return model, *(tokenised(part, model, cfg.context_size) for part in (documents, held_out))


def _train_group(runners: Mapping[str, E2ETrainingRunner], wandb_runs: Mapping[str, Any], fail: Any) -> list[str]:
    """Train the runners' SAEs together, save those that end, and give their names."""
    leader = next(iter(runners.values()))
    hooks = dict.fromkeys(hook for runner in runners.values() for hook in runner.objective.hooks)
    splice = make_splice(
        leader.model, leader.cfg.hook_name, leader.cfg.hook_head_index, tuple(hooks), leader.cfg.model_kwargs
    )
    for runner in runners.values():
        # One splice for all, so that its clean pass is; one store, so that each checkpoint knows how far it was read.
        runner.splice, runner.activations_store = splice, leader.activations_store
    trainers = {name: runner.make_trainer() for name, runner in runners.items()}
    resume(runners, trainers)
    batches = PromptBatches(leader.activations_store, leader.cfg.prompts_per_step)
    ended = []

    def save(name: str, trainer: Trainer) -> None:
        runner = runners[name]
        assert runner.cfg.output_path is not None
        try:
            runner.save_final_sae(trainer.sae, runner.cfg.output_path, trainer.log_feature_sparsity, trainer.history)
        except OSError as error:
            fail(name, error)
            return
        for row in trainer.history if name in wandb_runs else ():
            wandb_runs[name].log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))
        if runner.cfg.n_checkpoints == 0:
            shutil.rmtree(Path(runner.cfg.output_path) / CHECKPOINTS, ignore_errors=True)
        ended.append(name)

    with frozen(leader.model), interrupting(batches):
        fit_together(trainers, batches, save, fail)
    return ended


def resume(runners: Mapping[str, E2ETrainingRunner], trainers: Mapping[str, Trainer]) -> None:
    """Take up training where all of the points have a checkpoint, the latest if there are several, or leave it at the start."""
    saved = [{int(path.name) for path in _checkpoints(runner)} for runner in runners.values()]
    common = set.intersection(*saved)
    if not common:
        return
    checkpoints = {name: f"{runner.cfg.checkpoint_path}/{max(common)}" for name, runner in runners.items()}
    for name, path in checkpoints.items():
        trainers[name].load_trainer_state(path)
        trainers[name].sae.load_weights_from_checkpoint(path)
    next(iter(runners.values())).activations_store.load_from_checkpoint(next(iter(checkpoints.values())))
    logger.info(f"going on after {max(common)} tokens")


def _checkpoints(runner: E2ETrainingRunner) -> Iterator[Path]:
    folder = Path(str(runner.cfg.checkpoint_path))
    return (path for path in folder.glob("*") if path.name.isdigit())


def _evaluate_group(
    sweep: Sweep,
    output: Path,
    names: Sequence[str],
    model: Any,
    held_out: Any,
    wandb_runs: Mapping[str, Any],
    fail: Any,
) -> None:
    """Evaluate what was saved, as anyone would load it, on the held-out documents."""
    options = {key: value for key, value in sweep.evaluation.items() if key != "held_out"}
    saes = {name: SAE.load_from_disk(output / name, device=str(model_device(model))) for name in names}
    try:
        results = evaluate_many(saes, model, held_out, **options) if saes else {}
    except (ValueError, TypeError) as error:
        for name in names:
            fail(name, error)
        return
    for name, result in results.items():
        write_evaluation(result, output / name)
        if name in wandb_runs:
            scalars = {k: v for k, v in result.to_dict().items() if isinstance(v, (int, float))}
            wandb_runs[name].summary.update({f"evaluation/{key}": value for key, value in scalars.items()})


def model_device(model: Any) -> Any:
    """Where a language model's weights are."""
    return next(model.parameters()).device


def _without_wandb(cfg: E2ERunnerConfig[Any]) -> E2ERunnerConfig[Any]:
    """SAELens logs to the one global run; the points of a sweep have a run each."""
    quiet = copy.copy(cfg)
    quiet.logger = replace(cfg.logger, log_to_wandb=False)
    return quiet


@contextmanager
def _wandb_runs(group: str, configs: Mapping[str, E2ERunnerConfig[Any]]) -> Iterator[dict[str, Any]]:
    runs = {
        name: wandb.init(
            project=cfg.logger.wandb_project,
            entity=cfg.logger.wandb_entity,
            group=group,
            name=name,
            config=cfg.to_dict(),
            reinit="create_new",
        )
        for name, cfg in configs.items()
        if cfg.logger.log_to_wandb
    }
    try:
        yield runs
    finally:
        for run in runs.values():
            run.finish()


def _is_finished(folder: Path) -> bool:
    return read_evaluation(folder) is not None


def _is_trained(folder: Path) -> bool:
    return all((folder / file).is_file() for file in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, RUNNER_CFG_FILENAME))


def _check_same(folder: Path, cfg: E2ERunnerConfig[Any]) -> None:
    """Raises ValueError if the folder holds a run, or part of one, with other settings."""
    ours = json.loads(json.dumps(cfg.to_dict(), default=str))
    for file in (folder / RUNNER_CFG_FILENAME, *folder.glob(f"{CHECKPOINTS}/*/{RUNNER_CFG_FILENAME}")):
        theirs = json.loads(file.read_text()) if file.is_file() else ours
        for key in sorted(ours.keys() - set(_VOLATILE)):
            now, then = ours[key], theirs.get(key)
            if key == "sae":
                now, then = ({k: v for k, v in part.items() if k != "metadata"} for part in (now, then or {}))
            if now != then:
                raise ValueError(
                    f"{folder} holds a run with other settings ({key}: {then!r}, now {now!r}); choose another output folder"
                )
