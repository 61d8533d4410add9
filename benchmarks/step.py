"""Time and memory of one training step, against the naive computation: two whole passes, all logits, log_softmax twice.

    python benchmarks/step.py [--shape tiny|tinystories-1m|gpt2-small|gpt2-small-long|all]
    python benchmarks/step.py --objectives   # our step for each objective, at GPT2-small's shape
    python benchmarks/step.py --joint        # 1, 3 and 12 SAEs at once, at GPT2-small's shape and a ratio of 8
    python benchmarks/step.py --kinds        # each kind of model of GPT2-small's shape

How a step is measured is in `measure.py`. The sides take turns, so that whatever else the machine is doing disturbs both.
"""

import argparse
from typing import Any

import torch
from measure import KINDS, SHAPES, Case, best_of_two

AGAINST_NAIVE = ("e2e", "e2e_ds")
OBJECTIVES = ("local", "e2e", "e2e_ds", "ce", "kl_mse")
N_SAES = (1, 3, 12)


def against_naive(shape: str, steps: int) -> None:
    """A row for each objective. Raises RuntimeError if the two sides do not compute the same."""
    for objective in AGAINST_NAIVE:
        naive, ours = best_of_two([Case(shape, objective, side, steps=steps) for side in ("naive", "ours")])
        if abs(naive["first_loss"] - ours["first_loss"]) > 1e-4 * abs(naive["first_loss"]):
            raise RuntimeError(f"the sides compute different losses: {naive['first_loss']}, {ours['first_loss']}")
        print(
            f"| {shape} | {objective} | {naive['seconds']:.2f} | {ours['seconds']:.2f} | {naive['seconds'] / ours['seconds']:.2f} | "
            f"{naive['peak_gib']:.2f} | {ours['peak_gib']:.2f} | {ours['peak_gib'] / naive['peak_gib']:.1%} |",
            flush=True,
        )


def ours_alone(cases: list[Case], of: str) -> None:
    """A row for each case, told apart by one of its settings."""
    print(f"| {of} | s a step | tokens/s | GiB above the model |\n| --- | --- | --- | --- |")
    for row in best_of_two(cases):
        print(
            f"| {named(row[of])} | {row['seconds']:.2f} | {row['n_tokens'] / row['seconds']:.0f} | {row['peak_gib']:.2f} |"
        )


def named(value: Any) -> str:
    """A kind of model as its class is called, anything else as it is."""
    return KINDS[value].model_class_name if value in KINDS else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    for option in ("objectives", "joint", "kinds"):
        parser.add_argument(f"--{option}", action="store_true")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    steps = arguments.steps
    if arguments.objectives:
        ours_alone([Case("gpt2-small", objective, steps=steps) for objective in OBJECTIVES], "objective")
    elif arguments.joint:
        ours_alone([Case("gpt2-small", "kl_mse", n_saes=n, ratio=8, steps=steps) for n in N_SAES], "n_saes")
    elif arguments.kinds:
        ours_alone([Case("gpt2-small", kind=kind, steps=steps) for kind in KINDS], "kind")
    else:
        print("| shape | objective | naive s | ours s | faster | naive GiB | ours GiB | memory |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for shape in [name for name in SHAPES if name != "tiny"] if arguments.shape == "all" else [arguments.shape]:
            against_naive(shape, steps)


if __name__ == "__main__":
    main()
