"""Whether a run is the one that a folder holds: settings against those recorded there, and nobody else at work in it."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, TRAINER_STATE_FILENAME

from sae_lens_e2e.output import check_writable, clean_partials, locked
from sae_lens_e2e.yaml_file import read_json

MAY_DIFFER = (
    *("output_path", "checkpoint_path", "resume_from_checkpoint", "n_checkpoints", "save_final_checkpoint"),
    *("device", "llm_device", "act_store_device", "logger", "verbose", "prefetch_llm_batches"),
    "checkpoint_activations",
    *("sae_lens_version", "sae_lens_training_version", "metadata"),
)
"""What may differ between two runs that train the same; `metadata` is what SAELens records of an SAE as it goes."""
MAY_CHANGE = (
    *MAY_DIFFER,
    *("lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles", "training_tokens"),
    "until",
    *("n_eval_batches", "eval_batch_size_prompts", "compile_llm", "llm_compilation_mode"),
    *("compile_sae", "sae_compilation_mode"),
)
"""What a run that goes on from a checkpoint may have otherwise than before: it takes effect from there."""

# Settings whose keys are the user's own.
_BY_NAME = (
    *("saes", "hook_names", "hook_names_out", "hook_head_indices"),
    *("model_kwargs", "model_from_pretrained_kwargs"),
)
_ONE_OR_SEVERAL = {"hook_name", "hook_names"}


class Difference(NamedTuple):
    """A setting that two runs have differently."""

    name: str
    """As one writes it: `sae.l1_coefficient`."""
    then: Any
    now: Any


def difference(folder: Path, cfg: Any, may_differ: Collection[str] = MAY_DIFFER) -> Difference | None:
    """The first setting that the run recorded in `folder`, if any is, has otherwise than `cfg`. Raises ValueError for a damaged record."""
    file = folder / RUNNER_CFG_FILENAME
    if not file.is_file():
        return None
    now, then = json.loads(json.dumps(cfg.to_dict(), default=str)), read_json(file)
    if not isinstance(then, dict):
        raise ValueError(f"{file} is damaged: it holds no settings")
    return difference_of(then, now, may_differ)


def difference_of(then: Any, now: Any, may_differ: Collection[str]) -> Difference | None:
    """The first setting that two runs' settings, as JSON has them, have differently, if any."""
    return next(_differences(then, now, may_differ), None)


def _differences(then: Any, now: Any, may_differ: Collection[str], at: str = "") -> Iterator[Difference]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        # Another version may have settings that this one lacks, and the other way round.
        keys = then.keys() | now.keys()
        if at not in _BY_NAME:
            keys &= (then.keys() & now.keys()) | _ONE_OR_SEVERAL
        for key in sorted(keys - set(may_differ), key=lambda key: (key != "name", key)):
            yield from _differences(then.get(key), now.get(key), may_differ, f"{at}.{key}" if at else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, pair in enumerate(zip(then, now, strict=True)):
            yield from _differences(*pair, may_differ, f"{at}[{number}]")
    elif then != now:
        yield Difference(at, then, now)


def held_out_difference(folder: Path, held_out: float | None) -> Difference | None:
    """Whether the SAE recorded in `folder`, if one is and it says so, was trained with another part of the documents held out.

    Raises ValueError for a damaged record.
    """
    file = folder / SAE_CFG_FILENAME
    recorded = read_json(file) if file.is_file() else {}
    metadata = recorded.get("metadata") if isinstance(recorded, dict) else None
    if not isinstance(metadata, dict):
        return None
    then = metadata.get("held_out")
    return None if then is None or then == held_out else Difference("held_out", then, held_out)


def check_resume(cfg: Any, names: Sequence[str], held_out: float | None = None) -> None:
    """Check that `resume_from_checkpoint`, if set, is a checkpoint of this run: of one SAE, or of all `names`, on the same documents.

    Raises FileNotFoundError if it is none, ValueError, with both values, for a setting that a run cannot change on its way.
    """
    path = cfg.resume_from_checkpoint
    if path is None:
        return
    folders = [Path(path)] if len(names) == 1 else [Path(path) / name for name in names]
    for folder in folders:
        if not (folder / TRAINER_STATE_FILENAME).is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint={str(folder)!r} is not a checkpoint: it has no {TRAINER_STATE_FILENAME}"
            )
    other = difference(Path(path), cfg, MAY_CHANGE) or held_out_difference(folders[0], held_out)
    if other is not None:
        raise ValueError(
            f"{other.name}={other.now!r}, but resume_from_checkpoint={path!r} is of a run with {other.then!r}; set it to that "
            "(lr and its schedule, training_tokens, logging, checkpoints, paths and devices may change)"
        )


@contextmanager
def claimed(cfg: Any, overwrite: bool) -> Iterator[None]:
    """Have `output_path`, if there is one, to oneself; what killed runs left half-written there and by the checkpoint is removed.

    Raises OSError if it, or the checkpoints' folder, cannot be written or another process is at work in it, FileExistsError if it holds an SAE of other settings
    that is not to be overwritten.
    """
    if cfg.resume_from_checkpoint is not None:
        clean_partials(Path(cfg.resume_from_checkpoint).parent)
    if cfg.checkpoint_path is not None and (cfg.n_checkpoints or cfg.save_final_checkpoint):
        check_writable(cfg.checkpoint_path, "checkpoint")
    if cfg.output_path is None:
        yield
        return
    check_writable(cfg.output_path)
    with locked(cfg.output_path) as was_left:
        folder = Path(cfg.output_path)
        for of_run in (folder, *(folder / name for name in getattr(cfg, "saes", ()))):
            clean_partials(of_run)
        if not overwrite:
            _check_overwritable(folder, cfg, was_left)
        yield


def _check_overwritable(folder: Path, cfg: Any, was_left: bool) -> None:
    """Refuse to put an SAE in the place of one that was trained otherwise; parts that a killed run of ours left may go."""
    may_differ = MAY_DIFFER if cfg.resume_from_checkpoint is None else MAY_CHANGE
    advice = "choose another output_path, or overwrite it: run(overwrite=True), or --overwrite"
    if (other := difference(folder, cfg, may_differ)) is not None:
        raise FileExistsError(
            f"output {str(folder)!r} holds a run with {other.name}={other.then!r}, and this one has {other.now!r}; {advice}"
        )
    for place in (folder, *(folder / name for name in getattr(cfg, "saes", ()))):
        recorded, whole = (place / RUNNER_CFG_FILENAME).is_file(), (folder / RUNNER_CFG_FILENAME).is_file()
        if (recorded and place != folder) or ((place / SAE_CFG_FILENAME).is_file() and not whole and not was_left):
            raise FileExistsError(f"output {str(place)!r} holds an SAE of another run; {advice}")
