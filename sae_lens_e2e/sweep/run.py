"""Run a sweep: a folder a point, finished points left alone, and points of one model, hook and data trained together."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from sae_lens_e2e.output import check_writable, write_whole, written_whole
from sae_lens_e2e.splice import SplicedModel, device_of
from sae_lens_e2e.sweep.grid import AnyConfig, Sweep
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.loop import fit
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.multi_runner import E2EMultiTrainingRunner
from sae_lens_e2e.training.prompts import PromptBatches, interrupting
from sae_lens_e2e.training.runner import E2ETrainingRunner
from sae_lens_e2e.training.statistics import ESTIMATED
from sae_lens_e2e.training.trainer import Log

AnyRunner = E2ETrainingRunner | E2EMultiTrainingRunner

FAILURE_FILENAME = "failed.txt"
RESULTS_FILENAME = "results.csv"
SWEEP_FILENAME = "sweep.yaml"
CHECKPOINTS = "checkpoints"

# What tells apart runs that cannot share a clean pass, or not the same prompts in the same step.
_SHARED = (
    *("model_name", "model_class_name", "model_kwargs", "model_from_pretrained_kwargs"),
    *("dataset_path", "dataset_trust_remote_code", "streaming", "context_size", "prepend_bos"),
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
    todo = {name: cfg for name, cfg in configs.items() if not _is_finished(output, name, cfg)}
    logger.info(f"{len(configs) - len(todo)} of {len(configs)} points are finished")
    for group in groups(todo, together):
        _run_group(sweep, output, {name: configs[name] for name in group})
    results = read_results(output, [sae for name, cfg in configs.items() for sae in saes_of(name, cfg)])
    frame = evaluation_frame(results)
    if results:
        with written_whole(output) as partial:
            frame.to_csv(partial / RESULTS_FILENAME, index=False)
            (partial / SWEEP_FILENAME).write_text(yaml.safe_dump(dict(sweep.content), sort_keys=False))
    return frame


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


def read_results(output: str | Path, names: Sequence[str]) -> dict[str, Evaluation]:
    """The evaluations of those points that are finished."""
    found = {name: read_evaluation(Path(output) / name) for name in names}
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def failures(output: str | Path, names: Sequence[str]) -> dict[str, str]:
    """What stopped those points that failed."""
    files = {name: Path(output) / name / FAILURE_FILENAME for name in names}
    return {name: file.read_text().strip() for name, file in files.items() if file.is_file()}


def _run_group(sweep: Sweep, output: Path, configs: Mapping[str, AnyConfig]) -> None:
    def fail(name: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.error(f"point {name} failed: {message}")
        write_whole(output / name / FAILURE_FILENAME, message + "\n")

    for name in configs:
        (output / name / FAILURE_FILENAME).unlink(missing_ok=True)
    try:
        model, prompts, held_out = _model_and_data(sweep, next(iter(configs.values())))
    except (OSError, ValueError) as error:
        for name in configs:
            fail(name, error)
        return
    runners: dict[str, AnyRunner] = {}
    trained = [name for name, cfg in configs.items() if _is_trained(output, name, cfg)]
    splice = SplicedModel(model, next(iter(configs.values())).model_kwargs)
    for name, cfg in configs.items():
        if name in trained:
            continue
        try:
            runners[name] = runner_of(_without_wandb(cfg), prompts, model, splice)
        except (OSError, ValueError, TypeError) as error:
            fail(name, error)
    with _wandb_runs(sweep.name, {name: configs[name] for name in runners}) as wandb_runs:
        if runners:
            trained += _train_group(splice, runners, wandb_runs, fail)
        _evaluate_group(sweep, output, {name: configs[name] for name in trained}, model, held_out, wandb_runs, fail)


def runner_of(cfg: AnyConfig, dataset: Any, model: Any, splice: SplicedModel) -> AnyRunner:
    """The runner of a point, of one SAE or of several."""
    if isinstance(cfg, E2EMultiRunnerConfig):
        return E2EMultiTrainingRunner(cfg, override_dataset=dataset, override_model=model, splice=splice)
    return E2ETrainingRunner(cfg, override_dataset=dataset, override_model=model, splice=splice)


def _model_and_data(sweep: Sweep, cfg: AnyConfig) -> tuple[Any, Any, Any]:
    assert cfg.llm_device is not None
    model = load_model(cfg.model_name, cfg.llm_device, cfg.model_class_name, cfg.model_from_pretrained_kwargs)
    kept = {"held_out": sweep.evaluation["held_out"]} if "held_out" in sweep.evaluation else {}
    documents, held_out = load_documents(cfg.dataset_path, **kept)
    return model, *(tokenised(part, model, cfg.context_size) for part in (documents, held_out))


def _train_group(
    splice: SplicedModel,
    runners: Mapping[str, AnyRunner],
    wandb_runs: Mapping[str, Any],
    fail: Callable[[str, Exception], None],
) -> list[str]:
    """Train the runners' SAEs together, save those that end, and give their names."""
    leader = next(iter(runners.values()))
    batches = PromptBatches(leader.activations_store, leader.cfg.prompts_per_step)
    names: dict[Group, str] = {}
    for name, runner in runners.items():
        # One store for all, so that each checkpoint knows how far it was read.
        runner.activations_store = leader.activations_store
        names[runner.make_group(batches, _logging_to(wandb_runs.get(name)))] = name
    resume(leader, list(names))
    ended: list[str] = []

    def save(group: Group) -> None:
        runner = runners[names[group]]
        runner.save_outputs(group)
        if runner.cfg.n_checkpoints == 0:
            shutil.rmtree(Path(str(runner.cfg.output_path)) / CHECKPOINTS, ignore_errors=True)
        ended.append(names[group])

    with splice.running(), interrupting(batches):
        fit(splice, list(names), batches, leader.make_plan(), save, lambda group, error: fail(names[group], error))
    return ended


def _logging_to(wandb_run: Any) -> Log | None:
    if wandb_run is None:
        return None
    return lambda figures, step: wandb_run.log(figures, step=step)


def resume(leader: AnyRunner, groups: Sequence[Group]) -> None:
    """Take up training where all of the points have a checkpoint, the latest if there are several, or leave it at the start."""
    folders = [Path(str(group.first.cfg.checkpoint_path)) for group in groups]
    common = set.intersection(*({int(path.name) for path in _checkpoints(folder)} for folder in folders))
    if not common:
        return
    checkpoints = [folder / str(max(common)) for folder in folders]
    for group, path in zip(groups, checkpoints, strict=True):
        group.load_checkpoint(path)
    leader.activations_store.load_from_checkpoint(checkpoints[0])
    logger.info(f"going on after {max(common)} tokens")


def _checkpoints(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*") if path.name.isdigit())


def _evaluate_group(
    sweep: Sweep,
    output: Path,
    configs: Mapping[str, AnyConfig],
    model: Any,
    held_out: Any,
    wandb_runs: Mapping[str, Any],
    fail: Callable[[str, Exception], None],
) -> None:
    """Evaluate what was saved, as anyone would load it, on the held-out documents."""
    options = {key: value for key, value in sweep.evaluation.items() if key != "held_out"}
    points = {sae: name for name, cfg in configs.items() for sae in saes_of(name, cfg)}
    saes = {sae: SAE.load_from_disk(output / sae, device=str(device_of(model))) for sae in points}
    try:
        results = evaluate_many(saes, model, held_out, **options) if saes else {}
    except (ValueError, TypeError) as error:
        for name in configs:
            fail(name, error)
        return
    for sae, result in results.items():
        write_evaluation(result, output / sae)
        if (run := wandb_runs.get(points[sae])) is not None:
            prefix = sae.removeprefix(points[sae]).removeprefix("/")
            scalars = {k: v for k, v in result.to_dict().items() if isinstance(v, (int, float))}
            run.summary.update({f"{prefix}/evaluation/{key}".lstrip("/"): value for key, value in scalars.items()})


def saes_of(name: str, cfg: AnyConfig) -> list[str]:
    """The SAEs of a point: one by the point's own name, or several by theirs inside its folder."""
    return [f"{name}/{sae}" for sae in cfg.saes] if isinstance(cfg, E2EMultiRunnerConfig) else [name]


def _without_wandb(cfg: AnyConfig) -> AnyConfig:
    """SAELens logs to the one global run; the points of a sweep have a run each."""
    quiet = copy.copy(cfg)
    quiet.logger = replace(cfg.logger, log_to_wandb=False)
    return quiet


@contextmanager
def _wandb_runs(group: str, configs: Mapping[str, AnyConfig]) -> Iterator[dict[str, Any]]:
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


def _is_finished(output: Path, name: str, cfg: AnyConfig) -> bool:
    return all(read_evaluation(output / sae) is not None for sae in saes_of(name, cfg))


def _is_trained(output: Path, name: str, cfg: AnyConfig) -> bool:
    saes = [output / sae / file for sae in saes_of(name, cfg) for file in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)]
    return all(file.is_file() for file in (*saes, output / name / RUNNER_CFG_FILENAME))


def _check_same(folder: Path, cfg: AnyConfig) -> None:
    """Raises ValueError if the folder holds a run, or part of one, with other settings."""
    ours = json.loads(json.dumps(cfg.to_dict(), default=str))
    for file in (folder / RUNNER_CFG_FILENAME, *folder.glob(f"{CHECKPOINTS}/*/{RUNNER_CFG_FILENAME}")):
        theirs = json.loads(file.read_text()) if file.is_file() else ours
        for key in sorted(ours.keys() - set(_VOLATILE)):
            now, then = (_without_metadata(part) for part in (ours[key], theirs.get(key)))
            if now != then:
                raise ValueError(
                    f"{folder} holds a run with other settings ({key}: {then!r}, now {now!r}); choose another output folder"
                )


def _without_metadata(value: Any) -> Any:
    """A setting without what SAELens records in an SAE's config as it goes."""
    if not isinstance(value, dict):
        return value
    return {key: _without_metadata(part) for key, part in value.items() if key != "metadata"}
