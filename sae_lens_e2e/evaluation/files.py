"""An evaluation kept beside the SAE it is of."""

import json
from pathlib import Path

from sae_lens_e2e.evaluation.result import Evaluation
from sae_lens_e2e.output import written_whole

FILENAME = "evaluation.json"


def write_evaluation(evaluation: Evaluation, folder: str | Path) -> None:
    """Write an evaluation to `evaluation.json` in an SAE's folder."""
    with written_whole(folder) as partial:
        (partial / FILENAME).write_text(json.dumps(evaluation.to_dict(), indent=1))


def read_evaluation(folder: str | Path) -> Evaluation | None:
    """What `write_evaluation` wrote, or None where there is none. Raises ValueError for a file that is not whole."""
    file = Path(folder) / FILENAME
    return Evaluation.from_dict(json.loads(file.read_text())) if file.is_file() else None
