"""The course of a training run, kept beside the SAE: losses and metrics by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

FILENAME = "history.csv"


def write_history(rows: Sequence[Mapping[str, Any]], folder: str | Path) -> None:
    """Write a run's log, a row a logged step, to `history.csv` in `folder`."""
    pd.DataFrame(rows).to_csv(Path(folder) / FILENAME, index=False)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """What `write_history` wrote; nothing where there is no such file, or nothing had been logged."""
    try:
        return pd.read_csv(Path(folder) / FILENAME, float_precision="round_trip").to_dict("records")
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return []
