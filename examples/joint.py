"""Train three SAEs in one spliced pass, beside the same three trained apart, and splice in one, two and all of them.

python examples/joint.py                                   # on the embedded model, three minutes
python examples/joint.py --model FOLDER --dataset FILE --d-in 64 --tokens 512000
"""

import argparse
from pathlib import Path
from typing import Any

from sae_lens import SAE, LoggingConfig, TopKTrainingSAEConfig

from sae_lens_e2e import E2E, E2EMultiRunnerConfig, E2EMultiTrainingRunner, E2ERunnerConfig, E2ETrainingRunner
from sae_lens_e2e.evaluation import evaluate_together
from sae_lens_e2e.loading import load_documents, load_model, tokenised

HOOKS = {f"layer_{layer}": f"blocks.{layer}.hook_resid_pre" for layer in (1, 2, 3)}
KL_AND_MSE = E2E(kl_coefficient=1.0, mse_coefficient=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--d-in", type=int, default=64)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128_000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--evaluation-tokens", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("output/joint"))
    arguments = parser.parse_args()

    model = load_model(arguments.model)
    train, held_out = (tokenised(part, model, arguments.context) for part in load_documents(arguments.dataset))
    common: dict[str, Any] = {
        "model_name": arguments.model,
        "dataset_path": arguments.dataset,
        "context_size": arguments.context,
        "store_batch_size_prompts": 4,
        "train_batch_size_tokens": 4 * arguments.context,
        "training_tokens": arguments.tokens,
        "lr": arguments.lr,
        "lr_scheduler_name": "cosineannealing",
        "lr_end": arguments.lr / 100,
        "checkpoint_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }

    def topk() -> TopKTrainingSAEConfig:
        return TopKTrainingSAEConfig(d_in=arguments.d_in, d_sae=16 * arguments.d_in, k=arguments.k)

    def apart(objective: Any, folder: Path) -> None:
        for name, hook in HOOKS.items():
            cfg = E2ERunnerConfig(
                sae=topk(), hook_name=hook, objective=objective, output_path=str(folder / name), verbose=False, **common
            )
            E2ETrainingRunner(cfg, override_dataset=train, override_model=model).run()

    def jointly(objective: Any, folder: Path) -> None:
        saes = {name: topk() for name in HOOKS}
        cfg = E2EMultiRunnerConfig(saes=saes, hook_names=HOOKS, objective=objective, output_path=str(folder), **common)
        E2EMultiTrainingRunner(cfg, override_dataset=train, override_model=model).run()

    runs = {
        "apart, local": (apart, "local"),
        "apart, KL + MSE": (apart, KL_AND_MSE),
        "jointly, KL only": (jointly, "e2e"),
        "jointly, KL + MSE": (jointly, KL_AND_MSE),
    }
    print(f"| trained | {' | '.join(f'{name} alone' for name in HOOKS)} | first two | all three |")
    print("| --- |" + " --- |" * (len(HOOKS) + 2))
    for name, (train_with, objective) in runs.items():
        folder = arguments.output / name.replace(", ", "_").replace(" ", "_")
        train_with(objective, folder)
        saes = {sae: SAE.load_from_disk(folder / sae) for sae in HOOKS}
        found = evaluate_together(saes, model, held_out, max_tokens=arguments.evaluation_tokens, verbose=False)
        rows = [*found.alone, *found.together[1:]]
        print(
            f"| {name} | {' | '.join(f'{row.ce_loss - found.ce_loss_without_saes:+.3f}' for row in rows)} |", flush=True
        )


if __name__ == "__main__":
    main()
