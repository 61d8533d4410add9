"""Which objectives there are: the plugin manager, and look-up by name."""

import dataclasses
import difflib
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import FunctionType
from typing import Any

import pluggy

from sae_lens_e2e.errors import one_line
from sae_lens_e2e.objectives import Objective, builtin, hookspecs
from sae_lens_e2e.objectives.hookspecs import PROJECT

OWN_PACKAGE = "sae-lens-e2e"


class PluginWarning(UserWarning):
    """A plugin could not be loaded; the others were."""


@dataclass(frozen=True)
class RegisteredObjective:
    """An objective that can be named in a config, and the package it came from."""

    objective: type[Objective]
    origin: str


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The plugin manager, with the built-in objectives and every installed plugin registered.

    A plugin that cannot be imported is reported as a `PluginWarning` and left out.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(builtin, name=OWN_PACKAGE)
    for entry_point in entry_points(group=PROJECT):
        origin = _origin(entry_point)
        try:
            plugin = entry_point.load()
            name = f"{origin} ({entry_point.name})" if manager.has_plugin(origin) else origin
            if not manager.is_registered(plugin):
                manager.register(plugin, name=name)
        except Exception as error:
            _warn(origin, error)
    return manager


def available_objectives() -> dict[str, RegisteredObjective]:
    """Every objective that a config may name, by name, with the package it came from.

    Raises ValueError if two packages register the same name. A plugin that raises is reported as a `PluginWarning`.
    """
    manager = plugin_manager()
    found: dict[str, RegisteredObjective] = {}
    # pluggy calls the last registered first; in order of registration, our own names come first.
    for origin, plugin in manager.list_name_plugin():
        if plugin is None:
            continue
        others = [p for p in manager.get_plugins() if p is not plugin]
        registered: list[type[Objective]] = []
        try:
            manager.subset_hook_caller("register_objectives", remove_plugins=others)(register=registered.append)
            for objective in registered:
                _check_objective(objective)
        except Exception as error:
            _warn(origin, error)
            continue
        for objective in registered:
            taken = found.get(objective.name)
            if taken is not None and taken.objective is not objective:
                raise ValueError(
                    f"objective {objective.name!r} is registered by both {taken.origin} and {origin}; uninstall one of them"
                )
            found.setdefault(objective.name, RegisteredObjective(objective, origin))
    return found


def get_objective(name: str) -> type[Objective]:
    """The objective class that goes by `name`. Raises ValueError, listing those that exist, if none does."""
    objectives = available_objectives()
    if name not in objectives:
        close = difflib.get_close_matches(name, objectives, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(f"{known!r} ({found.origin})" for known, found in sorted(objectives.items()))
        raise ValueError(f"objective={name!r} is not installed; there are {listed}{hint}")
    return objectives[name].objective


def make_objective(spec: "str | dict[str, Any] | Objective") -> Objective:
    """The objective meant by what a user may write: its name, its `to_dict`, or itself.

    Raises ValueError for an unknown name or setting, TypeError for anything else.
    """
    if isinstance(spec, Objective):
        _check_objective(type(spec))
        return spec
    if isinstance(spec, str):
        return make_objective({"name": spec})
    if not isinstance(spec, dict):
        raise TypeError(
            f"objective={spec!r} must be the name of an objective or an Objective, not {type(spec).__name__}"
        )
    if not isinstance(spec.get("name"), str):
        raise ValueError(f"objective={spec!r} has no 'name'")
    if unnamed := [key for key in spec if not isinstance(key, str)]:
        raise ValueError(f"objective={spec!r}: the setting {unnamed[0]!r} must be a text")
    # JSON has lists where a frozen dataclass had tuples.
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "name"}
    objective = get_objective(spec["name"])
    known = [f.name for f in dataclasses.fields(objective)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"objective {spec['name']!r} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    try:
        return objective(**settings)
    except TypeError as error:
        # A setting without a default, or one of a type that its class does not check.
        raise ValueError(f"objective {spec['name']!r}: {one_line(error)}") from error


def said_of(objective: Objective) -> str:
    """What a message calls an objective: its name, its class, and the package that is to be asked about it."""
    cls = type(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        try:
            origin = next(
                (one.origin for one in available_objectives().values() if one.objective is cls), cls.__module__
            )
        except ValueError:
            # Two packages have one name, which is another matter.
            origin = cls.__module__
    return f"objective {objective.name!r} ({cls.__name__} of {origin})"


def _origin(entry_point: EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else entry_point.name


def _check_objective(objective: Any) -> None:
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise TypeError(f"{objective!r} is not a subclass of sae_lens_e2e.Objective")
    if not isinstance(getattr(objective, "name", None), str):
        raise TypeError(f"{objective.__name__} has no `name`")
    if missing := sorted(getattr(objective, "__abstractmethods__", ())):
        raise TypeError(f"{objective.__name__} does not define `{missing[0]}`")
    for field in dataclasses.fields(objective):
        if isinstance(vars(Objective).get(field.name), property | FunctionType):
            raise TypeError(
                f"{objective.__name__} has a field {field.name!r}, which takes the place of Objective.{field.name}; give the "
                "field another name"
            )


def _warn(origin: str, error: Exception) -> None:
    warnings.warn(
        f"plugin {origin} was left out: {type(error).__name__}: {error}", category=PluginWarning, stacklevel=3
    )
