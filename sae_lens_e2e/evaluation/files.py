"""Evaluations kept beside the SAEs they are of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sae_lens_e2e.errors import named_line
from sae_lens_e2e.evaluation.result import Evaluation
from sae_lens_e2e.evaluation.together import TogetherEvaluation
from sae_lens_e2e.output import write_whole
from sae_lens_e2e.yaml_file import read_json

FILENAME = "evaluation.json"
TOGETHER_FILENAME = "together.json"

Result = TypeVar("Result")


def write_evaluation(evaluation: Evaluation, folder: str | Path) -> None:
    """Write an evaluation to `evaluation.json` in an SAE's folder."""
    write_whole(Path(folder) / FILENAME, json.dumps(evaluation.to_dict(), indent=1))


def read_evaluation(folder: str | Path) -> Evaluation | None:
    """What `write_evaluation` wrote, or None where there is none. Raises ValueError for a file that is not whole."""
    return _read(Path(folder) / FILENAME, Evaluation.from_dict)


def write_together(evaluation: TogetherEvaluation, folder: str | Path) -> None:
    """Write an evaluation of several SAEs at once to `together.json`, in the folder that theirs are in."""
    write_whole(Path(folder) / TOGETHER_FILENAME, json.dumps(evaluation.to_dict(), indent=1))


def read_together(folder: str | Path) -> TogetherEvaluation | None:
    """What `write_together` wrote, or None where there is none. Raises ValueError for a file that is not whole."""
    return _read(Path(folder) / TOGETHER_FILENAME, TogetherEvaluation.from_dict)


def _read(file: Path, read: Callable[[Any], Result]) -> Result | None:
    if not file.is_file():
        return None
    try:
        return read(read_json(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged or of another version; evaluate again ({named_line(error)})") from error
