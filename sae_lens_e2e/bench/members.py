"""The SAEs of a report: found in folders, loaded, and checked to be of one model and hook."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_e2e.apollo.run_config import CONFIG_FILENAME, read_run_config
from sae_lens_e2e.apollo.sources import find
from sae_lens_e2e.bench.fingerprint import digest, fingerprint_of_module
from sae_lens_e2e.errors import one_line
from sae_lens_e2e.evaluation.one_pass import sparsity_settings
from sae_lens_e2e.evaluation.running import check_evaluable
from sae_lens_e2e.loading.released import find_released
from sae_lens_e2e.loading.saes import is_sae_folder, load_saes
from sae_lens_e2e.sweep.folders import CHECKPOINTS, FAILURE_FILENAME
from sae_lens_e2e.training.history import read_history
from sae_lens_e2e.yaml_file import read_yaml

LOCAL = "local"
# The paper's order, before objectives of other names.
_OBJECTIVES = (LOCAL, "e2e", "e2e_ds")


@dataclass(frozen=True, eq=False)
class Member:
    """One SAE of a report, and what is known of how it was trained."""

    name: str
    """Short, and no other's."""
    source: str
    sae: SAE[Any]
    config: Mapping[str, Any]
    """The run's settings, as runner_cfg.json or Apollo's final_config.yaml has them; empty if there is none."""

    @property
    def folder(self) -> Path | None:
        """Where the SAE's own files are, if it is one of SAELens' folders."""
        return Path(self.source) if is_sae_folder(self.source) else None

    @property
    def objective(self) -> str:
        """The name of its objective; 'local', which is what SAELens trains, if its metadata name none."""
        named = self.sae.cfg.metadata.objective or {}
        return str((named.get("name") if isinstance(named, Mapping) else named) or LOCAL)

    @cached_property
    def sparsity(self) -> dict[str, float]:
        """What set its sparsity, by the name of the config field."""
        return sparsity_settings(self.sae)

    @property
    def seed(self) -> int | None:
        """The seed it was trained with, if that is known."""
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log of its training; nothing if it has none, or that is damaged."""
        return self._history[0]

    @property
    def history_damage(self) -> str | None:
        """What is wrong with the log of its training, if anything is."""
        return self._history[1]

    @cached_property
    def _history(self) -> tuple[list[dict[str, Any]], str | None]:
        try:
            return (read_history(self.folder) if self.folder is not None else []), None
        except (OSError, ValueError) as error:
            return [], one_line(error)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of its weights and of how it computes."""
        settings = {name: value for name, value in self.sae.cfg.to_dict().items() if name not in ("metadata", "device")}
        return f"{fingerprint_of_module(self.sae)}-{digest(json.dumps(settings, sort_keys=True, default=str))}"

    @property
    def kind(self) -> str:
        """What SAEs have in common that differ in their seed only."""
        objective = self.sae.cfg.metadata.objective or {"name": LOCAL}
        return json.dumps([objective, self.sparsity, self.sae.cfg.architecture(), self.sae.cfg.d_sae], sort_keys=True)


@dataclass(frozen=True)
class Skipped:
    """An SAE that is not in the report, and why."""

    name: str
    reason: str


def collect(
    sources: Sequence[str | Path], device: str = "cpu", hook_name: str | None = None, any_model: bool = False
) -> tuple[list[Member], list[Skipped]]:
    """The SAEs at some sources, and those that cannot be used.

    A source is an SAE's folder, a folder of such folders (a sweep's), a released SAE by name (`find_released`), or anything of Apollo's that
    `load_apollo_sae` takes.
    With `hook_name` only the SAEs at that hook are taken; `any_model` says that the models' names may differ.

    Raises ValueError or OSError for a source that holds no SAE, if the SAEs are of different models or hooks, or if none is left.
    """
    if not sources:
        raise ValueError("there are no sources; name at least one folder")
    places, skipped = _places(sources)
    members: list[Member] = []
    for name, place in short_names(places).items():
        found = _load(name, place, device, hook_name)
        members += found if isinstance(found, list) else []
        skipped += [found] if isinstance(found, Skipped) else []
    if not members:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in skipped) or f"none is at hook_name={hook_name!r}"
        raise ValueError(f"no SAE is left to report on ({reasons})")
    check_one(members, "hook_name", "choose one with hook_name=")
    check_one(members, "hook_name_out", "report on transcoders of one hook to another")
    check_one(members, "hook_head_index", "report on one head at a time")
    if not any_model:
        check_one(members, "model_name", "if these are one model, say which with model=")
    return sorted(members, key=_order), skipped


def _load(name: str, place: str, device: str, hook_name: str | None) -> list[Member] | Skipped:
    """The SAEs at one place, or why they cannot be used."""
    try:
        saes = load_saes(place, device)
        config = _config(place)
        chosen = {hook: sae for hook, sae in saes.items() if hook_name in (None, hook)}
        named = {f"{name}@{hook}" if len(chosen) > 1 else name: sae for hook, sae in chosen.items()}
        members = [Member(full_name, place, sae, config) for full_name, sae in named.items()]
        for member in members:
            _check_usable(name, member.sae)
            # What is in the metadata has been written by anyone.
            _ = (_order(member), member.kind, member.fingerprint)
    except Exception as error:  # whatever is wrong with one SAE does not concern the others
        return Skipped(name, one_line(error))
    return members


def objective_order(names: Iterable[str]) -> list[str]:
    """Objectives in the paper's order, then by name."""
    return sorted(set(names), key=lambda name: (_rank(name), name))


def _places(sources: Sequence[str | Path]) -> tuple[list[str], list[Skipped]]:
    """Where each SAE is, once each, and the parts of sweeps that have none."""
    places: dict[str, None] = {}
    skipped: list[Skipped] = []
    for source in map(str, sources):
        if is_sae_folder(source):
            places[source] = None
            continue
        children = sorted(child for child in Path(source).glob("*") if child.is_dir())
        inside = [str(child) for child in children if is_sae_folder(child) or _is_apollo_run(child)]
        unusable = [Skipped(child.name, why) for child in children if (why := _unusable(child)) is not None]
        if not inside and unusable:
            raise ValueError(f"{source} holds no finished SAE; {unusable[0].name}: {unusable[0].reason}")
        if not inside:
            _check_source(source)
        places |= dict.fromkeys(inside or [source])
        skipped += unusable
    return list(places), skipped


def _check_source(source: str) -> None:
    try:
        if find_released(source) is None:
            find(source)
    except (OSError, ValueError) as error:
        raise type(error)(f"{source!r} is no SAE, nor a folder of them: {one_line(error)}") from error


def _is_apollo_run(folder: Path) -> bool:
    return (folder / CONFIG_FILENAME).is_file() and any(folder.glob("samples_*.pt"))


def _unusable(folder: Path) -> str | None:
    """Why a part of a sweep has no SAE; None if it has one, or is no part of a sweep."""
    if is_sae_folder(folder) or _is_apollo_run(folder):
        return None
    if (folder / FAILURE_FILENAME).is_file():
        return f"its training failed: {(folder / FAILURE_FILENAME).read_text(errors='replace').strip()}"
    if (folder / CHECKPOINTS).is_dir():
        return "its training is not finished; run the sweep again"
    for missing, present in ((SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME), (SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME)):
        if (folder / present).is_file():
            return f"it has {present} and no {missing}"
    return None


def short_names(places: Sequence[str]) -> dict[str, str]:
    """Each place by the shortest end of its path that no other has."""
    parts = {place: Path(place).absolute().parts if Path(place).exists() else (place,) for place in places}
    names: dict[str, str] = {}
    for place in places:
        length = 1
        while any(
            other != place and parts[other][-length:] == parts[place][-length:] and length < len(parts[place])
            for other in places
        ):
            length += 1
        names["/".join(parts[place][-length:])] = place
    return names


def _config(place: str) -> Mapping[str, Any]:
    """The settings that an SAE was trained with, or nothing if they are not there."""
    try:
        if is_sae_folder(place):
            config = read_yaml(Path(place) / RUNNER_CFG_FILENAME)
            return config if isinstance(config, dict) else {}
        return read_run_config(find(place).config)
    except (OSError, ValueError):
        return {}


def _check_usable(name: str, sae: SAE[Any]) -> None:
    """Raises ValueError for an SAE that nothing can be measured of."""
    check_evaluable(name, sae)
    if not bool(sae.W_dec.any()):
        raise ValueError("its dictionary has no live feature: every row of W_dec is zero")
    if sae.cfg.metadata.hook_name is None:
        raise ValueError("its metadata do not say at which hook it sits")


def check_one(members: Sequence[Member], field: str, advice: str) -> None:
    """Raise ValueError, saying what to do, for SAEs of which a field of the metadata is not the same."""
    first: dict[Any, str] = {}
    for member in members:
        first.setdefault(member.sae.cfg.metadata[field], member.name)
    if len(first) > 1:
        each = ", ".join(f"{name} has {value!r}" for value, name in first.items())
        raise ValueError(f"SAEs of different {field} cannot be compared ({each}); {advice}")


def _order(member: Member) -> tuple[Any, ...]:
    return (
        _rank(member.objective),
        member.objective,
        *member.sparsity.values(),
        -1 if member.seed is None else member.seed,
    )


def _rank(objective: str) -> int:
    return _OBJECTIVES.index(objective) if objective in _OBJECTIVES else len(_OBJECTIVES)
