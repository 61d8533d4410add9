"""What a finetune has changed: the SAEs before and after, in one table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_e2e.evaluation import Evaluation, TogetherEvaluation
from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.markdown import code, plain

TOGETHER = "all together"
_SHOWN = (
    *("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_increase", "kl", "l0", "n_alive", "fraction_alive"),
    "n_tokens",
)
_NOTHING = "—"


@dataclass
class Finetuned:
    """SAEs before and after they were finetuned, by name, evaluated on the same held-out tokens."""

    saes: dict[str, SAE[Any]]
    """After, as anyone would load them."""
    sources: dict[str, SAE[Any]]
    """Before, with what had to be folded in."""
    before: dict[str, Evaluation]
    after: dict[str, Evaluation]
    folders: dict[str, Path] = field(default_factory=dict)
    """Where each was saved; none if `output_path` is None."""
    together_before: TogetherEvaluation | None = None
    """All of them spliced in at once, if there are several."""
    together_after: TogetherEvaluation | None = None
    notes: list[str] = field(default_factory=list)
    """What was chosen and done, a sentence each."""

    def table(self) -> str:
        """Before and after in Markdown: what each SAE costs the model, what fires, and how far each later layer moves."""
        columns: dict[str, dict[str, str]] = {}
        several = len(self.before) > 1
        for name in self.before:
            for when, found in (("before", self.before), ("after", self.after)):
                columns[f"{plain(name)} {when}" if several else when] = _column(found[name])
        for when, together in (("before", self.together_before), ("after", self.together_after)):
            if together is not None:
                columns[f"{TOGETHER} {when}"] = _column_of_all(together)
        rows = list(dict.fromkeys(row for column in columns.values() for row in column))
        # What all have, and then the layers, in order of depth.
        cells = [["", *columns], *([row, *(c.get(row, _NOTHING) for c in columns.values())] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
        return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]])

    def summary(self) -> str:
        """The table, and what was chosen and done."""
        return "\n".join([self.table(), "", *(f"- {plain(note)}" for note in self.notes)])


def card(finetuned: Finetuned, name: str, provenance: Mapping[str, Any]) -> str:
    """The README of a finetuned SAE's folder: what it came from, by what, and before and after."""
    rows = [f"| {plain(key)} | {plain(str(value))} |" for key, value in provenance.items() if value is not None]
    return "\n".join(
        [
            f"# {plain(name)}",
            "",
            f"An SAE that was finetuned from {code(str(provenance['source']))} with sae-lens-e2e; `sae_lens.SAE.load_from_disk` loads it.",
            "",
            "| | |",
            "| --- | --- |",
            *rows,
            "",
            "On held-out documents, the same tokens before and after:",
            "",
            finetuned.summary(),
            "",
        ]
    )


def _column(evaluation: Evaluation) -> dict[str, str]:
    shown = {MEASURES[name].title: MEASURES[name].format(getattr(evaluation, name)) for name in _SHOWN}
    mse = MEASURES["mse"]
    return shown | {f"{mse.label} at {hook}": mse.format(layer.mse) for hook, layer in evaluation.layers.items()}


def _column_of_all(evaluation: TogetherEvaluation) -> dict[str, str]:
    values = {
        "ce_loss_without_sae": evaluation.ce_loss_without_saes,
        "ce_loss_with_sae": evaluation.together[-1].ce_loss,
        "ce_loss_increase": evaluation.ce_loss_increase,
        "kl": evaluation.together[-1].kl,
        "n_tokens": evaluation.n_tokens,
    }
    return {MEASURES[name].title: MEASURES[name].format(value) for name, value in values.items()}
