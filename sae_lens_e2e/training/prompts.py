"""Whole prompts for one optimizer step at a time, and stopping between two of them."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from jaxtyping import Int
from sae_lens import logger
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_e2e._upstream import InterruptedException
from sae_lens_e2e.training import ranks


class PromptBatches(Iterator[Tensor]):
    """Whole prompts, (prompts, context_size), from SAELens' activation store.

    Every rank reads the prompts of all, and the step takes its share of them: tokens cost little beside the model, each rank's store is then at
    the same place, and a checkpoint of it is good for any number of ranks. An interruption of one rank is one of all.

    Raises ValueError for data without a prompt, for ranks that read different ones, and what the store raises.
    """

    def __init__(self, store: ActivationsStore, prompts_per_step: int):
        self.store = store
        self.prompts_per_step = prompts_per_step
        self.interrupted = False
        self._known_to_be_same = False

    def __next__(self) -> Int[Tensor, "prompts pos"]:
        # Here, between two steps, nothing is half done: an interruption waits for it.
        if ranks.any_of(self.interrupted):
            raise InterruptedException
        with ranks.together():
            prompts = self._read()
        if not self._known_to_be_same:
            self._check_same(prompts)
        return prompts

    def _check_same(self, prompts: Int[Tensor, "prompts pos"]) -> None:
        self._known_to_be_same = True
        if ranks.world_size() > 1 and len(set(ranks.gathered(sha256(prompts.cpu().numpy().tobytes()).digest()))) > 1:
            raise ValueError(
                "the ranks read different prompts; give every rank the same dataset, in the same order, of which each takes its own share"
            )

    def _read(self) -> Int[Tensor, "prompts pos"]:
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
