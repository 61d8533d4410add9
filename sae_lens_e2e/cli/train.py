"""`sae-lens-e2e train`: every field of E2ERunnerConfig is a flag."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import simple_parsing
import yaml
from docstring_parser import parse as parse_docstring
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_e2e.cli.parser import SettingsParser
from sae_lens_e2e.loading import is_local, load_documents, load_model
from sae_lens_e2e.output import claim_output
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.runner import E2ETrainingRunner
from sae_lens_e2e.yaml_file import read_yaml

# Fields that both the run and the SAE have; simple_parsing tells the SAE's apart by this prefix.
_SHARED_WITH_SAE = ("device", "dtype")


def train(arguments: list[str]) -> None:
    """Train one SAE, as the flags and an optional config file say."""
    cfg, overwrite = parse_train(arguments or ["--help"])
    if cfg.output_path is not None:
        claim_output(cfg.output_path, overwrite)
    E2ETrainingRunner(cfg, **_local(cfg)).run()


def _local(cfg: E2ERunnerConfig[Any]) -> dict[str, Any]:
    """The runner's overrides for a model or dataset that SAELens has no name for: the embedded ones, or a folder's."""
    overrides: dict[str, Any] = {}
    if is_local(cfg.model_name):
        assert cfg.llm_device is not None
        overrides["override_model"] = load_model(cfg.model_name, cfg.llm_device)
    if is_local(cfg.dataset_path):
        overrides["override_dataset"], _ = load_documents(cfg.dataset_path, held_out=0)
    return overrides


def parse_train(arguments: Sequence[str]) -> tuple[E2ERunnerConfig[Any], bool]:
    """The config that the flags of `train` mean, and whether a folder that is not ours may be overwritten.

    A file given with --config supplies flags of its own, which those on the command line override.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    from_file, flags = files.parse_known_args(arguments)
    if from_file.config is not None:
        flags = [*config_file_flags(from_file.config), *flags]

    parser = SettingsParser(prog="sae-lens-e2e train", description="Train an SAE with an end-to-end objective.")
    parser.add_argument("--config", metavar="FILE", help="take settings from a YAML or JSON file; flags override it")
    parser.add_argument(
        "--overwrite", action="store_true", help="write to output_path even if what is there is not one of our runs"
    )
    parser.add_arguments(_command_line_config(), dest="cfg")
    parsed = parser.parse_args(flags)
    return parsed.cfg, parsed.overwrite


def config_file_flags(path: Path) -> list[str]:
    """The settings in a YAML or JSON file as command-line flags, the SAE's and the logger's among the others.

    Takes what `E2ERunnerConfig.to_dict` writes, so a run's own runner_cfg.json repeats it. Raises ValueError for a file
    that is no mapping of settings, FileNotFoundError if there is none.
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"--config: {str(path)!r} is not a mapping of settings to values")
    sae, logger = settings.pop("sae", {}), settings.pop("logger", {})
    # Recorded by SAELens for the reader, and taken by no flag.
    sae.pop("metadata", None)
    sae = {f"sae.{name}" if name in _SHARED_WITH_SAE else name: value for name, value in sae.items()}
    if settings.get("seqpos_slice") == [None]:
        # The default, for which there is no way to write a flag.
        del settings["seqpos_slice"]
    return [part for name, value in (settings | sae | logger).items() for part in _flag(name, value)]


def _flag(name: str, value: Any) -> list[str]:
    if value is None:
        return [f"--{name}"]
    if isinstance(value, dict) or name == "exclude_special_tokens":
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}", str(value)]


def _command_line_config() -> type[E2ERunnerConfig[Any]]:
    """E2ERunnerConfig with --architecture choosing the SAE's flags, and SAELens' documentation as their help."""
    architectures: dict[str, Any] = {
        name: partial(config, d_in=512, d_sae=1024) for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()
    }
    documented = {
        parameter.arg_name: parameter.description
        for config in (LanguageModelSAERunnerConfig, E2ERunnerConfig)
        for parameter in parse_docstring(config.__doc__ or "").params
    }
    new_fields: list[tuple[str, Any, Any]] = [
        (
            "sae",
            TrainingSAEConfig,
            simple_parsing.subgroups(architectures, default="standard", alias="--architecture"),
        )
    ]
    for f in dataclasses.fields(E2ERunnerConfig):
        if f.name in ("sae", "objective", "exclude_special_tokens") or f.name not in documented:
            continue
        kept: dict[str, Any] = {"metadata": {**f.metadata, "help": documented[f.name]}}
        if f.default is not dataclasses.MISSING:
            kept["default"] = f.default
        else:
            kept["default_factory"] = f.default_factory
        new_fields.append((f.name, f.type, dataclasses.field(**kept)))
    objective_help = f'{documented["objective"]} As JSON: \'{{"name": "e2e", "kl_coefficient": 2}}\'.'
    objective = simple_parsing.field(default="e2e_ds", type=_objective, metavar="name|json", help=objective_help)
    excluded = simple_parsing.field(
        default=False, type=_yes_or_ids, metavar="bool|[ids]", help=documented["exclude_special_tokens"]
    )
    new_fields += [("objective", str, objective), ("exclude_special_tokens", str, excluded)]
    config = dataclasses.make_dataclass("CommandLineConfig", new_fields, bases=(E2ERunnerConfig,))
    config.__doc__ = "The run. Flags of the SAE itself depend on its architecture: add --architecture NAME to see them."
    return config


def _objective(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else text


def _yes_or_ids(text: str) -> bool | list[int]:
    return yaml.safe_load(text)
