"""An end-to-end step of ours, of EleutherAI's sparsify and of Apollo's library, on the same shapes with as many tokens.

    python benchmarks/peers.py [--shape tinystories-1m|gpt2-small|all] [--apollo SOURCE_TREE]

sparsify trains TopK SAEs (k 32) in models of transformers, Apollo's library SAEs with an L1 loss in a `HookedTransformer`: ours does each. Both
run by their own code, sparsify in an environment of its own (`make benchmark-peers` makes it). The language models' weights are random. How a step is measured is in `measure.py`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import KINDS, L1, LR, SHAPES, Case, K, faster_of_two, in_own_process, measured, model_settings

HERE = Path(__file__).parent
PEERS = ("tinystories-1m", "gpt2-small")


def sparsify(python: Path, shape_name: str, steps: int) -> dict[str, Any]:
    """What sparsify's step takes, measured by its own interpreter."""
    shape = SHAPES[shape_name]
    settings = {
        "model": shape.hugging_face,
        "hook_layer": shape.hook_layer,
        "ratio": shape.ratio,
        "k": K,
        "n_prompts": shape.n_prompts,
        "n_pos": shape.n_pos,
        "lr": LR,
        "steps": steps,
    }
    return in_own_process(str(python), str(HERE / "sparsify_driver.py"), json.dumps(settings))


def apollo(tree: Path, shape_name: str, steps: int) -> dict[str, Any]:
    """What a step of Apollo's library takes, imported from its source tree."""
    shape = SHAPES[shape_name]
    settings = {
        "model": model_settings(shape),
        "hook_name": KINDS["hooked"].hook_name(shape),
        "ratio": shape.ratio,
        "sparsity": L1 * shape.model["d_model"],
        "n_prompts": shape.n_prompts,
        "n_pos": shape.n_pos,
        "lr": LR,
        "steps": steps,
    }
    return in_own_process(sys.executable, str(HERE / "apollo_driver.py"), str(tree), json.dumps(settings))


def pairs(shape: str, steps: int, python: Path | None, tree: Path | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured at a shape, by the first columns of its row: each peer after ours of its kind."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    if python is not None:
        of_transformers = f"transformers | TopK {K}"
        ours = Case(shape, "e2e", kind="hugging-face", sae="topk", steps=steps)
        found[f"ours | {of_transformers}"] = partial(measured, ours)
        found[f"sparsify | {of_transformers}"] = partial(sparsify, python, shape, steps)
    if tree is not None:
        of_lens = "HookedTransformer | L1"
        found[f"ours | {of_lens}"] = partial(measured, Case(shape, "e2e", steps=steps))
        found[f"Apollo | {of_lens}"] = partial(apollo, tree, shape, steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*PEERS, "tiny", "all"], default="all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    parser.add_argument(
        "--sparsify", type=Path, default=HERE.parent / ".venv-sparsify" / "bin" / "python", metavar="PYTHON"
    )
    parser.add_argument("--apollo", type=Path, metavar="SOURCE_TREE", help="a checkout of Apollo's e2e_sae")
    arguments = parser.parse_args()
    python = arguments.sparsify if os.access(arguments.sparsify, os.X_OK) else None
    tree = arguments.apollo if arguments.apollo and (arguments.apollo / "e2e_sae").is_dir() else None
    if arguments.apollo and tree is None:
        sys.exit(
            f"--apollo {arguments.apollo}: no e2e_sae folder is in it; give the root of a checkout of Apollo's e2e_sae"
        )
    if python is None:
        print(
            f"sparsify is left out: there is no {arguments.sparsify}; run `make benchmark-peers`, or give --sparsify PYTHON"
        )
    if tree is None:
        print("Apollo's library is left out: give --apollo the root of a checkout of e2e_sae")
    if python is None and tree is None:
        sys.exit(1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| shape | tokens | step of | language model | SAE | s a step | tokens/s | GiB above the model |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in PEERS if arguments.shape == "all" else [arguments.shape]:
        sides = pairs(shape, arguments.steps, python, tree)
        n_tokens = SHAPES[shape].n_tokens
        for side, row in zip(sides, faster_of_two(list(sides.values())), strict=True):
            per_second = n_tokens / row["seconds"]
            print(
                f"| {shape} | {n_tokens:,} | {side} | {row['seconds']:.2f} | {per_second:,.0f} | {row['peak_gib']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
