"""What a sweep file says: a base configuration, and a grid of what varies over it."""

import itertools
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_e2e.errors import one_line
from sae_lens_e2e.loading.documents import check_held_out
from sae_lens_e2e.names import check_folder_name
from sae_lens_e2e.sweep.plan import Point, Sweep, Tune
from sae_lens_e2e.sweep.tuning import check_tunable
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.cost import check_countable
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.yaml_file import read_yaml

_SECTIONS = ("name", "base", "grid", "evaluation", "tune", "equal")
_EQUAL = ("tokens", "flops")
_EVALUATION = ("batch_size_prompts", "max_tokens", "held_out")


def read_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML or JSON file.

    `base` holds fields of `E2ERunnerConfig`, the SAE's under `sae` (with its `architecture`) and the logger's under
    `logger`. `grid` is a mapping, or a list of mappings, from fields (`objective`, `seed`, `sae.l1_coefficient`) to a value or
    a list of values; every combination within a mapping is a point. Stages are a list themselves, one of the values of `objective`. `tune` holds
    fields of `Tune`; `equal: flops` gives every point the training FLOPs of the most expensive one. Raises ValueError, naming what is wrong,
    before anything is run.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict) or not {"base", "grid"} <= content.keys():
        raise ValueError(f"{path} is not a sweep: it needs a 'base' and a 'grid'")
    try:
        return _sweep(content, path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def _sweep(content: Mapping[str, Any], path: Path) -> Sweep:
    _refuse_unknown(content, _SECTIONS, "section")
    evaluation = content.get("evaluation") or {}
    _refuse_unknown(evaluation, _EVALUATION, "evaluation")
    _check_evaluation(evaluation)
    name = content.get("name", path.stem)
    check_folder_name("name", name)
    if not isinstance(content["base"], Mapping):
        raise ValueError(f"base: {content['base']!r} is not a mapping of settings to values")
    grids = content["grid"] if isinstance(content["grid"], list) else [content["grid"]]
    for grid in grids:
        if not isinstance(grid, Mapping) or not all(isinstance(key, str) for key in grid):
            raise ValueError(
                f"grid: {grid!r} is not a mapping of settings to values; {{}} is the one point of the base"
            )
    points = [point for grid in grids for point in _points(content["base"], grid)]
    names = [point.name for point in points]
    if not points:
        raise ValueError("grid: [] has no points; {} is the one point of the base")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"point {twice[0]} is there twice; a field of the grid must tell them apart")
    for point in points:
        check_folder_name(f"point {point.name}", point.name)
    equal = content.get("equal", "tokens")
    if equal not in _EQUAL:
        raise ValueError(f"equal: {equal!r} must be one of {', '.join(_EQUAL)}")
    for point in points:
        cfg = point.config(path.parent)
        if equal == "flops":
            check_countable(cfg.objective)  # pyright: ignore[reportArgumentType]
    tune = None
    if content.get("tune") is not None:
        _refuse_unknown(content["tune"], [f.name for f in fields(Tune)], "tune")
        tune = Tune(**{"lr": (), **content["tune"]})
    sweep = Sweep(name, tuple(points), evaluation, content, tune, equal)
    check_tunable(sweep, path.parent)
    return sweep


def _check_evaluation(evaluation: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that would only be found out when all is trained."""
    for key, value in evaluation.items():
        if key == "held_out":
            check_held_out(value)
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"evaluation: {key}={value!r} must be an integer, at least 1")


def _points(base: Mapping[str, Any], grid: Mapping[str, Any]) -> Iterator[Point]:
    axes = {key: value if isinstance(value, list) else [value] for key, value in grid.items()}
    if empty := [key for key, values in axes.items() if not values]:
        raise ValueError(f"grid: {empty[0]} has no values; give it some, or leave it out")
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        settings = deepcopy(dict(base))
        for key, value in chosen.items():
            _set(settings, key, value)
        _refuse_unknown_settings(settings)
        yield Point(_name(chosen), settings)


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    """`settings['sae']['k'] = 8` for the key 'sae.k'."""
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise ValueError(f"grid: {key} needs a mapping at {parent}, which is {settings!r}")
    settings[last] = value


def _name(chosen: Mapping[str, Any]) -> str:
    parts = []
    for key, value in chosen.items():
        if key == "objective":
            parts.append(_name_of_objective(value))
        else:
            parts.append(f"{key.split('.')[-1]}={value}")
    return re.sub(r"[^\w.=+-]+", "_", "-".join(parts)) or "only"


def _name_of_objective(value: Any) -> str:
    """A name, or that of its settings and what is given beside it; stages by their objectives."""
    if isinstance(value, list):
        return "-then-".join(_name_of_objective(stage) for stage in value)
    if not isinstance(value, dict):
        return str(value)
    kind = next((key for key in ("name", "stages", "objective") if key in value), "name")
    given = [f"{k}={v}" for k, v in value.items() if k not in ("name", kind) and not isinstance(v, (list, dict))]
    return "-".join([_name_of_objective(value.get(kind)), *given])


def _refuse_unknown_settings(settings: Mapping[str, Any]) -> None:
    several = "saes" in settings
    _refuse_unknown(settings, [f.name for f in fields(E2EMultiRunnerConfig if several else E2ERunnerConfig)], "setting")
    _refuse_unknown(settings.get("logger") or {}, [f.name for f in fields(LoggingConfig)], "logger")
    saes = settings["saes"] if several else {"sae": settings.get("sae")}
    if not isinstance(saes, Mapping) or not saes:
        raise ValueError(f"base: saes={saes!r} is not a mapping of names to SAEs")
    for name, sae in saes.items():
        if not isinstance(sae, Mapping) or str(sae.get("architecture")) not in SAE_TRAINING_CLASS_REGISTRY:
            raise ValueError(
                f"base: {name!r} needs an 'architecture', one of {', '.join(SAE_TRAINING_CLASS_REGISTRY)}, beside d_in and d_sae"
            )
        known = [f.name for f in fields(SAE_TRAINING_CLASS_REGISTRY[sae["architecture"]][1])]
        _refuse_unknown(sae, [*known, "architecture"], name)


def _refuse_unknown(found: Mapping[str, Any], known: Any, where: str) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} {found!r} is not a mapping of settings to values")
    for key in found:
        if key not in known:
            raise ValueError(f"{where} {key!r} is unknown; it is one of {', '.join(known)}")
