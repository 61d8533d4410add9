"""What a report has measured, kept beside it so that the same call does not measure it again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sae_lens_e2e import __version__
from sae_lens_e2e.bench.fingerprint import digest
from sae_lens_e2e.output import write_whole
from sae_lens_e2e.yaml_file import read_json

Result = TypeVar("Result")


class Store:
    """JSON files in a folder, one for each SAE, measure and settings."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Result]) -> Result | None:
        """What was put under `key`, made by `read` from its figures; None if nothing was, or it cannot be read any more."""
        try:
            return read(read_json(self._file(key))["figures"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Keep JSON-ready figures under `key`, which names the `measure`, the SAE and everything that they depend on."""
        write_whole(self._file(key), json.dumps({"key": key, "figures": figures}, default=str))

    def _file(self, key: Mapping[str, Any]) -> Path:
        # Another version may measure otherwise.
        text = json.dumps([__version__, key], sort_keys=True, default=str)
        return self.folder / f"{key['measure']}-{digest(text)}.json"
