"""Whether the fields of a config hold what their annotations say: SAELens' dataclasses take anything."""

import os
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from sae_lens.saes.sae import SAEMetadata

from sae_lens_e2e.devices import check_device_name

# What SAELens takes as well as what it declares, for it makes a str of it; what checks itself has no business here.
_DEVICES = ("device", "llm_device", "act_store_device")
_ALSO: dict[str, Any] = {
    **dict.fromkeys(_DEVICES, torch.device),
    **{"dtype": torch.dtype, "checkpoint_path": os.PathLike, "normalize_activations": str},
}


def check_types(config: Any, declared: type, of: str = "") -> None:
    """Raise ValueError, naming it, for the first field that is not of the type that the class `declared` says.

    An int is fine for a float and a list for a tuple, as JSON and YAML have them; a text for a number and a bool for an int are not.
    Of a field that is a config itself only the class is checked, not what is in it.
    """
    for name, hint in _hints(declared).items():
        value = getattr(config, name)
        if isinstance(hint, type) and is_dataclass(hint):
            if not isinstance(value, hint):
                raise ValueError(f"{of}{name}={value!r} must be a {hint.__name__}, not {_kind(value)}")
        elif not _is(value, hint):
            raise ValueError(
                f"{of}{name}={value!r} must be {_described(hint)}, not {_kind(value)}{_advice(value, hint)}"
            )
    for name in _DEVICES:
        if (device := getattr(config, name, None)) is not None:
            check_device_name(of + name, device)


@cache
def _hints(declared: type) -> dict[str, Any]:
    """The type of each field that anyone sets; of a class whose annotations cannot be read here, nothing."""
    try:
        hints = get_type_hints(declared)
    except (NameError, AttributeError, TypeError):
        return {}
    of_fields = {f.name: hints[f.name] for f in fields(declared) if not f.name.startswith("_")}
    return {name: _bound(hint) | _ALSO[name] if name in _ALSO else _bound(hint) for name, hint in of_fields.items()}


def _bound(hint: Any) -> Any:
    if isinstance(hint, TypeVar):
        return hint.__bound__ or Any
    # Made by SAELens, and free in what it holds.
    return Any if hint is SAEMetadata else hint


@cache
def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    """What checks a type; None for one that pydantic knows nothing of."""
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return None


def _is(value: Any, hint: Any) -> bool:
    if any(isinstance(part, type) and is_dataclass(part) for part in _parts(hint)):
        # Made, or refused, elsewhere: an objective, the SAEs of several.
        return True
    adapter = _adapter(hint)
    if adapter is None:
        return True
    try:
        adapter.validate_python(tuple(value) if isinstance(value, list) and get_origin(hint) is tuple else value)
    except ValidationError:
        return False
    return True


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_described(part) for part in get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "None"
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a text", os.PathLike: "a path"}
    return names.get(hint) or (f"a {hint.__name__}" if isinstance(hint, type) and not get_args(hint) else f"a {hint}")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _advice(value: Any, hint: Any) -> str:
    """What to write where a number was given as a text: YAML takes 1e-3 for one."""
    if isinstance(value, str) and {int, float} & set(_parts(hint)):
        try:
            number = float(value)
        except ValueError:
            return ""
        return f"; write {int(number) if number.is_integer() and abs(number) < 1e15 else number}, without quotes"
    return ""
