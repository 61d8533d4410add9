"""Passages of the data around the tokens at which a feature is most active."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens_e2e.features.text import REPLACEMENT, pieces

BEFORE, AFTER = 24, 10
"""Tokens of a passage around its peak."""


@dataclass(frozen=True)
class Token:
    """A token of a passage: its text, and how active the feature is at it; 0 where it does not fire, or the token does not count."""

    text: str
    activation: float


@dataclass(frozen=True)
class Passage:
    """A few tokens of a prompt, with the one among them at which the feature is most active in the prompt."""

    tokens: tuple[Token, ...]
    peak: int
    """Which of `tokens` that is."""
    prompt: int
    """The prompt's number in the data, from 0 on."""
    position: int
    """Of the peak in its prompt."""
    goes_on: tuple[bool, bool]
    """Whether the prompt has tokens before the passage, and after it."""

    @property
    def activation(self) -> float:
        """The feature's, at the peak."""
        return self.tokens[self.peak].activation

    @property
    def text(self) -> str:
        """The passage as text."""
        return "".join(token.text for token in self.tokens)


def passage(tokenizer: Any, tokens: Sequence[int], activations: Sequence[float], prompt: int, position: int) -> Passage:
    """The passage around a position of a prompt, given the prompt's tokens and the feature's activation at each."""
    start, stop = max(position - BEFORE, 0), min(position + AFTER + 1, len(tokens))
    texts = pieces(tokenizer, tokens, start, stop)
    shown = [
        # Part of a character has nothing to colour.
        Token(text or (REPLACEMENT if activation else ""), activation)
        for text, activation in zip(texts, activations[start:stop], strict=True)
    ]
    return Passage(tuple(shown), position - start, prompt, position, (start > 0, stop < len(tokens)))
