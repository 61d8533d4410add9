"""Whole prompts for one optimizer step at a time, and stopping between two of them."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from sae_lens import logger
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_e2e._upstream import InterruptedException


class PromptBatches(Iterator[Tensor]):
    """Whole prompts, (prompts, context_size), from SAELens' activation store.

    Raises ValueError for data without a prompt, and what the store raises.
    """

    def __init__(self, store: ActivationsStore, prompts_per_step: int):
        self.store = store
        self.prompts_per_step = prompts_per_step
        self.interrupted = False

    def __next__(self) -> Int[Tensor, "prompts pos"]:
        # Here, between two steps, nothing is half done: an interruption waits for it.
        if self.interrupted:
            raise InterruptedException
        try:
            return self.store.get_batch_tokens(self.prompts_per_step)
        except StopIteration:
            raise ValueError(
                f"the dataset does not give one prompt of context_size={self.store.context_size} tokens; give it more, or longer, "
                "documents"
            ) from None


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
