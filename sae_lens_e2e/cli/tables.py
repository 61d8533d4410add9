"""Evaluations as tables to read in a terminal."""

import pandas as pd

from sae_lens_e2e.evaluation import TogetherEvaluation, together_frame
from sae_lens_e2e.evaluation.measures import MEASURES, SUMMARY


def as_text(frame: pd.DataFrame) -> str:
    """An `evaluation_frame`: what each SAE is, and the measures that say most."""
    columns = {name: frame[name] for name in ("sae", "objective", "d_sae")}
    for measure in (MEASURES[name] for name in (*SUMMARY, "n_tokens")):
        columns[measure.title] = frame[measure.name].map(measure.format)
    return pd.DataFrame(columns).to_string(index=False)


def together_as_text(found: TogetherEvaluation) -> str:
    """What the first, the first two and so on cost."""
    frame = together_frame({"": found})
    rows: pd.DataFrame = frame.loc[frame["spliced"] == "together"]
    columns = {"SAEs": rows["n_saes"], "down to": rows["hook_name"]}
    for measure in (MEASURES[name] for name in ("ce_loss_increase", "kl", "top1_agreement")):
        columns[measure.title] = rows[measure.name].map(measure.format)
    return pd.DataFrame(columns).to_string(index=False)
