"""`make_report`: everything the paper measured and drew, of any SAEs, on one page."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from datasets import Dataset
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e import __version__
from sae_lens_e2e.bench.bench import set_up
from sae_lens_e2e.bench.members import collect
from sae_lens_e2e.evaluation import evaluation_frame, layers_frame, together_frame
from sae_lens_e2e.output import write_whole
from sae_lens_e2e.pages import check_page
from sae_lens_e2e.report.drawings import check_figures, drawings
from sae_lens_e2e.report.findings import findings
from sae_lens_e2e.report.measure import MEASURES, check_measures, measure_all
from sae_lens_e2e.report.page import MARK, render
from sae_lens_e2e.report.results import Results
from sae_lens_e2e.report.sections import PAPER, facts, lead, sections
from sae_lens_e2e.report.settings import report_command
from sae_lens_e2e.report.store import Store
from sae_lens_e2e.report.table import Table
from sae_lens_e2e.report.tables import tables
from sae_lens_e2e.studies.directions import directions_frame
from sae_lens_e2e.studies.faithfulness import faithfulness_frame
from sae_lens_e2e.studies.geometry import geometry_summary

BATCH_SIZE_PROMPTS = 16
_TABLES = "tables"


def make_report(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    model: str | HookedRootModule | None = None,
    dataset: str | Dataset | None = None,
    hook_name: str | None = None,
    max_tokens: int = 500_000,
    measures: Sequence[str] = MEASURES,
    figures: Sequence[str] | None = None,
    title: str | None = None,
    batch_size_prompts: int = BATCH_SIZE_PROMPTS,
    device: str = "cpu",
    trust_remote_code: bool = False,
    verbose: bool = True,
) -> Path:
    """Measure SAEs and write one self-contained HTML file on them; what it is made of goes into a folder beside it.

    sources: folders of SAELens', of a sweep, or whatever of Apollo's `load_apollo_sae` takes.
    output: the file, NAME.html; in NAME_data are the tables (.md, .tex), the figures (.pdf), the numbers (.csv) and what was
        measured, which is not measured again by the next call with the same SAEs and settings.
    model, dataset: names as `load_model` and `load_documents` take them, whose held-out documents are read, or the things
        themselves; left at None, those that the SAEs' metadata name.
    hook_name: take the SAEs at this hook only, from sources that have several.
    max_tokens: at most so many tokens are read.
    measures: "evaluation", "geometry", "directions", "faithfulness"; what is left out is left out of the page.
    figures: names from `FIGURES`; left at None, all that there is something to draw in.
    title: of the page.
    batch_size_prompts: prompts a forward pass.
    device: where the model and the SAEs are run.
    trust_remote_code: load the model with whatever the SAEs' metadata say, even if that runs code of the model's repository.
    verbose: show progress.

    An SAE that cannot be used is left out, and the page says why. Raises ValueError or OSError, before anything is measured, for a
    source that holds no SAE, SAEs of different models or hooks, an unknown measure or figure, data that are too short, and an
    output that is another file's or cannot be written.
    """
    output = Path(output)
    check_measures(measures)
    check_figures(figures)
    check_page(output, MARK, "report")
    members, skipped = collect(sources, device, hook_name, any_model=model is not None)
    bench, members, misfits = set_up(members, model, dataset, max_tokens, batch_size_prompts, device, trust_remote_code)
    folder = output.with_name(f"{output.stem}_data")
    results = measure_all(members, [*skipped, *misfits], bench, Store(folder / "measured"), measures, verbose)
    found, made = findings(results), list(tables(results))
    drawn = list(drawings(results, figures, folder))
    _write_tables(made, folder / _TABLES)
    _write_frames(results, folder)
    flags = {
        **{"output": output, "model": model, "dataset": dataset, "hook-name": hook_name, "max-tokens": max_tokens},
        "batch-size-prompts": None if batch_size_prompts == BATCH_SIZE_PROMPTS else batch_size_prompts,
        "measures": None if set(measures) == set(MEASURES) else list(measures),
        "figures": None if figures is None else list(figures),
        "title": title,
        "trust-remote-code": True if trust_remote_code else None,
    }
    page = render(
        title or f"SAEs at {bench.setting.hook_name} of {bench.short_model_name}",
        lead(found),
        facts(results, bench),
        sections(results, found, drawn, made, report_command(sources, flags), folder.name),
        f"Made with sae-lens-e2e {__version__}. The paper: {PAPER}.",
    )
    write_whole(output, page)
    return output


def _write_tables(made: Sequence[Table], folder: Path) -> None:
    """Each as Markdown and as LaTeX; those that an earlier call wrote and this one did not make are removed."""
    written = {
        f"{one.name}.{suffix}": text
        for one in made
        for suffix, text in (("md", one.to_markdown()), ("tex", one.to_latex()))
    }
    for stale in (*folder.glob("*.md"), *folder.glob("*.tex")):
        if stale.name not in written:
            stale.unlink()
    for name, text in written.items():
        write_whole(folder / name, text)


def _write_frames(results: Results, folder: Path) -> None:
    """The numbers of every SAE, for a notebook or a spreadsheet."""
    frames: dict[str, pd.DataFrame] = {
        "evaluation": evaluation_frame(results.evaluations),
        "layers": layers_frame(results.evaluations),
        "geometry": geometry_summary(results.geometry),
        "directions": directions_frame(results.directions),
        "faithfulness": faithfulness_frame(results.faithfulness),
        "together": together_frame(results.together),
    }
    for name, frame in frames.items():
        file = folder / f"{name}.csv"
        if len(frame):
            write_whole(file, frame.to_csv(index=False))
        else:
            file.unlink(missing_ok=True)
