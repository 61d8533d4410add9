"""What a run of `train` has come to: what its SAEs cost the language model, and where they are."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from sae_lens import SAE

from sae_lens_e2e.cli.terminal import BOLD, styled
from sae_lens_e2e.errors import one_line
from sae_lens_e2e.evaluation import Evaluation, evaluate_each
from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.loading.folder import load_folder
from sae_lens_e2e.splice import device_of
from sae_lens_e2e.training.multi_runner import E2EMultiTrainingRunner
from sae_lens_e2e.training.runner import E2ETrainingRunner

AnyRunner = E2ETrainingRunner | E2EMultiTrainingRunner

MOST_TOKENS = 16_384
"""Of held-out tokens that are evaluated on, so that it takes no time beside the training..."""
PART_OF_TRAINING = 1 / 20
"""... nor more than this part of what was trained on, but one batch at least."""

_MEASURED = ("ce_loss_increase", "kl", "l0")
_NOT_MEASURED = "-"


def warn_of_repeats(runner: AnyRunner) -> None:
    """Warn where a run reads its prompts more than once, as far as that is known beforehand."""
    cfg, store = runner.cfg, runner.activations_store
    if not (store.is_dataset_tokenized and isinstance(store.dataset, Dataset)):
        return
    n_prompts = len(store.dataset)
    if (times := cfg.training_tokens / (n_prompts * cfg.context_size)) > 1:
        warnings.warn(
            f"training_tokens={cfg.training_tokens}: the dataset's {n_prompts:,} prompts of {cfg.context_size} tokens are read {times:.1f} times",
            stacklevel=2,
        )


def summary(runner: AnyRunner, held_out: Any, seconds: float) -> str:
    """A table with a row an SAE, measured shortly on documents that were held out, and what it was measured on."""
    cfg = runner.cfg
    saes = _saved(runner)
    batch = cfg.store_batch_size_prompts * cfg.context_size
    tokens = min(MOST_TOKENS, int(cfg.training_tokens * PART_OF_TRAINING))
    failed: dict[str, Exception] = {}
    found = evaluate_each(
        saes,
        runner.model,
        held_out,
        failed.__setitem__,
        batch_size_prompts=cfg.store_batch_size_prompts,
        n_batches=max(tokens // batch, 1),
        model_kwargs=cfg.model_kwargs,
        verbose=False,
    )
    rows = [
        {
            "SAE": name,
            **_measured(found.get(name)),
            "trained on": f"{cfg.training_tokens:,} tokens",
            "in": f"{seconds:,.1f} s",
            "saved in": "nothing: no output_path" if cfg.output_path is None else str(_folder(runner, name)),
        }
        for name in saes
    ]
    heading, *lines = pd.DataFrame(rows).to_string(index=False).splitlines()
    return "\n".join([styled(heading, BOLD, sys.stdout), *lines, *_notes(found, failed, cfg.output_path)])


def _saved(runner: AnyRunner) -> dict[str, SAE[Any]]:
    """The SAEs by name, as anyone would load them; one alone is called by its architecture."""
    several = isinstance(runner, E2EMultiTrainingRunner)
    trained = runner.saes if several else {runner.sae.cfg.architecture(): runner.sae}
    if runner.cfg.output_path is None:
        return dict(trained)
    return {name: load_folder(_folder(runner, name), str(device_of(runner.splice.model))) for name in trained}


def _folder(runner: AnyRunner, name: str) -> Path:
    base = Path(str(runner.cfg.output_path))
    return base / name if isinstance(runner, E2EMultiTrainingRunner) else base


def _measured(evaluation: Evaluation | None) -> dict[str, str]:
    measures = [MEASURES[name] for name in _MEASURED]
    return {
        measure.title: _NOT_MEASURED if evaluation is None else measure.format(getattr(evaluation, measure.name))
        for measure in measures
    }


def _notes(found: dict[str, Evaluation], failed: dict[str, Exception], output_path: str | None) -> list[str]:
    notes = [f"{name} was not measured: {one_line(error)}" for name, error in failed.items()]
    if found:
        n_tokens = next(iter(found.values())).n_tokens
        more = "" if output_path is None else f"; on more: sae-lens-e2e evaluate {output_path}"
        notes.append(f"Measured on {n_tokens:,} held-out tokens{more}")
    return notes
