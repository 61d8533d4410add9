"""Read the `final_config.yaml` of an Apollo run."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens_e2e.objectives import E2E, E2EDownstream, Local, Objective
from sae_lens_e2e.yaml_file import read_yaml

CONFIG_FILENAME = "final_config.yaml"

_SECTIONS = ("saes", "loss", "train_data")
_POSITIVE = {"batch_size", "effective_batch_size", "log_every_n_grad_steps", "n_ctx"}
_COUNTS = _POSITIVE | {
    *("cooldown_samples", "eval_every_n_samples", "eval_n_samples", "n_samples", "save_every_n_samples"),
    "warmup_samples",
}
_NUMBERS = {"coeff", "dict_size_to_input_ratio", "lr", "max_grad_norm", "min_lr_factor", "p_norm", "total_coeff"}
_WHOLE_NAME = re.compile(r"blocks\.\d+\.(\w+\.)?hook_\w+")


def read_run_config(path: str | Path) -> dict[str, Any]:
    """An Apollo run's settings as they are in its file, or in the `final_config.yaml` of its folder.

    Raises ValueError if the file is none of Apollo's, FileNotFoundError if there is none.
    """
    file = Path(path) / CONFIG_FILENAME if Path(path).is_dir() else Path(path)
    config = read_yaml(file)
    missing = [key for key in _SECTIONS if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(f"{file} is not the config of an Apollo SAE run: it has no {missing[0]!r}")
    sections = {name: config[name] for name in _SECTIONS}
    if isinstance(config["loss"], dict):
        sections |= {f"loss.{name}": term for name, term in config["loss"].items() if term is not None}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{file}: {name}={section!r} is not a mapping of settings to values")
    try:
        return _with_numbers(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def model_name(config: Mapping[str, Any]) -> str:
    """The language model of a run: a TransformerLens name, or the path of the model's weights."""
    name = config.get("tlens_model_name") or config.get("tlens_model_path")
    if name is None:
        raise ValueError("tlens_model_name and tlens_model_path are both null: the config names no language model")
    return str(name)


def prepends_bos(config: Mapping[str, Any]) -> bool:
    """Whether the run's prompts began with a BOS: text that Apollo's library tokenised itself, and not what came tokenised."""
    return not setting(config, "train_data.is_tokenized", True)


def objective(config: Mapping[str, Any], d_in: int, positions: Sequence[str] = ()) -> Objective:
    """The objective that Apollo's `loss` amounts to, for SAEs of width `d_in`.

    `positions` are the hooks of SAEs that are trained together. Raises ValueError, naming the key, for a term that has no
    equivalent.
    """
    if (term := setting(config, "loss.out_to_orig")) is not None:
        raise ValueError(f"loss.out_to_orig={term!r} has no equivalent; set it to null")
    kl = _coefficient(config, "logits_kl", "coeff")
    # Apollo's reconstruction is a mean over d_in, SAELens' a sum.
    mse = _coefficient(config, "out_to_in", "coeff") / d_in
    downstream = _coefficient(config, "in_to_orig", "total_coeff")
    if downstream:
        hooks = tuple(as_list(required(config, "loss.in_to_orig.hook_positions")))
        check_whole_names("loss.in_to_orig.hook_positions", hooks)
        if len(positions) > 1:
            _check_after_all(hooks, positions)
        return E2EDownstream(kl, downstream, hooks, mse)
    # A term that weighs nothing still has the SAEs spliced in, and then a later one is given what the earlier ones have changed.
    spliced = any(setting(config, f"loss.{term}") is not None for term in ("logits_kl", "in_to_orig"))
    if kl or (spliced and len(positions) > 1):
        return E2E(kl, mse)
    return Local(mse)


def setting(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A setting by its name, such as `loss.sparsity.p_norm`; `default` if there is none, or it is null."""
    value: Any = config
    for part in name.split("."):
        value = (value or {}).get(part)
    return default if value is None else value


def required(config: Mapping[str, Any], name: str) -> Any:
    """A setting that has no default. Raises ValueError, naming it, if there is none."""
    value = setting(config, name)
    if value is None:
        raise ValueError(f"{name} is missing from the config of the run")
    return value


def as_list(value: Any) -> list[Any]:
    """Hook names as Apollo's configs have them: several, one, or none at all."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def check_whole_names(key: str, hooks: Iterable[Any]) -> None:
    """Raise ValueError, naming the key, for a hook that is only part of a name, which Apollo's library takes for several."""
    for hook in hooks:
        if not isinstance(hook, str) or not _WHOLE_NAME.fullmatch(hook):
            raise ValueError(
                f"{key}: {hook!r} is not the whole name of a hook, and part of one has no equivalent; write it in full (blocks.N....)"
            )


def _check_after_all(hooks: Sequence[str], positions: Sequence[str]) -> None:
    """Raise ValueError for a compared hook that, going by the blocks, an SAE comes after."""
    last = max(int(position.split(".")[1]) for position in positions)
    for hook in hooks:
        if int(hook.split(".")[1]) < last or hook in positions:
            raise ValueError(
                f"loss.in_to_orig.hook_positions: {hook} does not come after every one of saes.sae_positions={list(positions)}, which "
                "has no equivalent; leave it out, or pass objective="
            )


def _coefficient(config: Mapping[str, Any], term: str, name: str) -> float:
    return 0.0 if setting(config, f"loss.{term}") is None else required(config, f"loss.{term}.{name}")


def _with_numbers(settings: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """The settings with what is to be a number as one, checked."""
    read = {}
    for key, value in settings.items():
        name = f"{section}.{key}".removeprefix(".")
        if isinstance(value, dict):
            read[key] = _with_numbers(value, name)
        elif value is not None and key in _COUNTS | _NUMBERS:
            read[key] = _number(name, value, whole=key in _COUNTS, least=int(key in _POSITIVE))
        else:
            read[key] = value
    return read


def _number(name: str, value: Any, whole: bool, least: int) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < least or (whole and number != int(number)):
        raise ValueError(f"{name}={value!r} must be a {'whole ' if whole else ''}number of at least {least}")
    return int(number) if whole else number
