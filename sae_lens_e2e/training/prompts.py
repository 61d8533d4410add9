"""Whole prompts for one optimizer step at a time, and stopping between two of them."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from jaxtyping import Int
from sae_lens import logger
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_e2e._upstream import InterruptedException


class PromptBatches(Iterator[Tensor]):
    """Whole prompts, (prompts, context_size), from SAELens' activation store, of tokens below `d_vocab` if that is known.

    Raises ValueError, with its number, for a row that is too short, for a token that there is not, and for data without a prompt.
    """

    def __init__(self, store: ActivationsStore, prompts_per_step: int, d_vocab: int | None = None):
        self.store = store
        self.prompts_per_step = prompts_per_step
        self.d_vocab = d_vocab
        self.interrupted = False

    def __next__(self) -> Int[Tensor, "prompts pos"]:
        # Here, between two steps, nothing is half done: an interruption waits for it.
        if self.interrupted:
            raise InterruptedException
        n_wanted = self.store.context_size
        try:
            prompts = self.store.get_batch_tokens(self.prompts_per_step)
        except StopIteration:
            raise ValueError(
                f"the dataset does not give one prompt of context_size={n_wanted} tokens; give it more, or longer, documents"
            ) from None
        except RuntimeError as error:
            if (row := self._short_row()) is None:
                raise
            raise ValueError(row) from error
        if prompts.shape[1] != n_wanted:
            raise ValueError(self._short_row() or f"a row of the dataset has {prompts.shape[1]} tokens, not {n_wanted}")
        if self.d_vocab is not None and (largest := int(prompts.max())) >= self.d_vocab:
            raise ValueError(
                f"the dataset has token {largest} and the model knows {self.d_vocab}; tokenise it with the model's own tokenizer"
            )
        return prompts

    def _short_row(self) -> str | None:
        """What to say of a row that is too short, among those that were read last; None if there is none."""
        last = self.store.n_dataset_processed
        rows, column, n_wanted = self.store.dataset, self.store.tokens_column, self.store.context_size
        if not self.store.is_dataset_tokenized or not isinstance(rows, Dataset):
            return None
        for number in range(last - self.prompts_per_step + 1, last + 1):
            # Epochs follow each other.
            n_tokens = len(rows[number % len(rows)][column])
            if n_tokens < n_wanted:
                return (
                    f"row {number % len(rows)} of the dataset has {n_tokens} tokens, fewer than context_size={n_wanted}; leave it "
                    "out, or tokenise the dataset into rows of that many"
                )
        return None


@contextmanager
def interrupting(batches: PromptBatches) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into an interruption after the step; a second one interrupts at once."""

    def interrupt(signal_number: int, _: Any) -> None:
        if batches.interrupted:
            raise KeyboardInterrupt
        batches.interrupted = True
        logger.warning(f"{signal.Signals(signal_number).name}: finishing this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
