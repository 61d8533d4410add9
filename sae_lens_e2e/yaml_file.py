"""Settings in a YAML or JSON file."""

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | Path) -> Any:
    """What a YAML or JSON file holds. Raises FileNotFoundError if there is none, ValueError if it is neither, in one line."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
