"""Train three SAEs in one spliced pass, beside the same three trained apart, and splice in one, two and all of them.

python examples/joint.py                                   # on the embedded model, a few minutes
python examples/joint.py --model FOLDER --dataset FILE --tokens 512000
"""

import argparse
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig, TopKTrainingSAEConfig, TrainingSAE

from sae_lens_e2e import E2E, E2EMultiRunnerConfig, E2EMultiTrainingRunner
from sae_lens_e2e.evaluation import evaluate_together
from sae_lens_e2e.loading import HELD_OUT, load_documents, load_model

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
    parser.add_argument("--evaluation-tokens", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("output/joint"))
    arguments = parser.parse_args()

    model = load_model(arguments.model)
    train, held_out = load_documents(arguments.dataset)

    def run(
        objective: Any, part: float, lr: float, folder: str, start: dict[str, TrainingSAE[Any]] | None = None
    ) -> dict[str, TrainingSAE[Any]]:
        """Train on a part of the tokens, from `start` or from scratch; with `local` each SAE sees clean activations only."""
        saes = {name: TopKTrainingSAEConfig(arguments.d_in, 16 * arguments.d_in, k=arguments.k) for name in HOOKS}
        cfg = E2EMultiRunnerConfig(
            saes=saes,
            hook_names=HOOKS,
            objective=objective,
            model_name=arguments.model,
            dataset_path=arguments.dataset,
            context_size=arguments.context,
            store_batch_size_prompts=4,
            train_batch_size_tokens=4 * arguments.context,
            training_tokens=round(part * arguments.tokens),
            lr=lr,
            lr_scheduler_name="cosineannealing",
            lr_end=lr / 100,
            output_path=str(arguments.output / folder),
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
        return E2EMultiTrainingRunner(
            cfg, override_dataset=train, override_model=model, override_saes=start, held_out=HELD_OUT
        ).run()

    def report(name: str, saes: dict[str, TrainingSAE[Any]]) -> None:
        """The CE loss increase with each alone, and with the first two and all of them."""
        found = evaluate_together(saes, model, held_out, max_tokens=arguments.evaluation_tokens, verbose=False)
        rows = [*found.alone, *found.together[1:]]
        print(
            f"| {name} | {' | '.join(f'{row.ce_loss - found.ce_loss_without_saes:+.3f}' for row in rows)} |", flush=True
        )

    print("| trained | layer 1 alone | layer 2 alone | layer 3 alone | first two | all three |")
    print("| --- | --- | --- | --- | --- | --- |")
    report("apart, local", run("local", 1.0, 1e-2, "apart"))
    report("jointly, KL + MSE, from scratch", run(KL_AND_MSE, 1.0, 1e-2, "jointly"))
    start = run("local", 0.7, 1e-2, "first")
    report("apart for 70 %, then jointly, KL + MSE", run(KL_AND_MSE, 0.3, 3e-3, "then", start))


if __name__ == "__main__":
    main()
