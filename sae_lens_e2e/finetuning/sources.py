"""The SAEs that are to be finetuned: from wherever they are, each with where it came from, and fit to be trained."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_e2e.architectures.going_on import check_can_go_on
from sae_lens_e2e.loading.released import find_released, released_config, revision_of
from sae_lens_e2e.loading.saes import load_saes

_NEEDED = ("model_name", "hook_name")


@dataclass
class Source:
    """An SAE to start from."""

    sae: SAE[Any]
    """A copy of its own, which may be changed."""
    name: str
    """As it was given: the name of a release and an SAE in it, a folder, one of Apollo's names."""
    revision: str | None = None
    """The commit of its repository on the Hub, if it is from there and that is known."""
    training_tokens: int | None = None
    """On how many tokens it was trained, if what lies beside it says so."""


def collect(
    given: Sequence[str | Path | SAE[Any]], overrides: Mapping[str, Any], device: str = "cpu"
) -> dict[str, Source]:
    """The SAEs at some sources, by names fit for folders: their names in a joint run, or else their hooks.

    `overrides` are settings that stand for what metadata lack. Of released SAEs the configurations are looked at before any weights
    are downloaded. Raises ValueError for an SAE whose metadata lack model or hook, that cannot be trained, or that is of another
    model than the others, and what `load_saes` raises.
    """
    if not given:
        raise ValueError("there is no SAE to finetune; name at least one")
    released = {source: find_released(source) for source in given if isinstance(source, str | Path)}
    models: dict[str, str] = {}
    for source, one in released.items():
        if one is not None:
            cfg = released_config(one)
            models[str(source)] = _check(str(source), cfg["architecture"], cfg.get("metadata", {}), overrides)
    _check_one_model(models)
    sources: dict[str, Source] = {}
    for source in given:
        for name, sae in _load(source, device).items():
            said = sae.get_name() if isinstance(source, SAE) else str(source)
            models[f"{said} ({name})"] = _check(said, sae.cfg.architecture(), sae.cfg.metadata, overrides)
            found = None if isinstance(source, SAE) else released[source]
            revision = None if found is None else revision_of(found)
            tokens = None if isinstance(source, SAE) else _training_tokens(Path(source))
            sources[_unused(name, sources)] = Source(sae, said, revision, tokens)
    _check_one_model(models)
    return sources


def _load(source: str | Path | SAE[Any], device: str) -> dict[str, SAE[Any]]:
    if not isinstance(source, SAE):
        return load_saes(source, device)
    if isinstance(source, TrainingSAE):
        raise ValueError(f"a {type(source).__name__} is a training SAE; give it to a runner as override_sae")
    return {str(source.cfg.metadata.hook_name): copy.deepcopy(source).to(device)}


def _check(source: str, architecture: Any, metadata: Any, overrides: Mapping[str, Any]) -> str:
    """The SAE's model. Raises ValueError for one that cannot be trained, or does not say on which model and where."""
    try:
        check_can_go_on(architecture)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for name in _NEEDED:
        if not overrides.get(name) and not metadata.get(name):
            raise ValueError(f"{source}: the SAE's metadata name no {name}; say which, with {name}= (--{name})")
    return str(overrides.get("model_name") or metadata.get("model_name"))


def _check_one_model(models: Mapping[str, str]) -> None:
    if len(set(models.values())) > 1:
        said = ", ".join(f"{source} is of {model!r}" for source, model in models.items())
        raise ValueError(
            f"SAEs of different models cannot be finetuned together: {said}; finetune them apart, or say with model_name= that it is one"
        )


def _training_tokens(folder: Path) -> int | None:
    """What the settings of the run that an SAE came out of say, in its own folder or, of a joint run, the one above."""
    for place in (folder, folder.parent):
        try:
            tokens = json.loads((place / RUNNER_CFG_FILENAME).read_text()).get("training_tokens")
        except (OSError, ValueError, AttributeError):
            continue
        return tokens if isinstance(tokens, int) and tokens > 0 else None
    return None


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    number, found = 1, name
    while found in taken:
        number, found = number + 1, f"{name}-{number + 1}"
    return found
