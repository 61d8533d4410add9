"""Replace every MLP of a language model by a transcoder: trained apart, then together, so that all can be in at once.

python examples/replacement_model.py                                   # on the embedded model, under three minutes
python examples/replacement_model.py --all --model FOLDER --dataset FILE --tokens 512000
"""

import argparse
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig, TrainingSAE

from sae_lens_e2e import E2E, BatchTopKTrainingTranscoderConfig, E2EMultiRunnerConfig, E2EMultiTrainingRunner
from sae_lens_e2e.evaluation import evaluate_replacement
from sae_lens_e2e.loading import HELD_OUT, load_documents, load_model

Transcoders = dict[str, TrainingSAE[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64_000)
    parser.add_argument(
        "--apart", type=float, default=0.7, help="fraction of the tokens on which they are trained apart"
    )
    parser.add_argument("--lr", type=float, default=1e-2, help="while apart")
    parser.add_argument("--joint-lr", type=float, default=3e-3)
    parser.add_argument(
        "--mse", type=float, default=0.1, help="what the local reconstruction weighs beside the KL divergence"
    )
    parser.add_argument("--evaluation-tokens", type=int, default=40_000)
    parser.add_argument("--all", action="store_true", help="also jointly from scratch, and apart to the end")
    parser.add_argument("--output", type=Path, default=Path("output/replacement_model"))
    arguments = parser.parse_args()

    model: Any = load_model(arguments.model)
    train, held_out = load_documents(arguments.dataset)
    names = [f"mlp{layer}" for layer in range(model.cfg.n_layers)]

    def run(objective: Any, part: float, lr: float, folder: str, start: Transcoders | None = None) -> Transcoders:
        """Train all on a part of the tokens, from `start` or from scratch; with `local` each is given clean activations only."""
        cfg = E2EMultiRunnerConfig(
            saes={
                name: BatchTopKTrainingTranscoderConfig(
                    d_in=model.cfg.d_model, d_sae=arguments.d_sae, d_out=model.cfg.d_model, k=arguments.k
                )
                for name in names
            },
            hook_names={name: f"blocks.{layer}.ln2.hook_normalized" for layer, name in enumerate(names)},
            hook_names_out={name: f"blocks.{layer}.hook_mlp_out" for layer, name in enumerate(names)},
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
        saes = None if start is None else {name: copied(sae) for name, sae in start.items()}
        runner = E2EMultiTrainingRunner(
            cfg, override_dataset=train, override_model=model, override_saes=saes, held_out=HELD_OUT
        )
        return runner.run(overwrite=True)

    def report(recipe: str, transcoders: Transcoders) -> None:
        """The CE loss increase in nats with 1, 2, ... of them in, and the sum over each alone."""
        found = evaluate_replacement(
            transcoders, model, held_out, max_tokens=arguments.evaluation_tokens, verbose=False
        )
        together = " | ".join(f"{one.ce_loss - found.ce_loss_without_saes:.3f}" for one in found.together)
        last = found.together[-1]
        print(
            f"| {recipe} | {together} | {found.ce_loss_increase_alone:.3f} | {last.kl:.3f} | {last.top1_agreement:.3f} |",
            flush=True,
        )

    print(f"| recipe | {' | '.join(f'first {n + 1}' for n in range(len(names)))} | each alone, summed | KL | top-1 |")
    print("| --- " * (len(names) + 4) + "|")
    together = {"kl_coefficient": 1.0, "mse_coefficient": arguments.mse}
    in_passes = E2E(**together, splices=("all", "each_alone"))
    if arguments.all:
        report("apart", run("local", 1.0, arguments.lr, "apart"))
        report("jointly, KL + MSE", run(E2E(**together), 1.0, arguments.lr, "jointly"))
        report("jointly, KL + MSE, in passes", run(in_passes, 1.0, arguments.lr, "jointly_in_passes"))
    first = run("local", arguments.apart, arguments.lr, "first")
    share, rest = f"apart for {arguments.apart:.0%}", 1 - arguments.apart
    report(f"{share} only", first)
    report(f"{share}, then jointly", run(E2E(**together), rest, arguments.joint_lr, "then", first))
    report(f"{share}, then in passes", run(in_passes, rest, arguments.joint_lr, "then_in_passes", first))


def copied(sae: TrainingSAE[Any]) -> TrainingSAE[Any]:
    """The same transcoder again, to be trained on while the other stays as it is."""
    again = type(sae)(sae.cfg)
    again.load_state_dict(sae.state_dict())
    return again


if __name__ == "__main__":
    main()
