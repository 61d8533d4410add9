"""`make_features_page`: what there is to see of features, on one page that needs nothing beside it."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from sae_lens_e2e import __version__, pages
from sae_lens_e2e.features.look import Look, Source, look_at_features
from sae_lens_e2e.features.sections import sections
from sae_lens_e2e.features.view import Survey
from sae_lens_e2e.output import write_whole
from sae_lens_e2e.pages import check_page
from sae_lens_e2e.studies.neighbours import Unmatched

MARK = "sae-lens-e2e features"

_HERE = Path(__file__).parent


def make_features_page(
    sae: Source, output: str | Path = "features.html", *, title: str | None = None, **options: Any
) -> Path:
    """Look at an SAE's features and write what there is to see as one self-contained HTML file, without a network.

    For each feature: its top activating passages in colour, how often it fires, which next tokens it makes likelier and less
    likely, and its nearest features in its own dictionary and in that of the SAE it is compared with.

    sae: a folder of SAELens', a released SAE by name, whatever of Apollo's `load_apollo_sae` takes, or an SAE.
    output: the file, NAME.html. A features page that is there is replaced.
    title: of the page.
    options: those of `look_at_features`: features, compare, threshold, n_features, n_passages, model, dataset, max_tokens,
        batch_size_prompts, device, trust_remote_code, verbose.

    Raises what `look_at_features` raises, and before anything is measured ValueError or OSError for an output that is another file's or
    cannot be written.
    """
    output = Path(output)
    check_page(output, MARK, "features page")
    look = look_at_features(sae, **options)
    write_whole(output, page_of(look, title))
    return output


def page_of(look: Look, title: str | None = None) -> str:
    """The page as HTML."""
    return pages.render(
        _HERE / "features.html",
        MARK,
        title=title or f"Features of {' and '.join(look.names)}",
        lead=_lead(look),
        facts=_facts(look),
        sections=list(sections(look)),
        footer=f"Made with sae-lens-e2e {__version__}.",
        style=Markup((_HERE / "features.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "features.js").read_text(encoding="utf-8")),
    )


def _lead(look: Look) -> str:
    if not look.unmatched:
        return f"{_of_live(look.surveys[0])} features of {look.names[0]} fire on these data."
    (first, second), (one, other) = look.unmatched, look.names
    return (
        f"{_share(first)} live features of {one} have none in {other} with a cosine similarity of {first.threshold:g} or more, and "
        f"{_share(second)} of {other} have none in {one}."
    )


def _share(missing: Unmatched) -> str:
    n = len(missing.features)
    return f"{n:,} of the {missing.n_live:,} ({100 * n / missing.n_live:.0f} %)"


def _of_live(survey: Survey) -> str:
    return f"{int(survey.alive.sum()):,} of the {len(survey.alive):,}"


def _facts(look: Look) -> list[tuple[str, str]]:
    bench = look.bench
    return [
        ("language model", bench.short_model_name),
        ("hook", " to ".join(dict.fromkeys((bench.setting.site.read, *bench.setting.site.writes)))),
        ("dataset, held-out part", "/".join(Path(bench.dataset_name).parts[-2:])),
        *([("caution", bench.caveat)] if bench.caveat else []),
        ("tokens", f"{bench.n_tokens:,} in prompts of {bench.setting.context_size}"),
        *((f"live features of {one.member.name}", f"{_of_live(one)}") for one in look.surveys),
    ]
