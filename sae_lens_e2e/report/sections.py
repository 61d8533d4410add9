"""What stands where on the page."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sae_lens_e2e.bench.bench import Bench
from sae_lens_e2e.report import published
from sae_lens_e2e.report.drawings import FOLDER, Drawing
from sae_lens_e2e.report.findings import Finding
from sae_lens_e2e.report.page import (
    Section,
    code,
    figure,
    finding_list,
    folded_table,
    named_list,
    plain_table,
    table,
)
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.selection import SIMILAR, spread
from sae_lens_e2e.report.settings import settings_tables, training_commands, versions
from sae_lens_e2e.report.table import Table

PAPER = (
    "Braun, Taylor, Goldowsky-Dill and Sharkey (2024), Identifying Functionally Important Features with End-to-End Sparse "
    "Dictionary Learning, arXiv 2405.12241"
)
# Title, then the figures and tables under it, by name.
_CONTENT = {
    "cost": ("Cost and sparsity", ("pareto",), ("saes", "seeds", "similar_ce", "similar_l0", "at_equal", "saebench")),
    "layers": ("Later layers", ("layers",), ()),
    "together": ("Several at once", ("replacement",), ("replacement",)),
    "features": ("Features", ("geometry", "firing"), ("geometry",)),
    "output": ("Length and direction", ("norms",), ("l2_ratio",)),
    "directions": ("Principal directions", ("directions",), ()),
    "faithfulness": ("Faithfulness", (), ("faithfulness",)),
    "training": ("Training", ("history",), ("training_time",)),
}


def sections(
    results: Results,
    findings: Sequence[Finding],
    drawings: Sequence[Drawing],
    tables: Sequence[Table],
    command: str,
    data_folder: str,
) -> list[Section]:
    """The page's sections, those left out that there is nothing for."""
    return [
        _findings(results, findings),
        *_content(results, drawings, tables, data_folder),
        *_left_out(results),
        _settings(results),
        _reproduce(results, command, data_folder),
    ]


def facts(results: Results, bench: Bench) -> list[tuple[str, str]]:
    """What was measured on what."""
    clean = [found.ce_loss_without_sae for found in results.evaluations.values()][:1]
    return [
        ("language model", bench.short_model_name),
        ("hook", bench.setting.hook_name),
        ("dataset, held-out part", "/".join(Path(bench.dataset_name).parts[-2:])),
        *([("caution", bench.caveat)] if bench.caveat else []),
        ("tokens", f"{bench.n_tokens:,} in prompts of {bench.setting.context_size}"),
        ("SAEs", f"{len(results.members)}" + (f", {len(results.skipped)} left out" if results.skipped else "")),
        *(("CE loss of the model alone", f"{loss:.4f} nats a token") for loss in clean),
    ]


def lead(findings: Sequence[Finding]) -> str:
    """What the report says, in one paragraph."""
    if not findings:
        return "What each SAE costs its language model, and what it keeps."
    counts = Counter(finding.verdict for finding in findings)
    words = {
        "agrees": ("agrees with the paper", "agree with the paper"),
        "agrees in part": ("agrees in part", "agree in part"),
        "does not agree": ("does not agree", "do not agree"),
        "cannot be said": ("cannot be said from these SAEs", "cannot be said from these SAEs"),
    }
    tally = [
        f"{counts[verdict]} {one if counts[verdict] == 1 else several}"
        for verdict, (one, several) in words.items()
        if counts[verdict]
    ]
    headlines = [finding.headline for finding in findings if finding.headline]
    return " ".join([*headlines, f"Of {len(findings)} claims {', '.join(tally)}."])


def _findings(results: Results, findings: Sequence[Finding]) -> Section:
    text = (
        f"Each is held against what {PAPER} found on {published.MODEL}. “Agrees in part” means the same direction, and a smaller effect "
        "than at any of the paper’s layers, or some of the layers only."
    )
    missing = [name for name in published.SIMILAR_CE if name not in {member.objective for member in results.members}]
    if not results.evaluations:
        text = "Without the evaluation, which was left out, nothing can be held against the paper."
    elif not findings:
        text = f"Nothing can be held against what {PAPER} found, which is of end-to-end SAEs against local ones."
    if missing and results.evaluations:
        text += (
            f" What the paper says of {' and '.join(missing)} cannot be said from these SAEs: there is none among them."
        )
    return Section("findings", "Findings", (text,), [finding_list(findings)] if findings else ())


def _content(
    results: Results, drawings: Sequence[Drawing], tables: Sequence[Table], data_folder: str
) -> Iterable[Section]:
    by_name = {one.name: one for one in drawings}
    tables_by_name = {one.name: one for one in tables}
    for section, (title, figures, names) in _CONTENT.items():
        shown = [_figure(by_name.pop(name), data_folder) for name in figures if name in by_name]
        parts = [*shown, *(table(tables_by_name[name]) for name in names if name in tables_by_name)]
        texts = [_training_time_is_unknown()] if section == "training" and "training_time" not in tables_by_name else []
        if section == "cost" and parts:
            texts = [_closely(results)]
        if parts:
            yield Section(section, title, texts, parts)
    if by_name:
        # Of a kind that this version does not know where to put.
        yield Section("figures", "More figures", (), [_figure(one, data_folder) for one in by_name.values()])


def _figure(drawing: Drawing, data_folder: str) -> dict[str, Any]:
    return figure(drawing, f"For print: {data_folder}/{FOLDER}/{drawing.name}.pdf")


def _closely(results: Results) -> str:
    """Which SAEs the other sections are about, and why these."""
    if len(results.compared) < 2 or len({one.objective for one in results.close}) < 2:
        return "All figures are of all SAEs."
    named = ", ".join(
        f"{one.name} (CE loss increase {results.evaluations[one.name].ce_loss_increase:.3g} nats)"
        for one in results.close
    )
    apart = spread(results.evaluations, results.compared)
    text = f"The sections after this one look closely at one SAE of each objective, as near to each other in CE loss increase as there are: {named}."
    if apart > SIMILAR:
        text += f" They are {apart:.3g} times apart, which is not similar: read the comparisons with care."
    return text


def _training_time_is_unknown() -> str:
    return "How long training took is not in these runs’ histories, so there is no table of training times (table 6 of the paper)."


def _left_out(results: Results) -> Iterable[Section]:
    parts = []
    if results.skipped:
        parts.append(named_list([(one.name, one.reason) for one in results.skipped]))
    if results.notes:
        parts.append(named_list([("", note) for note in results.notes]))
    if parts:
        texts = ["SAEs that could not be used, and measures that could not be taken."]
        yield Section("left-out", "Left out", texts, parts)


def _settings(results: Results) -> Section:
    differing, common = settings_tables(results)
    parts = [plain_table(differing)] if len(differing.columns) > 1 else []
    return Section("settings", "Settings", (), [*parts, folded_table(common)])


def _reproduce(results: Results, command: str, data_folder: str) -> Section:
    texts = [
        f"Tables as Markdown and LaTeX, figures as PDF and the numbers as CSV lie in {data_folder}/. What was measured is kept there as "
        "well, and is not measured again by the same command."
    ]
    if results.reused:
        n, everything = len(results.reused), len(results.reused) == len(results.members)
        which = f"all {n} SAEs" if everything else f"{n} of {len(results.members)} SAEs ({', '.join(results.reused)})"
        texts.append(
            f"The evaluations of {which} were found beside them, of the same model, data and number of tokens, and were not measured again."
        )
    training = "\n".join(training_commands(results.members))
    parts = [
        code("Train", training),
        code("Report", command),
        code("Versions", "\n".join(f"{name} {text}" for name, text in versions().items())),
    ]
    return Section("reproduce", "How to reproduce it", texts, parts)
