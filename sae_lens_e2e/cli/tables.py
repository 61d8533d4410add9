"""Evaluations as tables to read in a terminal."""

from collections.abc import Mapping

import pandas as pd

from sae_lens_e2e.evaluation import TogetherEvaluation, together_frame
from sae_lens_e2e.evaluation.measures import MEASURES, SUMMARY
from sae_lens_e2e.saebench.results import SHOWN, CoreResults


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


def saebench_as_text(found: Mapping[str, CoreResults]) -> str:
    """What SAEBench's core evaluation says of each SAE."""
    columns = {"sae": list(found)}
    for measure in (MEASURES[name] for name in (*SHOWN, "n_tokens")):
        columns[measure.title] = [measure.format(getattr(one, measure.name)) for one in found.values()]
    return pd.DataFrame(columns).to_string(index=False)
