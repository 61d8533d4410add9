"""What the page shows of one feature, in numbers as they are read."""

from collections.abc import Collection, Sequence
from typing import Any

from sae_lens_e2e.evaluation.formats import count, significant
from sae_lens_e2e.features.passages import Passage, Token
from sae_lens_e2e.features.view import Effect, FeatureView
from sae_lens_e2e.studies.neighbours import Neighbour


def card(view: FeatureView, names: Sequence[str], shown: Collection[str]) -> dict[str, Any]:
    """The values of features.html for a feature; `names` are those of the page's one or two SAEs, `shown` the anchors that are on the page."""
    which = names.index(view.sae)
    nearest = [(f"In {view.sae}", _near(view.nearest, which, shown))]
    if view.nearest_other is not None:
        nearest.append((f"In {names[1 - which]}", _near(view.nearest_other, 1 - which, shown)))
    peak = max((abs(one.activation) for one in view.passages), default=0.0)
    largest = max((abs(one.change) for one in (*view.raised, *view.lowered)), default=1.0)
    return {
        "anchor": anchor(which, view.feature),
        "number": view.feature,
        "sae": view.sae,
        "firing": _firing(view),
        "peak": number(view.passages[0].activation) if view.passages else None,
        "passages": [_passage(one, peak) for one in view.passages],
        "effects": [
            ("Likelier", "up", _effects(view.raised, largest)),
            ("Less likely", "down", _effects(view.lowered, largest)),
        ],
        "nearest": nearest,
    }


def anchor(which: int, feature: int) -> str:
    """The id of a feature's card, of the first SAE or the second."""
    return f"{'ab'[which]}-{feature}"


def number(value: float) -> str:
    """To three digits, a minus as a minus."""
    return f"{value:.3g}".replace("-", "−")


def percent(fraction: float) -> str:
    """A fraction of tokens, to two digits."""
    return f"{significant(2)(100 * fraction)} %"


def _firing(view: FeatureView) -> str:
    if not view.n_fired:
        return "fires on none of these tokens"
    often = f"fires on {percent(view.frequency)} of tokens"
    return often if view.frequency > 0.1 else f"{often}, 1 in {count(1 / view.frequency)}"


def _near(neighbours: Sequence[Neighbour], which: int, shown: Collection[str]) -> list[dict[str, Any]]:
    return [
        {
            "feature": one.feature,
            "cosine": f"{one.cosine:.2f}".replace("-", "−"),
            "link": link if link in shown else None,
        }
        for one, link in ((one, anchor(which, one.feature)) for one in neighbours)
    ]


def _passage(one: Passage, peak: float) -> dict[str, Any]:
    return {
        "activation": number(one.activation),
        "tokens": [_token(token, i == one.peak, peak) for i, token in enumerate(one.tokens)],
        "before": one.goes_on[0],
        "after": one.goes_on[1],
    }


def _token(token: Token, is_peak: bool, peak: float) -> dict[str, Any]:
    # What is underlined is the word, not the space before it.
    text = token.text.lstrip(" ")
    space = token.text[: len(token.text) - len(text)]
    return {
        # A space that is coloured alone would not be seen.
        "space": space if text else "",
        "text": text or (space.replace(" ", "␣") if token.activation else space),
        "strength": f"{min(abs(token.activation) / peak, 1):.2f}" if token.activation else None,
        "negative": token.activation < 0,
        "number": number(token.activation),
        "peak": is_peak,
    }


def _effects(effects: Sequence[Effect], largest: float) -> list[dict[str, str]]:
    return [
        {
            "token": one.token,
            "change": f"{one.change:+.2g}".replace("-", "−"),
            "share": f"{abs(one.change) / largest:.2f}",
        }
        for one in effects
    ]
