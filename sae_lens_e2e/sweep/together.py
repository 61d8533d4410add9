"""Train several SAEs at once on one language model, whose clean pass they share."""

import copy
import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from typing import Any

from sae_lens.training._interruption import InterruptedException
from tqdm.auto import tqdm

from sae_lens_e2e.training.step import PromptBatches
from sae_lens_e2e.training.trainer import E2ETrainer, step_together

Trainer = E2ETrainer[Any, Any]


def fit_together(
    trainers: Mapping[str, Trainer],
    batches: PromptBatches,
    on_end: Callable[[str, Trainer], None],
    on_failure: Callable[[str, Exception], None],
) -> None:
    """Train each SAE as its own `fit` would, in step with the others, on the same prompts.

    The trainers must share a splice and a plan; each may have an objective, an SAE, an optimizer and a length of its own.
    `on_end` is called as soon as one has finished, `on_failure` for one that raised, which leaves the others be. When
    `batches` is interrupted, those that still train write a checkpoint, and the interruption is raised.
    """
    running = dict(trainers)
    first = next(iter(running.values()))
    first.estimate_activation_statistics()
    for trainer in running.values():
        # The statistics are the activations', and these are the same for all.
        trainer.activation_scaler = copy.deepcopy(first.activation_scaler)
    longest = max(trainer.cfg.total_training_samples for trainer in running.values())
    done = max(trainer.n_training_samples for trainer in running.values())
    with tqdm(total=longest, initial=done, desc=f"Training {len(running)} SAEs", unit="token") as progress:
        while running:
            try:
                batch = next(batches)
            except InterruptedException:
                for trainer in running.values():
                    trainer.save_checkpoint(str(trainer.n_training_samples))
                raise
            for name, error in _step(running, batch).items():
                del running[name]
                on_failure(name, error)
            progress.update(next(iter(trainers.values())).cfg.train_batch_size_samples)
            for name, trainer in list(running.items()):
                if trainer.n_training_samples >= trainer.cfg.total_training_samples:
                    # With nothing left to train on, what remains of SAELens' loop is what comes after it, and an idle progress bar.
                    with redirect_stderr(io.StringIO()):
                        trainer.fit()
                    del running[name]
                    on_end(name, trainer)


def _step(running: Mapping[str, Trainer], batch: Any) -> dict[str, Exception]:
    """One step of each, with what SAELens' loop does around it; gives those that failed."""
    for trainer in running.values():
        trainer.maybe_reset_sparsity()
    failed = {}
    for (name, trainer), output in zip(running.items(), step_together(list(running.values()), batch), strict=True):
        if isinstance(output, Exception):
            failed[name] = output
            continue
        trainer._checkpoint_if_needed()
        trainer.n_training_steps += 1
    return failed
