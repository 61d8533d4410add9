"""What a frame must hold to be drawn."""

import pandas as pd


def require(frame: pd.DataFrame, source: str, *columns: str) -> pd.DataFrame:
    """The frame, its rows numbered from 0. Raises ValueError if it has no rows, or not these columns and `sae`.

    `source` says what makes such a frame.
    """
    if missing := [name for name in ("sae", *columns) if name not in frame]:
        raise ValueError(f"the frame has no column {', '.join(missing)}; this figure takes {source}")
    if len(frame) == 0:
        raise ValueError(f"the frame has no rows, so there is nothing to draw; this figure takes {source}")
    return frame.reset_index(drop=True)


def with_objectives(frame: pd.DataFrame, evaluations: pd.DataFrame) -> pd.DataFrame:
    """A frame with a column `sae`, and the objective of each from an `evaluation_frame`, by which figures colour SAEs."""
    require(frame, "a frame with the SAEs' names")
    objectives = dict(zip(evaluations["sae"], evaluations["objective"], strict=True))
    return frame.assign(objective=frame["sae"].map(objectives))
