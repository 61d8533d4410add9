"""Tokens as text that can be seen, whatever is in it."""

import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# So many tokens before the first decide how it reads: whether it begins with a space, and whether it ends a character.
_LEAD = 4
_OUTER_SPACES = re.compile("^ +| +$")
_SYMBOLS = {"\n": "↵", "\r": "↵", "\t": "⇥"}
# They are not printable, and hold emoji and some scripts together.
_JOINERS = "\u200c\u200d"


def pieces(tokenizer: Any, tokens: Sequence[int], start: int, stop: int) -> list[str]:
    """The text of each of `tokens[start:stop]`, which put together are the text of all; a character of several tokens is the last one's.

    Without a tokenizer, None, their numbers.
    """
    if tokenizer is None:
        return [f"[{token}]" for token in tokens[start:stop]]
    first = max(start - _LEAD, 0)
    done = _decoded(tokenizer, tokens[first:start])
    found: list[str] = []
    for end in range(start + 1, stop + 1):
        text = _decoded(tokenizer, tokens[first:end])
        # The next token may end the character that this one has begun.
        whole = not text.endswith(REPLACEMENT)
        found.append(visible(text[len(done) :]) if whole else "")
        done = text if whole else done
    return found


def token_text(tokenizer: Any, token: int) -> str:
    """The text of a token on its own, a space at either end shown as ␣."""
    if tokenizer is None:
        return f"[{token}]"
    # After another one, as some tokenizers drop the space at which a text begins.
    text = visible(_decoded(tokenizer, [token, token])[len(_decoded(tokenizer, [token])) :])
    return _OUTER_SPACES.sub(lambda spaces: "␣" * len(spaces[0]), text)


def visible(text: str) -> str:
    """Text in which line breaks and tabs are symbols, and what else cannot be seen, or turns the direction of writing, is replaced."""
    return "".join(_SYMBOLS.get(one, one if one.isprintable() or one in _JOINERS else REPLACEMENT) for one in text)


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
