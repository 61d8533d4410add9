"""Train one SAE on a small language model of stories, and show what it does to the model.

    python examples/train_tinystories.py                                  # the embedded model, objective e2e_ds
    python examples/train_tinystories.py --objective local --sparsity 1.3
    python examples/train_tinystories.py --preset paper                   # TinyStories-1M with the paper's settings

The model is `embedded`, a local folder (a TransformerLens one, or a Hugging Face one) or a name on the Hub; the dataset
`embedded`, a jsonl file, a local folder or a name on the Hub, of texts or of token ids. The last tenth of its documents are
kept for evaluation.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from sae_lens import SAE, LoggingConfig, StandardTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e import E2EDownstream, E2ERunnerConfig, E2ETrainingRunner, Objective, embedded
from sae_lens_e2e.evaluation import Evaluation, evaluate
from sae_lens_e2e.evaluation.measures import MEASURES
from sae_lens_e2e.loading import EMBEDDED, HELD_OUT, load_documents, load_model
from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.output import claim_output

# Braun et al. (2024), TinyStories-1M. The sparsity is theirs to sweep, and so is left to --sparsity.
PAPER: dict[str, Any] = {
    "model": "roneneldan/TinyStories-1M",
    "dataset": "apollo-research/roneneldan-TinyStories-tokenizer-gpt2",
    "hook": "blocks.4.hook_resid_pre",
    "context": 512,
    "batch": 20,
    "d_sae": 50 * 64,
}
PAPER_BY_OBJECTIVE: dict[str, dict[str, Any]] = {
    "local": {"lr": 1e-2, "tokens": 400_000 * 512},
    "e2e": {"lr": 1e-3, "tokens": 450_000 * 512},
    "e2e_ds": {"lr": 1e-3, "tokens": 250_000 * 512, "objective": E2EDownstream(downstream_coefficient=1000.0)},
}

SHOWN = (
    *("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_increase", "kl"),
    *("l0", "n_alive", "fraction_alive", "n_tokens"),
)


@dataclass
class Settings:
    """What one run needs to know; the command line fills it in."""

    model: str = EMBEDDED
    dataset: str = EMBEDDED
    hook: str = embedded.HOOK_NAME
    objective: str | Objective = "e2e_ds"
    downstream_hooks: tuple[str, ...] | None = None
    sparsity: float = 0.1
    tokens: int = 1_280_000
    evaluation_tokens: int | None = None
    d_sae: int = 1024
    context: int = 256
    batch: int = 2
    lr: float = 7e-3
    seed: int = 42
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    output: str = ""
    wandb: bool = False


def load(settings: Settings) -> tuple[HookedRootModule, Any, Any]:
    """The model, what to train on and what to evaluate on. Raises ConnectionError if the Hub is needed and not reached."""
    try:
        return load_model(settings.model, settings.device), *load_documents(settings.dataset)
    except ConnectionError as error:
        raise ConnectionError(f"{error}: run without --preset, --model and --dataset to use it") from error


def objective_of(settings: Settings) -> Objective:
    """The objective by name or JSON, with the downstream hooks if any were given."""
    objective = settings.objective
    if isinstance(objective, str) and objective.startswith("{"):
        objective = json.loads(objective)
    made = make_objective(objective)
    if settings.downstream_hooks is None or not isinstance(made, E2EDownstream):
        return made
    return replace(made, downstream_hooks=settings.downstream_hooks)


def train(settings: Settings, model: HookedRootModule, prompts: Dataset | IterableDataset) -> None:
    """Train one SAE and save it to `settings.output`."""
    step = settings.batch * settings.context
    n_steps = settings.tokens // step
    cfg = E2ERunnerConfig(
        sae=StandardTrainingSAEConfig(
            d_in=model_width(model),
            d_sae=settings.d_sae,
            l1_coefficient=settings.sparsity,
            l1_warm_up_steps=n_steps // 20,
            apply_b_dec_to_input=False,
        ),
        objective=objective_of(settings),
        model_name=settings.model,
        model_class_name="AutoModelForCausalLM" if isinstance(model, HookedProxyLM) else "HookedTransformer",
        hook_name=settings.hook,
        dataset_path=settings.dataset,
        context_size=settings.context,
        store_batch_size_prompts=settings.batch,
        train_batch_size_tokens=step,
        training_tokens=n_steps * step,
        lr=settings.lr,
        lr_scheduler_name="cosineannealing",
        lr_end=settings.lr / 100,
        lr_warm_up_steps=n_steps // 20,
        seed=settings.seed,
        device=settings.device,
        logger=LoggingConfig(log_to_wandb=settings.wandb, wandb_project="sae-lens-e2e", eval_every_n_wandb_logs=10),
        checkpoint_path=None,
        output_path=settings.output,
        verbose=False,
    )
    E2ETrainingRunner(cfg, override_dataset=prompts, override_model=model, held_out=HELD_OUT).run()


def model_width(model: HookedRootModule) -> int:
    """d_model."""
    config: Any = model.model.config if isinstance(model, HookedProxyLM) else model.cfg
    return config.hidden_size if isinstance(model, HookedProxyLM) else config.d_model


def train_and_evaluate(settings: Settings, model: HookedRootModule, documents: Any, held_out: Any) -> Evaluation:
    """Train one SAE, save it, and evaluate what was saved as anyone would load it."""
    train(settings, model, documents)
    sae = SAE.load_from_disk(settings.output, device=settings.device)
    return evaluate(sae, model, held_out, max_tokens=settings.evaluation_tokens)


def table(results: dict[str, Evaluation]) -> str:
    """A column for each SAE, a row for each figure."""
    shown, mse = [MEASURES[name] for name in SHOWN], MEASURES["mse"]
    hooks = next(iter(results.values())).downstream_mse
    rows = [
        *((m.title, [m.format(getattr(r, m.name)) for r in results.values()]) for m in shown),
        *((f"{mse.label} at {hook}", [mse.format(r.downstream_mse[hook]) for r in results.values()]) for hook in hooks),
    ]
    cells = [["", *results], *([name, *values] for name, values in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]])


def parse(arguments: list[str] | None = None) -> tuple[Settings, bool]:
    """Settings from the command line, and whether an existing output may be replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument(
        "--preset", choices=["paper"], help="the paper's model, dataset and settings for TinyStories-1M"
    )
    parser.add_argument("--model", help=f"'embedded', a folder, or a name on the Hub (default: {default.model})")
    parser.add_argument(
        "--dataset", help=f"'embedded', a jsonl file, a folder, or a name on the Hub (default: {default.dataset})"
    )
    parser.add_argument("--hook", help=f"where the SAE goes (default: {default.hook})")
    parser.add_argument(
        "--objective", help='a name, or JSON such as \'{"name": "e2e", "kl_coefficient": 2}\' (default: e2e_ds)'
    )
    parser.add_argument("--downstream-hooks", nargs="+", help="for e2e_ds (default: the input of every later block)")
    parser.add_argument("--sparsity", type=float, help=f"l1_coefficient (default: {default.sparsity})")
    parser.add_argument("--tokens", type=int, help=f"to train on (default: {default.tokens})")
    parser.add_argument("--evaluation-tokens", type=int, help="held-out tokens to evaluate on (default: all)")
    parser.add_argument("--d-sae", type=int, help=f"features (default: {default.d_sae})")
    parser.add_argument("--context", type=int, help=f"tokens a prompt (default: {default.context})")
    parser.add_argument("--batch", type=int, help=f"prompts an optimizer step (default: {default.batch})")
    parser.add_argument("--lr", type=float, help=f"learning rate (default: {default.lr})")
    parser.add_argument("--seed", type=int, help=f"(default: {default.seed})")
    parser.add_argument("--device", help=f"(default: {default.device})")
    parser.add_argument("--output", help="folder to save to (default: output/OBJECTIVE)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not one of ours")
    parser.add_argument("--wandb", action="store_true", default=None, help="log to Weights & Biases")
    parsed = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    overwrite = parsed.pop("overwrite")
    chosen: dict[str, Any] = parsed
    if parsed.pop("preset", None):
        name = parsed.get("objective", default.objective)
        chosen = PAPER | PAPER_BY_OBJECTIVE.get(name, {}) | {k: v for k, v in parsed.items() if v != name}
    if "downstream_hooks" in chosen:
        chosen["downstream_hooks"] = tuple(chosen["downstream_hooks"])
    settings = Settings(**chosen)
    return replace(settings, output=settings.output or f"output/{objective_of(settings).name}"), overwrite


def main(arguments: list[str] | None = None) -> None:
    try:
        settings, overwrite = parse(arguments)
        claim_output(settings.output, overwrite)
        model, documents, held_out = load(settings)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    result = train_and_evaluate(settings, model, documents, held_out)
    print(table({objective_of(settings).name: result}))
    print(f"saved to {settings.output}; load it with sae_lens.SAE.load_from_disk({settings.output!r})")


if __name__ == "__main__":
    main()
