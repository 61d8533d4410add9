"""Settings in a YAML or JSON file, or in such text, and JSON files of any kind."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

# Settings are small. What is larger, or deeper, was written to fill the memory of whoever reads it.
_MOST_CHARACTERS, _MOST_VALUES, _DEEPEST = 1_000_000, 100_000, 50


def read_yaml(path: str | Path) -> Any:
    """What a YAML or JSON file holds. Raises FileNotFoundError if there is none, ValueError if it is neither, in one line."""
    try:
        return parse_yaml(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises OSError if it cannot be read, ValueError, naming it, if it is no JSON or nested too deep."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON ({error}); copy it again, or make it anew") from error
    except RecursionError:
        raise ValueError(f"{path} is damaged: it is nested too deep; copy it again, or make it anew") from None


def parse_yaml(text: str) -> Any:
    """What JSON or else YAML text says. Raises ValueError, in one line, for what is neither, or too large or deep for settings."""
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"has {len(text):,} characters, and settings have {_MOST_CHARACTERS:,} at most; shorten it")
    try:
        value = _parse(text)
    except RecursionError:
        raise _too_deep() from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    layer, depth = [value], 0
    while layer := [inner for outer in layer for inner in _inside(outer)]:
        depth += 1
        if depth > _DEEPEST:
            raise _too_deep()
    return value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return yaml.load(text, _Loader)


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _too_deep() -> ValueError:
    return ValueError(f"is nested more than {_DEEPEST} deep, and settings are not; flatten it")


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes `1e-3` for the number it is, as YAML 1.2 does, and no more values than settings have.

    What an alias stands for is counted each time: a few lines of aliases to aliases are billions of values.
    """

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._n_values = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As in PyYAML, counting."""
        is_alias, before = self.check_event(yaml.AliasEvent), self._n_values
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias stands for what it is part of; write it out")
        self._n_values += self._sizes[id(node)] if is_alias else 1
        if self._n_values > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES:,} values; write out what is meant")
        self._sizes.setdefault(id(node), self._n_values - before)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
