"""What stands where on the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sae_lens_e2e.evaluation.formats import decimals
from sae_lens_e2e.features.cards import anchor, card, percent
from sae_lens_e2e.features.look import Group, Look
from sae_lens_e2e.report.table import Column, Table

MAX_ROWS = 300
"""Of the table of features that the other SAE lacks."""

_STEPS = "at equal steps from the one that fires most to the one that fires least"


@dataclass(frozen=True)
class Section:
    """One part of the page, with an entry in the contents."""

    id: str
    title: str
    text: str = ""
    cards: Sequence[dict[str, Any]] = ()
    table: tuple[str, Markup] | None = None
    """What it says when it is folded, and the table."""
    notes: Sequence[tuple[str, str]] = ()


def sections(look: Look) -> Iterator[Section]:
    """The page's sections: the groups of features, what each of two SAEs lacks, and how to read it all."""
    groups = {group.name: group for group in look.groups}
    shown = {anchor(look.names.index(group.sae), one.feature) for group in look.groups for one in group.features}

    def cards(name: str) -> list[dict[str, Any]]:
        group = groups.get(name, Group(name, "", ()))
        return [card(one, look.names, shown) for one in group.features]

    first = look.names[0]
    if "chosen" in groups:
        yield Section("chosen", "Features", f"Of {first}, those that were asked for.", cards("chosen"))
    if "spread" in groups:
        n, n_live = len(groups["spread"].features), int(look.surveys[0].alive.sum())
        yield Section("spread", "Features", f"{n:,} of {first}’s {n_live:,} live features, {_STEPS}.", cards("spread"))
    if look.unmatched:
        yield _only(look, 0, cards("only_first"))
        yield _only(look, 1, cards("only_second"))
    if "both" in groups:
        n, n_live = len(groups["both"].features), len(look.unmatched[0].matched)
        text = f"{n:,} of {first}’s {n_live:,} live features with a like in {look.names[1]}, {_STEPS}."
        yield Section("both", "In both", text if n else "None.", cards("both"))
    yield _how(look)


def _only(look: Look, which: int, cards: Sequence[dict[str, Any]]) -> Section:
    """What one of two SAEs has and the other lacks."""
    name, other, missing = look.names[which], look.names[1 - which], look.unmatched[which]
    n = len(missing.features)
    text = f"{n:,} of {name}’s {missing.n_live:,} live features have none in {other} with a cosine similarity of {missing.threshold:g} or more"
    text += f"; here are {len(cards):,}, {_STEPS}." if len(cards) else "."
    table = _missing_table(look, which) if n else None
    return Section(f"only-{'ab'[which]}", f"Only in {name}", text, cards, table)


def _missing_table(look: Look, which: int) -> tuple[str, Markup]:
    """Every feature that the other SAE lacks, or those of them that fire most."""
    survey, missing = look.surveys[which], look.unmatched[which]
    columns = [Column("feature", str), Column("fires on", percent), Column("nearest cosine", decimals(2))]
    firing = [int(survey.firing[feature]) for feature in missing.features]
    in_order = sorted(zip(firing, missing.features, missing.cosines, strict=True), key=lambda row: (-row[0], row[1]))
    rows = [(feature, fired / survey.n_tokens, cosine) for fired, feature, cosine in in_order[:MAX_ROWS]]
    n = len(in_order)
    title = f"All {n:,}, by how often they fire" if n <= MAX_ROWS else f"The {MAX_ROWS} of {n:,} that fire most"
    return title, Markup(Table("missing", title, columns, [rows]).to_html())


def _how(look: Look) -> Section:
    rows = [
        (
            "Passages",
            "the tokens around the one at which the feature is most active, one passage a prompt, of all tokens read. The stronger "
            "the colour, the more active the feature, against its highest activation on these data. Point at a token for "
            "the number, or go to the passages with the Tab key and through their coloured tokens with the arrow keys.",
        ),
        (
            "Fires",
            "the fraction of the tokens read at which its activation is not 0; a feature is live if it fires at all.",
        ),
        (
            "Effect on the next token",
            "the change of log-probability, in nats, that what the feature adds at the passages’ peaks makes there, on average: as the "
            "model predicts, less the same with the feature’s part taken from the activation. It goes through all later "
            "layers, so it is not the product of decoder and unembedding.",
        ),
        ("Nearest", "the live features whose decoder rows have the largest cosine similarity to its own."),
    ]
    if getattr(look.bench.model, "tokenizer", None) is None:
        rows.append(("Tokens", "are shown as their numbers, as the model has no tokenizer."))
    return Section("how", "How to read it", "", notes=rows)
