"""The configs of `sae-lens-e2e train` as dataclasses whose fields are its flags: that of one SAE, and that of several."""

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, get_type_hints

import simple_parsing
from docstring_parser import parse as parse_docstring
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_e2e.architectures.transcoder import TRANSCODERS
from sae_lens_e2e.cli.parser import nearest
from sae_lens_e2e.finetuning.settings import NOT_ASKED
from sae_lens_e2e.training.config import E2ERunnerConfig
from sae_lens_e2e.training.multi_config import E2EMultiRunnerConfig
from sae_lens_e2e.yaml_file import parse_yaml

_KWARGS = ("model_kwargs", "model_from_pretrained_kwargs")
AS_YAML = (*_KWARGS, "exclude_special_tokens", "saes", "hook_names", "hook_names_out", "hook_head_indices")
"""Flags whose value is a mapping, or one of several kinds of value, written as YAML (or JSON, which is YAML)."""

# What SAELens fills in itself.
_NO_FLAG = ("evaluator", "_hook_names_per_sae", "_hook_head_indices_per_sae")
_HELP_OF_SEVERAL = {
    "saes": "Each SAE's settings by its name, its `architecture` among them; best in the file.",
    "hook_names": "The hook of each SAE by its name, or one hook for them all.",
    "hook_names_out": "The hook that each transcoder writes, by its name, or one hook for them all.",
    "hook_head_indices": "The head of each SAE that has one, by its name, or one for them all.",
}

_WIDTHS = {"d_in": 512, "d_sae": 1024}
_OPTIONAL = ("hook_names_out", "hook_head_indices")


def flags_of_one_sae() -> type[E2ERunnerConfig[Any]]:
    """`E2ERunnerConfig` with --architecture choosing the SAE's flags, and SAELens' documentation as their help."""
    architectures: dict[str, Any] = {
        name: partial(config, **_WIDTHS | ({"d_out": 512} if name in TRANSCODERS else {}))
        for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()
    }
    sae = simple_parsing.subgroups(architectures, default="standard", alias="--architecture")
    config = _flags(E2ERunnerConfig, {"sae": (TrainingSAEConfig, sae)})
    config.__doc__ = "The run. Flags of the SAE itself depend on its architecture: add --architecture NAME to see them."
    return config


def flags_of_several_saes() -> type[E2EMultiRunnerConfig]:
    """`E2EMultiRunnerConfig`, its mappings given as YAML."""
    given: dict[str, tuple[Any, Any]] = {}
    for name, text in _HELP_OF_SEVERAL.items():
        default = None if name in _OPTIONAL else dataclasses.MISSING
        given[name] = (str, _field(default, parsed_yaml, "yaml", text))

    def make_saes(self: E2EMultiRunnerConfig) -> None:
        if not isinstance(self.saes, Mapping):
            raise ValueError(f"saes={self.saes!r} is not a mapping of each SAE's name to its settings")
        self.saes = {str(name): _sae_config(str(name), settings) for name, settings in self.saes.items()}
        E2EMultiRunnerConfig.__post_init__(self)

    config = _flags(E2EMultiRunnerConfig, given, __post_init__=make_saes)
    config.__doc__ = "The run of several SAEs. Settings of each SAE are in the file, under `saes`."
    return config


def flags_of_a_finetune() -> type[E2ERunnerConfig[Any]]:
    """`E2ERunnerConfig` without its SAE and its checks: which of its fields are given is what a finetune goes by."""
    config = _flags(E2ERunnerConfig, {}, left_out=NOT_ASKED, __post_init__=lambda _: None)
    config.__doc__ = (
        "The run. By default as the SAE's metadata and the recipe say (see above), and not as it says here."
    )
    return config


def settings_of_one_sae() -> set[str]:
    """The names of all settings that an SAE has, of whatever architecture."""
    configs = [config for _, config in SAE_TRAINING_CLASS_REGISTRY.values()]
    return {"architecture", *(f.name for config in configs for f in dataclasses.fields(config))}


def _flags(config: type, given: Mapping[str, tuple[Any, Any]], left_out: Collection[str] = (), **namespace: Any) -> Any:
    """A subclass of a config, each of its fields but those `left_out` a flag: as `given` (type and field), or as SAELens documents it."""
    documented = {
        parameter.arg_name: parameter.description or ""
        for documents in (LanguageModelSAERunnerConfig, E2ERunnerConfig)
        for parameter in parse_docstring(documents.__doc__ or "").params
    }
    objective_help = f'{documented["objective"]} As JSON: \'{{"name": "e2e", "kl_coefficient": 2}}\', \'[{{"objective": "local", "until": 0.4}}, {{"objective": "e2e", "lr": 0.001}}]\'.'
    excluded = documented["exclude_special_tokens"]
    given = {
        **given,
        "objective": (str, _field("e2e_ds", _objective, "name|json", objective_help)),
        "exclude_special_tokens": (str, _field(False, parsed_yaml, "bool|[ids]", excluded)),
    }
    types = get_type_hints(config)
    new_fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(config):
        has_default = f.default is not dataclasses.MISSING
        kept: dict[str, Any] = {"default": f.default} if has_default else {"default_factory": f.default_factory}
        if f.name in left_out:
            new_fields.append((f.name, types[f.name], simple_parsing.field(default=None, cmd=False)))
        elif f.name in given:
            type_, field = given[f.name]
            new_fields.append((f.name, type_, field))
        elif f.name in _KWARGS:
            as_yaml = simple_parsing.field(**kept, type=parsed_yaml, metavar="yaml", help=documented[f.name])
            new_fields.append((f.name, str, as_yaml))
        elif f.name in documented:
            kept["metadata"] = {**f.metadata, "help": documented[f.name]}
            new_fields.append((f.name, types[f.name], dataclasses.field(**kept)))
        elif f.name in _NO_FLAG:
            new_fields.append((f.name, types[f.name], simple_parsing.field(**kept, cmd=False)))
    # Of no module, so that nobody reads through one in search of its source, for every flag again.
    namespace["__module__"] = "the command line"
    return dataclasses.make_dataclass("CommandLineConfig", new_fields, bases=(config,), namespace=namespace)


def _field(default: Any, type_: Any, metavar: str, help_: str) -> Any:
    return simple_parsing.field(default=default, type=type_, metavar=metavar, help=help_)


def parsed_yaml(text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        # Of a ValueError argparse says no more than what the text was.
        raise argparse.ArgumentTypeError(str(error)) from error


def _objective(text: str) -> Any:
    return parsed_yaml(text) if text.lstrip().startswith(("{", "[")) else text


def _sae_config(name: str, settings: Any) -> TrainingSAEConfig:
    """One SAE's config from its settings. Raises ValueError, naming the SAE, for one that is unknown or missing."""
    of = f"saes.{name}"
    if not isinstance(settings, Mapping) or "architecture" not in settings:
        raise ValueError(f"{of} has no architecture; it is one of {', '.join(SAE_TRAINING_CLASS_REGISTRY)}")
    architecture = settings["architecture"]
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"{of}.architecture={architecture!r} must be one of {', '.join(SAE_TRAINING_CLASS_REGISTRY)}"
            f"{nearest(str(architecture), SAE_TRAINING_CLASS_REGISTRY)}"
        )
    known = {f.name for f in dataclasses.fields(SAE_TRAINING_CLASS_REGISTRY[architecture][1])} | {"architecture"}
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"{of}.{setting} is no setting of the architecture {architecture}{nearest(setting, known)}"
            )
    try:
        return TrainingSAEConfig.from_dict(dict(settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{of}: {error}") from error
