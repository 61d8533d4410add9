"""`sae-lens-e2e train`: every field of E2ERunnerConfig is a flag; a file with `saes` trains several together."""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lens_e2e.cli.examples import TRAIN
from sae_lens_e2e.cli.outcome import summary, warn_of_repeats
from sae_lens_e2e.cli.settings_parser import SettingsParser
from sae_lens_e2e.cli.train_flags import AS_YAML, flags_of_one_sae, flags_of_several_saes, settings_of_one_sae
from sae_lens_e2e.loading import HELD_OUT, is_local, load_documents, load_model, model_class_of
from sae_lens_e2e.loading.saes import is_sae_folder
from sae_lens_e2e.output import claim_output
from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.training.multi_runner import E2EMultiTrainingRunner
from sae_lens_e2e.training.ready import make_ready
from sae_lens_e2e.training.runner import E2ETrainingRunner
from sae_lens_e2e.yaml_file import read_yaml

# Fields that both the run and the SAE have; simple_parsing tells the SAE's apart by this prefix.
_SHARED_WITH_SAE = ("device", "dtype")
# What a run of one SAE has in the place of fields of a run of several.
_BY_NAME = {"hook_name": "hook_names", "hook_name_out": "hook_names_out", "hook_head_index": "hook_head_indices"}


def train(arguments: list[str]) -> None:
    """Train one SAE, as the flags and an optional config file say, or the several that a file has under `saes`."""
    with ranks.together():
        cfg, overwrite, held_out = parse_train(arguments or ["--help"])
    make_ready(cfg, held_out)
    ranks.first(lambda: _claim(cfg, overwrite))
    with ranks.together():
        loaded, kept = _loaded(cfg, held_out)
    several = isinstance(cfg, E2EMultiRunnerConfig)
    runner = E2EMultiTrainingRunner(cfg, **loaded) if several else E2ETrainingRunner(cfg, **loaded)
    warn_of_repeats(runner)
    began = time.monotonic()
    runner.run(overwrite)
    seconds = time.monotonic() - began
    ranks.first(lambda: print(summary(runner, kept, seconds)))


def _claim(cfg: E2ERunnerConfig[Any] | E2EMultiRunnerConfig, overwrite: bool) -> None:
    if cfg.output_path is None:
        return
    claim_output(cfg.output_path, overwrite)
    if isinstance(cfg, E2EMultiRunnerConfig) and is_sae_folder(cfg.output_path):
        raise FileExistsError(f"output {cfg.output_path!r} is the folder of one SAE; choose another for several")


def _loaded(cfg: Any, held_out: float) -> tuple[dict[str, Any], Any]:
    """The runner's overrides, which are the documents, without those that are held out, and a model that SAELens has no name for; and the held out.

    That is the embedded one, or a folder's. The config, and with it the SAE's metadata, is made to name the class that a model's folder gave.
    """
    documents, kept = load_documents(cfg.dataset_path, held_out, cfg.streaming)
    overrides: dict[str, Any] = {"override_dataset": documents, "held_out": held_out}
    if is_local(cfg.model_name):
        model = load_model(cfg.model_name, cfg.llm_device, cfg.model_class_name, cfg.model_from_pretrained_kwargs)
        if (had := model_class_of(model)) != cfg.model_class_name:
            cfg.model_class_name, cfg.model_from_pretrained_kwargs = had, {}
        overrides["override_model"] = model
    return overrides, kept


def parse_train(arguments: Sequence[str]) -> tuple[E2ERunnerConfig[Any] | E2EMultiRunnerConfig, bool, float]:
    """The config that the flags of `train` mean, whether a folder that is not ours may be overwritten, and `--held_out`.

    A file given with --config supplies flags of its own, which those on the command line override. If it has `saes` the config
    is that of several SAEs.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    from_file, flags = files.parse_known_args(arguments)
    several = False
    if from_file.config is not None:
        several = "saes" in _read(from_file.config)
        flags = [*config_file_flags(from_file.config), *flags]
        if several:
            _refuse_flags_of_one_sae(flags, from_file.config)

    parser = SettingsParser(
        prog="sae-lens-e2e train",
        # A setting is not to be taken for another that begins like it.
        allow_abbrev=False,
        description="Train an SAE with an end-to-end objective, or several together: those under `saes` in a --config file, each with "
        "its architecture, at `hook_names`, by name.",
        example=f"sae-lens-e2e train --config {from_file.config}" if several else TRAIN,
    )
    parser.add_argument("--config", metavar="FILE", help="take settings from a YAML or JSON file; flags override it")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write to output_path even if what is there is not one of our runs, or one with other settings",
    )
    parser.add_argument(
        "--held_out",
        type=float,
        default=HELD_OUT,
        help=f"part of the documents kept for evaluation (default: {HELD_OUT})",
    )
    parser.add_arguments(flags_of_several_saes() if several else flags_of_one_sae(), dest="cfg")
    parsed = parser.parse_args(flags)
    return parsed.cfg, parsed.overwrite, parsed.held_out


def config_file_flags(path: Path) -> list[str]:
    """The settings in a YAML or JSON file as command-line flags, the SAE's and the logger's among the others.

    Takes what `to_dict` of either runner config writes, so a run's own runner_cfg.json repeats it. Raises ValueError for a file
    that is no mapping of settings, FileNotFoundError if there is none.
    """
    settings = _read(path)
    sae, logger = (_section(settings, name, path) for name in ("sae", "logger"))
    # Recorded by SAELens for the reader, and taken by no flag.
    sae.pop("metadata", None)
    sae = {f"sae.{name}" if name in _SHARED_WITH_SAE else name: value for name, value in sae.items()}
    if settings.get("seqpos_slice") == [None]:
        # The default, for which there is no way to write a flag.
        del settings["seqpos_slice"]
    return [part for name, value in (settings | sae | logger).items() for part in _flag(name, value)]


def _section(settings: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = settings.pop(name, None) or {}
    if not isinstance(section, dict):
        raise ValueError(f"--config: {name}={section!r} in {str(path)!r} is not a mapping of settings to values")
    return dict(section)


def _read(path: Path) -> dict[str, Any]:
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"--config: {str(path)!r} is not a mapping of settings to values")
    return settings


def _refuse_flags_of_one_sae(flags: Sequence[str], path: Path) -> None:
    of_run, of_sae = {f.name for f in dataclasses.fields(E2EMultiRunnerConfig)}, settings_of_one_sae()
    for flag in flags:
        name = flag.removeprefix("--").split("=")[0]
        if not flag.startswith("--") or name in of_run:
            continue
        if name in _BY_NAME:
            raise ValueError(f"--{name}: {path} trains several SAEs; put it under {_BY_NAME[name]} there, by name")
        if name.removeprefix("sae.") in of_sae:
            raise ValueError(f"--{name} is a setting of one SAE, and {path} trains several; put it under saes there")


def _flag(name: str, value: Any) -> list[str]:
    of_stages = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if isinstance(value, dict) or of_stages or name in AS_YAML:
        return [f"--{name}", json.dumps(value)]
    if value is None:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}", str(value)]
