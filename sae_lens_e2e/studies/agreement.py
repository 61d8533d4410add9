"""Subject-verb agreement: prompts after which one form of a verb is right and the other wrong, as words and as tokens.

The four constructions are those of Braun et al. (2024), table 7; the words are our own, simple enough for a model of
children's stories.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from sae_lens_e2e.studies.contrast import ContrastPair, prompt_lengths, tokenize_pair, tokenizer_of

# A word as it goes with a singular noun, and with a plural one.
_Word = tuple[str, str]


def agreement_pairs(
    model: Any,
    templates: Sequence[str] | None = None,
    *,
    n_per_template: int = 100,
    seed: int = 0,
    attractor: Literal["opposite", "same"] = "opposite",
) -> tuple[ContrastPair, ...]:
    """Contrast pairs of agreement in number, drawn from our word lists as far as the tokenizer of `model` allows.

    `model` may be the tokenizer itself. Each pair has a singular and a plural subject, in two prompts of the same number of
    tokens, and verb forms of one token. `attractor` is the number of the other noun, where the template has one: "opposite" to
    the subject's, which a model that only looks at the last noun gets wrong, or the "same". There are `n_per_template`, or as
    many as are found. Raises ValueError for an unknown template, and for one of which no pair survives.
    """
    tokenizer = tokenizer_of(model)
    if n_per_template < 1:
        raise ValueError(f"n_per_template={n_per_template} must be at least 1")
    if attractor not in ("opposite", "same"):
        raise ValueError(f"attractor={attractor!r} must be 'opposite' or 'same'")
    pairs: list[ContrastPair] = []
    for name in TEMPLATES if templates is None else templates:
        if name not in _TEMPLATES:
            raise ValueError(f"templates: there is no {name!r}; choose from {', '.join(TEMPLATES)}")
        drawn = _draw(name, seed, attractor == "opposite", n_draws=_DRAWS_PER_PAIR * n_per_template)
        found = list(islice((pair for pair in drawn if _fits(tokenizer, pair)), n_per_template))
        if not found:
            others = [other for other in TEMPLATES if other != name]
            raise ValueError(
                f"templates: no pair of {name!r} has verb forms of one token and prompts of one length in this tokenizer; "
                f"leave it out, as in templates={others}, or pass pairs of your own"
            )
        pairs += found
    return tuple(pairs)


def _fits(tokenizer: Any, pair: ContrastPair) -> bool:
    return len(set(prompt_lengths(tokenizer, pair))) == 1 and tokenize_pair(tokenizer, pair) is not None


def _draw(name: str, seed: int, opposite: bool, n_draws: int) -> Iterator[ContrastPair]:
    """Different choices of words for a template, in random order."""
    template = _TEMPLATES[name]
    sizes = [*(len(slot.words) for slot in template.slots), len(template.verbs)]
    n_choices = math.prod(sizes)
    for choice in random.Random(seed).sample(range(n_choices), min(n_draws, n_choices)):
        indices = []
        for size in sizes:
            choice, index = divmod(choice, size)
            indices.append(index)
        chosen = [(slot, slot.words[index]) for slot, index in zip(template.slots, indices, strict=False)]
        if len({word for _, word in chosen}) < len(chosen):
            continue  # a noun that is its own attractor
        prompts = [
            template.text.format(*(word[(slot.of_attractor and opposite) ^ plural] for slot, word in chosen))
            for plural in (False, True)
        ]
        verb = template.verbs[indices[-1]]
        yield ContrastPair(prompts[0], f" {verb[0]}", f" {verb[1]}", name, contrast=prompts[1])


@dataclass(frozen=True)
class _Slot:
    """The words for one place in a template, which go with the subject's number or the other noun's."""

    words: tuple[_Word, ...]
    of_attractor: bool = False


@dataclass(frozen=True)
class _Template:
    text: str
    slots: tuple[_Slot, ...]
    verbs: tuple[_Word, ...]


def _forms(words: str) -> tuple[_Word, ...]:
    """'man/men little' as (("man", "men"), ("little", "little")), an underscore being a space."""
    forms = [word.replace("_", " ").split("/") for word in words.split()]
    return tuple((form[0], form[-1]) for form in forms)


_ANIMATE = _forms(
    "girl/girls boy/boys friend/friends man/men child/children king/kings queen/queens lady/ladies "
    "teacher/teachers doctor/doctors nurse/nurses farmer/farmers driver/drivers student/students player/players "
    "writer/writers singer/singers worker/workers brother/brothers sister/sisters neighbor/neighbors guest/guests "
    "dog/dogs cat/cats bird/birds bear/bears animal/animals puppy/puppies kitty/kitties bee/bees pony/ponies "
    "fairy/fairies"
)
_INANIMATE = _forms(
    "toy/toys flower/flowers story/stories plane/planes book/books picture/pictures car/cars truck/trucks ball/balls "
    "box/boxes tree/trees house/houses rock/rocks boat/boats letter/letters cup/cups"
)
_ADJECTIVES = _forms("little big old young happy sad nice kind brave small new pretty funny shy tall quiet")
_PARTICIPLES = _forms(
    "looking_at playing_with holding watching finding seeing helping sitting_near standing_by waiting_for talking_about "
    "walking_to listening_to carrying"
)
_TRANSITIVE = _forms(
    "likes/like loves/love sees/see knows/know wants/want helps/help finds/find needs/need follows/follow hears/hear"
)
_BE = _forms("was/were is/are")
_AUXILIARIES = _BE + _forms("has/have")

_TEMPLATES = {
    "simple": _Template("The {} {}", (_Slot(_ADJECTIVES), _Slot(_ANIMATE)), _AUXILIARIES),
    "across_participle": _Template(
        "The {} {} the {}",
        (_Slot(_ANIMATE), _Slot(_PARTICIPLES), _Slot(_ANIMATE + _INANIMATE, of_attractor=True)),
        _AUXILIARIES,
    ),
    "across_relative": _Template(
        "The {} that the {} {}",
        (
            _Slot(_ANIMATE + _INANIMATE),
            _Slot(_ANIMATE, of_attractor=True),
            _Slot(_TRANSITIVE, of_attractor=True),
        ),
        _AUXILIARIES,
    ),
    "within_relative": _Template(
        "The {} that the {}",
        (_Slot(_ANIMATE + _INANIMATE, of_attractor=True), _Slot(_ANIMATE)),
        _BE + _TRANSITIVE,
    ),
}
TEMPLATES = tuple(_TEMPLATES)
# A tokenizer of a small vocabulary has few verbs of one token; where one draw in this many fits, all pairs are found.
_DRAWS_PER_PAIR = 200
