"""What the libraries below have to say: in one line each, in our words where theirs are not for the user, and more with -v."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sae_lens_e2e.cli.terminal import YELLOW, styled


class Known(NamedTuple):
    """A message of SAELens' that is said otherwise, or not at all, and why."""

    module: str
    """Where it is from."""
    words: str
    """A regular expression of all of it."""
    instead: str | None
    """What is said in its place, with what the expression's groups found; None for nothing."""


KNOWN = (
    # The command line passes what the config names, loaded by that name; what is held out is in the SAE's metadata.
    Known(
        "sae_lens.llm_sae_training_runner",
        r"You just passed in a (?:dataset|model) which will override the one specified in your configuration: .* As a consequence this "
        r"run will not be reproducible via configuration alone\.",
        None,
    ),
    Known(
        "sae_lens.multi_sae_training_runner",
        r"override_(?:dataset|model) overrides cfg\.(?:dataset_path|model_name)=.*; this run will not be reproducible from "
        r"configuration alone\.",
        None,
    ),
    # It holds documents against tokens; `cli.train` says when prompts are really read again.
    Known(
        "sae_lens.training.activations_store",
        r"The training dataset contains fewer samples \(\d+\) than the number of samples required by your training configuration "
        r"\(\d+\)\. This will result in multiple training epochs and some samples being used more than once\.",
        None,
    ),
    Known(
        "sae_lens.training.activations_store",
        r"pretokenized dataset has context_size (\d+), but the provided context_size is (\d+)\. Some data will be discarded in this case\.",
        r"context_size=\2: the first \2 of each row's \1 tokens are read, and the others are not",
    ),
    Known(
        "sae_lens.training.activations_store",
        r"Dataset is not tokenized\. Pre-tokenizing will improve performance and allows for more control over special tokens\. See "
        r"\S+ for more info\.",
        None,
    ),
    # Models are loaded here as the metadata say.
    Known(
        "sae_lens.saes.sae",
        r"This SAE has non-empty model_from_pretrained_kwargs\. For optimal performance, load the model like so: .*",
        None,
    ),
)
"""Each is held to be in SAELens, word for word, by a test."""


def in_our_words(message: str) -> str | None:
    """What is said of a message: itself, or what `KNOWN` has in its place."""
    for known in KNOWN:
        if (match := re.fullmatch(known.words, " ".join(message.split()))) is not None:
            return None if known.instead is None else match.expand(known.instead)
    return message


@contextmanager
def told(verbose: bool) -> Iterator[None]:
    """Have warnings and log messages said in our words, a line each; if `verbose`, all of them as they are, and what SAELens and we note besides."""

    warned: set[str] = set()

    def said_of(message: str) -> str | None:
        return message if verbose else in_our_words(message)

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        said = said_of(str(message))
        if said is not None and said not in warned:
            warned.add(said)
            at = f" ({category.__name__}, {filename}:{lineno})" if verbose else ""
            print(f"{styled('warning:', YELLOW, sys.stderr)} {' '.join(said.split())}{at}", file=sys.stderr)

    class ToStandardError(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (said := said_of(record.getMessage())) is not None:
                print(said, file=sys.stderr)

    log = logging.getLogger("sae_lens")
    level, handler = log.level, ToStandardError()
    if verbose:
        log.setLevel(logging.INFO)
    log.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
