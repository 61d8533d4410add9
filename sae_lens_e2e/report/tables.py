"""The tables of the paper, made of the SAEs at hand."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sae_lens_e2e.bench.members import Member, objective_order
from sae_lens_e2e.evaluation import Evaluation, together_frame
from sae_lens_e2e.evaluation.formats import count, decimals, digits, significant
from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.report.fair import over_seeds, seeded_frame
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.selection import SIMILAR, baseline_of, factor, nearest
from sae_lens_e2e.report.table import Cell, Column, Table
from sae_lens_e2e.saebench.results import SHOWN, CoreResults
from sae_lens_e2e.studies.pareto import comparison_frame, headline

SECONDS = "details/seconds"
"""The column of a run's history that has how long it has trained."""

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def all_saes(results: Results) -> Table:
    """Every SAE, in the shape of the paper's tables 1 to 4."""
    columns = _columns(results)
    rows = [
        [_row(results, member) for member in results.members if member.objective == objective]
        for objective in objective_order(member.objective for member in results.members)
    ]
    note = (
        "Alive: fired at least once on the first 500,000 tokens evaluated, or on all if there are fewer. CE loss increase: "
        "nats a token that splicing in the SAE costs."
    )
    return Table("saes", "All SAEs", columns, rows, note, paper="tables 1 to 4")


def similar_ce(results: Results) -> Table:
    """For each SAE of another objective the local one nearest in CE loss increase: table 2."""
    return _similar(results, "ce_loss_increase", "l0", "similar_ce", "table 2")


def similar_l0(results: Results) -> Table:
    """For each SAE of another objective the local one nearest in L0: table 3."""
    return _similar(results, "l0", "ce_loss_increase", "similar_l0", "table 3")


def at_equal(results: Results) -> Table:
    """What an SAE of each objective needs, along its front, at equal cost and at equal sparsity."""
    baseline = baseline_of(results.evaluations)
    frame = comparison_frame(headline(seeded_frame(results), baseline))
    columns = [
        *(Column("type"), Column("measure"), Column("at equal"), Column("of", significant(3))),
        *(Column("its own", significant(4)), Column(f"{baseline}’s", significant(4)), Column("ratio", decimals(2))),
        Column("remark"),
    ]
    groups = [
        list(map(_compared, rows.to_dict("records"))) for _, rows in frame.groupby(["other", "measure"], sort=False)
    ]
    note = "Interpolated between neighbouring SAEs of each front; nothing is extrapolated."
    if frame["beyond_seeds"].notna().any():
        note += " Means over seeds, each with a front of its own; the remark says whether the difference is larger than the larger of both ranges."
    return Table("at_equal", f"Against {baseline}, at equal cost and at equal sparsity", columns, groups, note)


def l2_ratio(results: Results) -> Table:
    """Length and direction of the output against the input, of the SAEs that are looked at closely: table 5, figure 11."""
    measures = ("l2_ratio_first", "l2_ratio_later", "cosine_first", "cosine_later")
    columns = [*_what(results), *map(_column, measures)]
    rows = [
        [*_which(results, one), *(getattr(results.evaluations[one.name].at_hook, measure) for measure in measures)]
        for one in results.close
    ]
    note = "‖x̂‖/‖x‖ and the cosine of x̂ and x, means over tokens; 1 is perfect."
    return Table("l2_ratio", "Length and direction of the output", columns, [rows], note, paper="table 5")


def replacement(results: Results) -> Table:
    """What SAEs that were trained together cost at once, one more at a time, and each alone."""
    measures = ("ce_loss_increase", "kl", "top1_agreement")
    columns = [Column("run"), Column("spliced in"), Column("SAEs", count), Column("down to"), *map(_column, measures)]
    frame = together_frame(results.together)
    groups = [
        [
            [row[name] for name in ("group", "spliced", "n_saes", "hook_name", *measures)]
            for row in rows.to_dict("records")
        ]
        for _, rows in frame.groupby(["group", "spliced"], sort=False)
    ]
    note = "As `sae-lens-e2e evaluate` left it beside the SAEs: the first, the first two and so on, in order of depth, and each alone."
    return Table("replacement", "Several at once", columns, groups, note)


def saebench(results: Results) -> Table:
    """What SAEBench's core evaluation says, beside ours."""
    columns = [
        *_what(results),
        *(
            Column(f"{MEASURES[measure].label}, {whose}", MEASURES[measure].format)
            for measure in SHOWN
            for whose in ("ours", "SAEBench’s")
        ),
    ]
    rows = [
        [*_which(results, one), *_beside_ours(results.evaluations[one.name], results.saebench[one.name])]
        for one in results.members
        if one.name in results.saebench
    ]
    note = "On the same tokens; SAEBench takes the mean over those that are not BOS, EOS or padding."
    return Table("saebench", "SAEBench’s core evaluation", columns, [rows], note)


def _beside_ours(ours: Evaluation, core: CoreResults) -> list[float]:
    at_hook = {"cosine": ours.at_hook.cosine}
    return [
        value for measure in SHOWN for value in (at_hook.get(measure) or getattr(ours, measure), getattr(core, measure))
    ]


def geometry(results: Results) -> Table:
    """How near live features have their nearest neighbour: figure 3 in numbers."""
    columns = [
        *_what(results),
        *(Column("nearest in"), Column("of"), Column("live features", count)),
        *(Column("mean cosine", decimals(3)), Column("95 %", decimals(3))),
    ]
    where = {
        "same dictionary": "its own dictionary",
        "another seed": "another seed’s",
        "another kind": "another objective’s",
    }
    rows = {
        member.objective: [
            [
                *_which(results, one),
                *(where[found.kind], "" if found.kind == "same dictionary" else _named(results, found.compared_with)),
                *(len(found.features), found.interval.mean, f"[{found.interval.low:.3f}, {found.interval.high:.3f}]"),
            ]
            for kind in where
            for one in results.members
            if one.objective == member.objective
            for found in results.geometry.get(one.name, ())
            if found.kind == kind
        ]
        for member in results.members
    }
    note = "Each live feature’s largest cosine similarity to another live one, the mean over features and its bootstrap interval."
    return Table("geometry", "Nearest features", columns, list(filter(None, rows.values())), note, paper="figure 3")


def training_time(results: Results) -> Table | None:
    """How long each SAE that is looked at closely was trained, table 6; None if that is not known of any."""
    hours = {member.name: training_hours(member) for member in results.members}
    if not any(hours.values()):
        return None
    columns = [*_what(results), Column("hours", decimals(2))]
    rows = [[*_which(results, one), hours[one.name]] for one in results.members if hours[one.name]]
    note = "Wall-clock time as the runs logged it; SAEs that were trained together shared it."
    return Table("training_time", "Training time", columns, [rows], note, paper="table 6")


def training_hours(member: Member) -> float | None:
    """How long an SAE was trained, if its history has it."""
    seconds = [row[SECONDS] for row in member.history if math.isfinite(row.get(SECONDS, math.nan))]
    return float(seconds[-1]) / 3600 if seconds else None


def faithfulness(results: Results) -> Table:
    """How much of subject-verb agreement is left, by construction, of the SAEs that are looked at closely: table 7."""
    members = [one for one in results.close if one.name in results.faithfulness]
    found = [results.faithfulness[one.name] for one in members]
    templates = [*dict.fromkeys(name for one in found for name in one.templates), "overall"]
    tasks = {name: [(one.templates | {"overall": one.overall})[name] for one in found] for name in templates}
    columns = [
        *(Column("construction"), Column("pairs", count), Column("logit difference", decimals(2))),
        *(Column(title, decimals(2)) for one in members for title in (results.labels[one.name], "95 %")),
    ]
    rows = [
        [
            *(name.replace("_", " "), of_template[0].n_pairs, of_template[0].original.logit_difference),
            *(cell for task in of_template for cell in (task.faithfulness, _bounds(task.low, task.high))),
        ]
        for name, of_template in tasks.items()
    ]
    undefined = [f"{name.replace('_', ' ')} is {task.note}." for name, (task, *_) in tasks.items() if task.note]
    note = (
        "The part of the original model’s logit difference (right less wrong verb, nats) over a mean-ablated baseline that is left "
        "with the SAE: 1 is all of it."
    )
    note = " ".join([note, *(text[0].upper() + text[1:] for text in undefined)])
    return Table(
        "faithfulness", "Faithfulness on subject-verb agreement", columns, [rows[:-1], rows[-1:]], note, paper="table 7"
    )


def _similar(results: Results, equal: str, measure: str, name: str, paper: str) -> Table:
    """Baseline SAEs, each with those of other objectives that it is the nearest to in `equal`, if they are near."""
    baseline, noun = baseline_of(results.evaluations), MEASURES[equal].label
    groups: dict[str, list[str]] = {}
    far = []
    for other, of_baseline in nearest(results.evaluations, equal).items():
        values = (getattr(results.evaluations[one], equal) for one in (other, of_baseline))
        (groups.setdefault(of_baseline, []) if factor(*values) <= SIMILAR else far).append(other)
    columns = [*_columns(results), Column(f"{MEASURES[measure].label} ratio", decimals(2))]
    rows = [
        [
            [*_row(results, results.member(one)), _fraction(results.evaluations, one, member.name, measure)]
            for one in (member.name, *groups[member.name])
        ]
        for member in results.members
        if member.name in groups
    ]
    note = f"Each SAE of another objective under the {baseline} one nearest to it in {noun}; the ratio is to that one."
    if far:
        note += f" Left out: {len(far)} whose nearest has more than {SIMILAR} times as much, or as little."
    return Table(name, f"Similar {noun}", columns, rows, note, paper=paper)


def _compared(row: Mapping[str, Any]) -> list[Cell]:
    """A row of a `comparison_frame`."""
    median = "median" if row["is_median"] else ""
    seeds = {True: "larger than the seeds’ range", False: "within the seeds’ range"}.get(row["beyond_seeds"], "")
    remark = row["reason"] if isinstance(row["reason"], str) else ", ".join(filter(None, (median, seeds)))
    numbers = [row[name] for name in ("value", "other_value", "baseline_value", "ratio")]
    return [row["other"], MEASURES[row["measure"]].title, MEASURES[row["equal"]].title, *numbers, remark]


def _named(results: Results, name: str) -> str:
    """An SAE as one says it in a cell."""
    member = results.member(name)
    sparsity = ", ".join(f"{value:g}" for value in member.sparsity.values())
    return " ".join(filter(None, [member.objective, sparsity, "" if member.seed is None else f"seed {member.seed}"]))


def _fraction(evaluations: Mapping[str, Evaluation], one: str, other: str, measure: str) -> float | None:
    reference = getattr(evaluations[other], measure)
    return getattr(evaluations[one], measure) / reference if one != other and reference > 0 else None


def _columns(results: Results) -> list[Column]:
    alive = [Column("alive", count), Column("of", count)]
    return [*_what(results), _column("l0"), *alive, _column("ce_loss_increase")]


def _column(measure: str) -> Column:
    return Column(MEASURES[measure].label, MEASURES[measure].format)


def _row(results: Results, member: Member) -> list[Cell]:
    found = results.evaluations[member.name]
    return [*_which(results, member), found.l0, found.n_alive, found.d_sae, found.ce_loss_increase]


def _what(results: Results) -> list[Column]:
    """Columns that say which SAE it is; the seed and the name only where these are needed to tell."""
    return [
        *(Column("layer"), Column("type"), Column(_sparsity_title(results.members), digits)),
        *([Column("seed", digits)] if _has_seeds(results) else []),
        *([Column("SAE")] if _needs_names(results) else []),
    ]


def _which(results: Results, member: Member) -> list[Cell]:
    values = list(member.sparsity.values())
    one = values[0] if len(values) == 1 and len({tuple(m.sparsity) for m in results.members}) == 1 else None
    several = ", ".join(f"{name} {value:g}" for name, value in member.sparsity.items()) or None
    return [
        *(layer(member), member.objective, one if one is not None else several),
        *([member.seed] if _has_seeds(results) else []),
        *([member.name] if _needs_names(results) else []),
    ]


def layer(member: Member) -> str:
    """The number of the block that an SAE's hook is in, or the hook."""
    hook = str(member.sae.cfg.metadata.hook_name)
    block = _BLOCK.search(hook)
    return block[1] if block else hook


def _sparsity_title(members: Sequence[Member]) -> str:
    names = {tuple(member.sparsity) for member in members}
    only = names.pop() if len(names) == 1 else ()
    return only[0] if len(only) == 1 else "sparsity"


def _has_seeds(results: Results) -> bool:
    return len({member.seed for member in results.members}) > 1


def _needs_names(results: Results) -> bool:
    told = [(member.objective, tuple(member.sparsity.items()), member.seed) for member in results.members]
    return len(set(told)) < len(told)


def _bounds(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def tables(results: Results) -> Iterator[Table]:
    """Every table that there is something for, in the order of the page."""
    if results.evaluations:
        yield all_saes(results)
        if (of_kinds := over_seeds(results)) is not None:
            yield of_kinds
        if len({member.objective for member in results.members}) > 1:
            yield from (table for table in (similar_ce(results), similar_l0(results)) if table.groups)
            yield at_equal(results)
        yield l2_ratio(results)
    if results.saebench:
        yield saebench(results)
    if results.together:
        yield replacement(results)
    if results.geometry:
        yield geometry(results)
    if results.faithfulness:
        yield faithfulness(results)
    if (time := training_time(results)) is not None:
        yield time
