"""The course of a training run, kept beside the SAE: losses and metrics by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lens_e2e.errors import one_line

FILENAME = "history.csv"


def write_history(rows: Sequence[Mapping[str, Any]], folder: str | Path) -> None:
    """Write a run's log, a row a logged step, to `history.csv` in `folder`."""
    pd.DataFrame(rows).to_csv(Path(folder) / FILENAME, index=False)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """What `write_history` wrote; nothing where there is no such file, or nothing had been logged.

    Raises ValueError, naming the file, for one that is damaged.
    """
    file = Path(folder) / FILENAME
    try:
        table = pd.read_csv(file, float_precision="round_trip")
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return []
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}); remove it, or copy it again") from error
    if "step" not in table or len(table.select_dtypes("number").columns) < len(table.columns):
        raise ValueError(f"{file} is damaged: it has something else than numbers by step; remove it, or copy it again")
    return table.to_dict("records")
