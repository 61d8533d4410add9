"""Runs to be killed: each trains into a folder to the end, going on from the last checkpoint there is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from sae_lens import LoggingConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig

from sae_lens_e2e import cli, embedded
from sae_lens_e2e.splice import Site
from sae_lens_e2e.sweep import read_sweep, run_sweep
from tests.models import dataset_of, random_tokens
from tests.training import make_multi_runner, make_runner, multi_config, runner_config

CONTEXT, TOKENS = 24, 96
"""Of the embedded model's runs: four prompts a step."""


def tokenised(out: Path) -> None:
    """A standard SAE on tokens, over more than an epoch, its activations normalised by an estimate."""
    sae = StandardTrainingSAEConfig(
        d_in=16, d_sae=40, l1_coefficient=0.02, l1_warm_up_steps=4, normalize_activations="expected_average_only_in"
    )
    settings: dict[str, Any] = {"lr_warm_up_steps": 3, "lr_decay_steps": 4, "n_batches_for_norm_estimate": 3}
    cfg = runner_config(sae=sae, **_common(out, 12 * 48), **settings)
    make_runner(cfg, dataset=dataset_of(random_tokens(37, 12, 61))).run()


def text(out: Path) -> None:
    """A TopK SAE on text, many rows of a document and many documents of a row, over more than an epoch."""
    model, tokens = embedded.load_model(), embedded.load_dataset()[:6]["input_ids"]
    texts = [str(model.to_string(torch.tensor(row))) for row in tokens]
    cut = ["".join(texts[:2]), *(text[:70] for text in texts[2:])]
    cfg = runner_config(
        sae=TopKTrainingSAEConfig(d_in=64, d_sae=128, k=8),
        **(_common(out, 12 * TOKENS) | _EMBEDDED | {"is_dataset_tokenized": False, "objective": "e2e"}),
    )
    make_runner(cfg, model, Dataset.from_dict({"text": cut}).shuffle(seed=1)).run()


def joint(out: Path) -> None:
    """Two SAEs in one spliced pass."""
    saes = {
        "standard": (
            Site.of_sae("blocks.1.hook_resid_pre"),
            StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02),
        ),
        "topk": (Site.of_sae("blocks.2.hook_resid_pre"), TopKTrainingSAEConfig(d_in=16, d_sae=40, k=4)),
    }
    make_multi_runner(multi_config(saes, objective="e2e", **_common(out, 12 * 48))).run()


def command_line(out: Path) -> None:
    """`sae-lens-e2e train`, its checkpoints inside its output folder."""
    common = _common(out, 8 * TOKENS)
    flags: list[str] = ["--architecture", "topk", "--d_in", "64", "--d_sae", "96", "--k", "8", "--objective", "local"]
    flags += ["--model_name", "embedded", "--dataset_path", "embedded", "--log_to_wandb", "false"]
    flags += ["--wandb_log_frequency", "1", "--verbose", "false"]
    settings = _EMBEDDED | {name: value for name, value in common.items() if name != "logger" and value is not None}
    flags += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    if code := cli.main(["train", *flags]):
        raise SystemExit(code)


def sweep(out: Path) -> None:
    """Two points on one clean pass, and their evaluation."""
    base = {
        **_EMBEDDED,
        "model_name": "embedded",
        "dataset_path": "embedded",
        "training_tokens": 8 * TOKENS,
        "n_checkpoints": 4,
        "verbose": False,
        "logger": {"log_to_wandb": False, "wandb_log_frequency": 1},
        "sae": {"architecture": "topk", "d_in": 64, "d_sae": 96, "k": 8},
    }
    file = out.parent / "stories.yaml"
    evaluation = {"max_tokens": 96, "batch_size_prompts": 4}
    file.write_text(yaml.safe_dump({"base": base, "grid": {"objective": ["local", "e2e"]}, "evaluation": evaluation}))
    run_sweep(read_sweep(file), out)


RUNS: dict[str, Callable[[Path], None]] = {run.__name__: run for run in (tokenised, text, joint, command_line, sweep)}

_EMBEDDED: dict[str, Any] = {
    "hook_name": "blocks.3.hook_resid_pre",
    "context_size": CONTEXT,
    "store_batch_size_prompts": 2,
    "train_batch_size_tokens": TOKENS,
}


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of any run in a folder."""
    found = [path for path in folder.glob("*/*") if path.name.isdigit()]
    return max(found, key=lambda path: int(path.name), default=None)


def _common(out: Path, tokens: int) -> dict[str, Any]:
    last = last_checkpoint(out / "checkpoints")
    return {
        "training_tokens": tokens,
        "n_checkpoints": 5,
        "output_path": str(out),
        "checkpoint_path": str(out / "checkpoints"),
        "resume_from_checkpoint": str(last) if last is not None else None,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),
    }
