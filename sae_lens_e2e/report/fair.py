"""What makes a comparison fair: means and ranges over seeds, the budgets of training, and how learning rates were chosen."""

import json
from typing import Any

import pandas as pd

from sae_lens_e2e.bench.members import Member
from sae_lens_e2e.evaluation import evaluation_frame
from sae_lens_e2e.evaluation.formats import count, decimals, digits, significant
from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.table import Cell, Column, Table
from sae_lens_e2e.studies.seeds import SEED, spreads
from sae_lens_e2e.sweep.tuning import choice_of

_MEASURES = {"ce_loss_increase": decimals(3), "l0": decimals(1)}


def seeded_frame(results: Results) -> pd.DataFrame:
    """The report's `evaluation_frame`, with the seed that each SAE was trained with, where that is known."""
    seeds = {member.name: member.seed for member in results.members}
    frame = evaluation_frame(results.evaluations)
    return frame.assign(**{SEED: [seeds.get(name) for name in frame["sae"]]}) if len(frame) else frame


def over_seeds(results: Results) -> Table | None:
    """SAEs of one kind and training together: mean and range over seeds, both budgets, and which learning rate won.

    None where each has one seed, and no learning rate was chosen.
    """
    members = [member for member in results.members if member.name in results.evaluations]
    choices = {member.name: _choice(member) for member in members}
    by_kind: dict[str, list[Member]] = {}
    for member in members:
        by_kind.setdefault(_kind(member), []).append(member)
    if all(len(of_kind) == 1 for of_kind in by_kind.values()) and not any(choices.values()):
        return None
    frame = evaluation_frame({member.name: results.evaluations[member.name] for member in members})
    found = spreads(frame.assign(kind=[_kind(member) for member in members]), "kind", tuple(_MEASURES))
    groups: dict[str, list[list[Cell]]] = {}
    for kind, of_kind in by_kind.items():
        first, measured = of_kind[0], found[kind]
        cells: list[Cell] = [first.objective, ", ".join(f"{name} {value:g}" for name, value in first.sparsity.items())]
        cells += [len(of_kind), _lr(first), _chosen_among(choices[first.name]), *_budgets(first)]
        for measure, written in _MEASURES.items():
            spread = measured[measure]
            cells += [spread.mean, f"{written(spread.low)} to {written(spread.high)}" if spread.n > 1 else None]
        groups.setdefault(first.objective, []).append(cells)
    columns = [
        *(
            Column("type"),
            Column("sparsity"),
            Column("seeds", count),
            Column("learning rate", digits),
            Column("chosen among"),
        ),
        *(Column("training tokens", count), Column("training FLOPs", significant(3))),
        *(
            column
            for name, written in _MEASURES.items()
            for column in (Column(MEASURES[name].title, written), Column("range"))
        ),
    ]
    note = (
        "Means, and the lowest and highest, over SAEs that differ in their seed only. A learning rate that was chosen among several had the "
        "lowest CE loss increase, at equal L0, on documents that were neither trained on by the candidates nor are reported here. FLOPs are counted from "
        "shapes, as if each SAE had been trained by itself."
    )
    return Table("seeds", "Over seeds, at which budget and learning rate", columns, list(groups.values()), note)


def _kind(member: Member) -> str:
    """What SAEs have in common that differ in their seed only, budget and learning rate included."""
    return json.dumps([member.kind, _lr(member), *_budgets(member)], default=str)


def _lr(member: Member) -> float | None:
    rate = member.config.get("lr")
    return float(rate) if isinstance(rate, int | float) else None


def _budgets(member: Member) -> list[float | None]:
    """Training tokens and FLOPs, as far as the metadata have them."""
    metadata = member.sae.cfg.metadata
    values = (metadata.training_tokens, metadata.training_flops)
    return [value if isinstance(value, int | float) else None for value in values]


def _choice(member: Member) -> dict[str, Any] | None:
    try:
        return None if member.folder is None else choice_of(member.folder)
    except (OSError, ValueError):
        # Damaged, which says nothing of the SAEs.
        return None


def _chosen_among(choice: dict[str, Any] | None) -> str | None:
    return None if choice is None else ", ".join(f"{float(one['lr']):g}" for one in choice["candidates"])
